"""The bench on a small scale: its record, its table, its figure, and its arithmetic."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from prototok import Recipe, bench
from prototok.baselines import Engine, Generate
from prototok.frozen_lm import FrozenLM
from prototok.report.svg import Bar, log_bars


@pytest.fixture(scope="module")
def record() -> dict:
    recipe = Recipe(name="short", lr=0.1, betas=(0.9, 0.99), max_steps=200)
    settings = bench.BenchSettings(
        models=("tiny-llama",), lengths=(3,), texts=2, recipe=recipe, device="cpu"
    )
    return bench.run_bench(settings)


def test_record_and_table(record: dict, tmp_path: Path) -> None:
    bench.write(record, tmp_path / "out" / "bench.json")
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
    assert {b for _, _, b in rates} == {1, 4, 16, 64}
    for t in case["timings"]:
        assert t["tokens_per_second"] == pytest.approx(t["batch"] * 3 / t["seconds"])
        assert t["quartiles"][0] <= t["seconds"] <= t["quartiles"][1]
        own = t["method"] == "engine static-KV"
        assert (t["bandwidth_share"] is not None and t["bandwidth_share"] > 0) == own
    assert ("engine static-KV", "float32", 1) in rates
    lines = bench.table(record).splitlines()
    assert lines[0].split()[:3] == ["model", "N", "exact"]
    assert lines[1].split()[:3] == ["tiny-llama", "3", "2/2"]
    assert 1 < case["ceiling"] <= 3


def test_ceiling() -> None:
    peak = {"flops_per_second": 989e12, "bytes_per_second": 4.8e12}  # an H200, bf16
    assert round(bench._ceiling(1024, torch.bfloat16, peak)) == 206
    assert bench._ceiling(128, torch.bfloat16, peak) == 128
    assert round(bench._ceiling(1024, torch.float32, peak)) == 412


def test_baseline_generates_what_it_is_asked_for(tiny_lm: FrozenLM) -> None:
    generate = Generate(tiny_lm, torch.float32)
    dynamic, static = (generate(5, 2, cache) for cache in ("dynamic", "static"))
    assert dynamic.shape == static.shape == (2, 5)
    assert torch.equal(dynamic, static)
    assert torch.equal(Engine(tiny_lm, torch.float32)(5, 2), dynamic)


def test_random_weights_are_measured_for_speed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from prototok import shapes

    small = shapes._pythia(64, 1, 2)
    monkeypatch.setitem(shapes.SHAPES, "pythia-160m", lambda: small)
    settings = bench.BenchSettings(shape="pythia-160m", lengths=(4,), texts=2, device="cpu")
    (case,) = bench.run_bench(settings)["cases"]
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
    from prototok.shapes import random_model

    model = random_model(shape, torch.device("meta"), torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6) == millions


def test_figure_is_well_formed_and_escaped() -> None:
    svg = log_bars("a < b", "x & y", [Bar("g", "<l>", 0.5, "n"), Bar("g", "m", 2000.0, "2,000")])
    root = ElementTree.fromstring(svg)
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a < b" in texts and "<l>" in texts and "1,000" in texts
    widths = [float(r.get("width")) for r in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert widths[0] < widths[1]
