"""The bench on a small scale: its record, its table, its figure, and its arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from prototok import Recipe
from prototok.bench import measure, table, timing
from prototok.bench.baselines import Engine, Generate
from prototok.bench.table import figure
from prototok.bench.vllm import vllm_seconds
from prototok.cli import main
from prototok.model.frozen_lm import FrozenLM
from prototok.model.load import load
from prototok.report.svg import Dot, log_dots

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def record() -> dict:
    recipe = Recipe(name="short", lr=0.1, betas=(0.9, 0.99), max_steps=200)
    settings = measure.BenchSettings(
        models=("tiny-llama",), lengths=(3,), texts=2, recipe=recipe, device="cpu"
    )
    return measure.run_bench(settings)


def test_record_and_table(record: dict, tmp_path: Path) -> None:
    table.write(record, tmp_path / "out" / "bench.json")
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["cases"][0]["length"] == 3
    ElementTree.parse(tmp_path / "out" / "bench.svg")
    (case,) = record["cases"]
    assert case["exact"] == 2 and case["mean_accuracy"] == 1.0
    rates = {(t["method"], t["dtype"], t["batch"]): t["tokens_per_second"] for t in case["timings"]}
    one = rates["one forward", case["dtype"], 1]
    others = [
        r for (method, _, batch), r in rates.items() if batch == 1 and method != "one forward"
    ]
    assert case["ratio_batch_1"] == pytest.approx(one / max(others))
    assert case["ratio_dynamic_batch_1"] >= case["ratio_batch_1"]
    assert {b for _, _, b in rates} == {1, 16, 64}
    for t in case["timings"]:
        assert t["tokens_per_second"] == pytest.approx(t["batch"] * 3 / t["seconds"])
        assert t["quartiles"][0] <= t["seconds"] <= t["quartiles"][1]
        own = t["method"] in ("engine static-KV", "one forward")
        assert (t["share"] is not None and t["share"] > 0) == own
    assert ("engine static-KV", "float32", 1) in rates
    lines = table.table(record).splitlines()
    assert lines[1].split()[:3] == ["model", "N", "exact"]
    assert lines[2].split()[:3] == ["tiny-llama", "3", "2/2"]
    assert f"{max(others):,.0f}" in lines[2]
    wide = table.table(record, wide=True).splitlines()
    assert "break-even" in wide[1] and "break-even" not in lines[1]
    assert table.summary(record).splitlines()[:2] == lines[1:3]
    assert 1 < case["ceiling"] <= 3
    assert case["learned"] is None  # another recipe was asked for


def test_tables_fit_80_columns_and_explain_shares_above_one(record: dict) -> None:
    committed = json.loads((RESULTS / "bench.json").read_text())
    for one in (record, committed):
        assert max(map(len, table.table(one).splitlines())) <= 80
    above = [line for line in table.table(committed).splitlines() if "of bandwidth" in line]
    shares = [int(re.findall(r"(\d+) % of", line)[0]) for line in above]
    assert max(shares) > 100
    for share, line in zip(shares, above, strict=True):
        assert (share > 100) == line.endswith("(weights stay in a cache)")


def test_fits_without_and_with_the_optimiser_of_a_built_in_model(
    record: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings = [timing.Timing(**one) for one in record["cases"][0]["timings"]]
    monkeypatch.setattr(measure, "time_all", lambda *arguments: timings)
    lm, peak = load("tiny-neox", "cpu"), timing.Peak(1e12, 1e11)
    settings = measure.BenchSettings(models=("tiny-neox",), texts=4)
    case, exact = measure._measure(lm, "tiny-neox", 8, settings, peak)
    assert case.learned is not None and exact == [True] * 4 and case.learned.exact == 4
    assert 0 <= case.learned.steps_median < 0.5 * case.fit_steps_median
    assert case.learned.seconds_per_text > 0
    shown = table.table(record | {"cases": [dataclasses.asdict(case)]}).splitlines()
    title = shown.index("Fits without and with the networks that the model brings:")
    header, row = shown[title + 1 : title + 3]
    assert row.split()[:4] == ["tiny-neox", "8", "4/4", f"{case.fit_steps_median:.0f}"]
    assert row.split()[5:7] == ["4/4", f"{case.learned.steps_median:.0f}"]
    assert len(header) == len(row) <= 80
    assert "networks that the model" not in table.table(record)


def test_json_takes_the_place_of_the_table(
    record: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(measure, "run_bench", lambda settings, say: record)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["bench", "--json"])
    (case,) = json.loads(capsys.readouterr().out)
    assert case["model"] == "tiny-llama" and case["exact"] == 2
    with pytest.raises(SystemExit):
        main(["bench"])
    shown = capsys.readouterr().out
    assert shown.startswith("At equal length") and "{" not in shown


def test_each_mode_at_its_own_longest(record: dict) -> None:
    (longest,) = record["longest"]
    assert longest["one_forward"] == (3, 3) and longest["one_forward_length"] == 3
    assert longest["grids"] == ((3,), (3,))
    assert set(longest["autoregressive"]) <= {0, 3}
    assert longest["autoregressive_fit_seconds_per_text"] > 0
    reached = longest["autoregressive_length"]
    assert (longest["ratio_batch_1"] is None) == (reached == 0)
    line = next(s for s in table.table(record, wide=True).splitlines() if "held-out novels" in s)
    assert line.split()[:5] == ["tiny-llama", "held-out", "novels", "3", "(≥"]
    assert measure._by_text({2: [True, False, True], 4: [True, True, False]}, 3) == (4, 0, 2)


def test_every_way_is_listed_strongest_first(record: dict) -> None:
    (case,) = record["cases"]
    lines = table._every_way(case)[1:]
    found = (re.findall(r"(?:bf16|fp32) +([\d,]+)", line) for line in lines)
    rates = [float(rate.replace(",", "")) for (rate,) in found]
    ways = {t["method"] for t in case["timings"] if t["batch"] == 1}
    assert len(ways) == 4 and rates == sorted(rates, reverse=True) and len(rates) in (3, 6)


def test_a_wrong_baseline_is_not_timed(tiny_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    timing.require_equal_tokens(tiny_lm, 4)
    monkeypatch.setattr(Engine, "__call__", lambda self, length, batch: torch.zeros(1, length))
    with pytest.raises(RuntimeError, match="engine static-KV generates other tokens"):
        timing.require_equal_tokens(tiny_lm, 4)


def test_ceiling_and_roofline(tiny_lm: FrozenLM) -> None:
    peak = timing.Peak(989e12, 4.8e12)  # an H200, bf16
    assert round(timing.ceiling(1024, torch.bfloat16, peak)) == 206
    assert timing.ceiling(128, torch.bfloat16, peak) == 128
    assert round(timing.ceiling(1024, torch.float32, peak)) == 412
    weights = 6 * ((192 + 2 * 64) * 192 + 192 * 192 + 3 * 192 * 512) + 4096 * 192
    bytes_bound, flops_bound = timing.Peak(1e30, 1.0), timing.Peak(1.0, 1e30)
    size = tiny_lm.dtype.itemsize
    assert timing.roofline_seconds(tiny_lm, 2, 5, bytes_bound) == weights * size
    assert timing.roofline_seconds(tiny_lm, 2, 5, flops_bound) == 2 * weights * 10


def test_baseline_generates_what_it_is_asked_for(tiny_lm: FrozenLM) -> None:
    generate = Generate(tiny_lm, torch.float32)
    dynamic, static = (generate(5, 2, cache) for cache in ("dynamic", "static"))
    assert dynamic.shape == static.shape == (2, 5)
    assert torch.equal(dynamic, static)
    assert torch.equal(Engine(tiny_lm, torch.float32)(5, 2), dynamic)


def test_random_weights_are_measured_for_speed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from prototok.model import shapes

    small = shapes._pythia(64, 1, 2)
    monkeypatch.setitem(shapes.SHAPES, "pythia-160m", lambda: small)
    settings = measure.BenchSettings(shape="pythia-160m", lengths=(4,), texts=2, device="cpu")
    (case,) = measure.run_bench(settings)["cases"]
    assert case["model"] == "pythia-160m (random weights)"
    assert case["exact"] is None and case["fit_seconds_per_text"] is None
    assert case["step_seconds"] > 0


@pytest.mark.parametrize(
    ("shape", "millions"),
    [
        ("pythia-160m", 162), ("pythia-410m", 405), ("pythia-1.4b", 1415),
        ("llama-3.2-1b", 1236), ("llama-3.2-3b", 3213), ("llama-3.1-8b", 8030),
    ],
)  # fmt: skip
def test_shapes_have_the_published_sizes(shape: str, millions: int) -> None:
    from prototok.model.shapes import random_model

    model = random_model(shape, torch.device("meta"), torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6) == millions


def test_figure_is_well_formed_escaped_and_cuts_nothing_off() -> None:
    dots = [
        Dot("g", "<l>", "a", 0.5, "n", 0.4, 0.7),
        Dot("g", "m", "b", 2000.0, "2,000", 1000.0, math.inf),
        Dot("h", "m, too", "b", None, "no median", 900.0, math.inf),
    ]
    root = ElementTree.fromstring(log_dots("a < b", "about", "x & y", dots))
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "<l>", "x & y, log scale", "1,000", "no median"} <= set(texts)
    marks = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    bars = [p.get("d") for p in root.iter("{http://www.w3.org/2000/svg}path")]
    (axis,) = [one for one in root if one.get("class") == "axis"]
    left, right = float(axis.get("x1")), float(axis.get("x2"))
    assert [m.get("class") for m in marks] == ["f0", "f1"]
    for mark in marks:
        assert left + 4.5 <= float(mark.get("cx")) <= right - 4.5
    assert [bar.count("v8") for bar in bars] == [2, 1, 1]
    assert bars[1].split("H")[1].startswith(f"{right:.1f}")  # an open end goes to the edge


def test_figure_has_the_fastest_first_and_a_colour_for_each_method() -> None:
    timings = [
        {"method": m, "dtype": d, "batch": 1, "seconds": 8 / r, "quartiles": [7 / r, 10 / r],
         "tokens_per_second": r}
        for m, d, r in (("static", "bfloat16", 300.0), ("one", "bfloat16", 9000.0),
                        ("static", "float32", 400.0))
    ]  # fmt: skip
    case = {"model": "m", "length": 8, "dtype": "bfloat16", "timings": timings}
    drawn = figure({"cases": [case]})
    root = ElementTree.fromstring(drawn)
    marks = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert [m[0].text for m in marks] == ["one: 9,000", "static (float32): 400", "static: 300"]
    assert [m.get("class") for m in marks] == ["f0", "ring s1", "f1"]
    assert "prefers-color-scheme:dark" in drawn
    bar = next(root.iter("{http://www.w3.org/2000/svg}path")).get("d")
    assert bar.count("v8") == 2


FAKE_VLLM = """
__version__ = "0.0.fake"
class SamplingParams:
    def __init__(self, **settings): self.n = settings["max_tokens"]
class LLM:
    def __init__(self, model, **settings):
        import os
        assert os.path.exists(model + "/config.json") and settings["load_format"] == LOAD
    def generate(self, prompts, settings, use_tqdm):
        ids = [prompts[0]["prompt_token_ids"][0]] * (settings.n - SHORT)
        one = type("O", (), {"token_ids": ids})
        return [type("R", (), {"outputs": [one]}) for _ in prompts]
"""


def fake_python(folder: Path, vllm: str | None) -> Path:
    """An interpreter that has this vllm, or none."""
    (folder / "packages").mkdir()
    if vllm is not None:
        (folder / "packages" / "vllm.py").write_text(vllm)
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="{folder}/packages" exec "{sys.executable}" -S "$@"\n'
    )
    python.chmod(0o755)
    return python


def test_vllm_is_timed_through_its_own_interpreter(tiny_lm: FrozenLM, tmp_path: Path) -> None:
    fake = FAKE_VLLM.replace("LOAD", "'auto'").replace("SHORT", "0")
    seconds = vllm_seconds(tiny_lm, 5, (1, 3), fake_python(tmp_path, fake))
    assert list(seconds) == [1, 3] and all(len(s) == 4 and min(s) > 0 for s in seconds.values())


@pytest.mark.parametrize(
    ("vllm", "message"),
    [
        (None, "failed, vllm cannot be imported"),
        (FAKE_VLLM.replace("LOAD", "'auto'").replace("SHORT", "2"), r"generated \[3\] tokens"),
        (FAKE_VLLM.replace("LOAD", "'dummy'").replace("SHORT", "0"), "failed, AssertionError"),
    ],
)
def test_vllm_that_fails_is_named(
    tiny_lm: FrozenLM, tmp_path: Path, vllm: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match="vllm-python: .*" + message):
        vllm_seconds(tiny_lm, 5, (1,), fake_python(tmp_path, vllm))
    with pytest.raises(ValueError, match="vllm-python: .* could not be run"):
        vllm_seconds(tiny_lm, 5, (1,), tmp_path / "none")
