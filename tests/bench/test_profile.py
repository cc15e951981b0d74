"""The profiler's commands: what they print and write, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prototok import FrozenLM, Recipe, cli, fast_fit
from prototok.bench.profile import Capture, ProfiledSteps, Work, profile, step_range


def test_step_range() -> None:
    assert step_range("20:30") == (20, 30)
    for wrong in ("20", "30:20", "5:5", ":3", "a:b", "-1:4", ""):
        with pytest.raises(ValueError, match=r"^profile: .* is not a range a:b"):
            step_range(wrong)


def test_the_command_prints_a_table_and_writes_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--length", "4", "--batch", "2", "--steps", "1:3", "--device", "cpu"]
    with pytest.raises(SystemExit) as left:
        cli.main(["profile", "fit", *options])
    assert left.value.code == 0
    printed = capsys.readouterr()
    for name in ("forward", "head", "backward", "update"):
        (line,) = [x for x in printed.out.splitlines() if x.split()[:1] == [name]]
        assert line.split()[-1] == "2"  # two steps, not the one that warmed up
    assert "ms a step" in printed.err
    events = json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "forward" and event["ph"] == "X" for event in events) == 2


def test_bad_arguments_are_one_sentence(capsys: pytest.CaptureFixture) -> None:
    for arguments, says in (
        (["profile", "sing"], "prototok: what: 'sing' is not 'fit' or 'decode'"),
        (["profile", "--steps", "3"], "prototok: profile: '3' is not a range"),
        (["profile", "--batch", "0"], "prototok: batch: 0 is not a positive integer"),
        (["bench", "--profile", "9:3"], "prototok: profile: '9:3' is not a range"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main([*arguments, "--device", "cpu"])
        assert left.value.code == 2
        assert capsys.readouterr().err.startswith(says)


def test_decoding_is_profiled(small_lm: FrozenLM) -> None:
    seconds, table = profile(small_lm, Work("decode", length=4, batch=2), (1, 4))
    assert 0 < seconds < 10
    (line,) = [x for x in table.splitlines() if x.split()[:1] == ["decode"]]
    assert line.split()[-1] == "3"


@pytest.mark.parametrize("end", [5, 10**6])
def test_steps_of_a_fit_are_profiled(small_lm: FrozenLM, end: int) -> None:
    """From step a to step b, or to the end where the fit has fewer."""
    watched = ProfiledSteps(Capture(small_lm.device, None), (3, end))
    ids = torch.randint(small_lm.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(max_steps=8, margin=1e9)
    fast_fit(small_lm, ids, recipe=recipe, callback=watched, progress=False)
    watched.close()
    (line,) = [x for x in watched.capture.report(200).splitlines() if x.split()[:1] == ["update"]]
    assert line.split()[-1] == ("2" if end == 5 else "5")  # of eight, three before a


def test_a_fit_that_ends_before_step_a_leaves_nothing(small_lm: FrozenLM) -> None:
    watched = ProfiledSteps(Capture(small_lm.device, None), (50, 60))
    fast_fit(small_lm, [[1, 2]], recipe=Recipe(max_steps=3), callback=watched, progress=False)
    watched.close()
    assert watched.capture.report() == "nothing was profiled: the work ended before its first step"


def test_every_kernel_of_ours_is_in_the_ncu_line() -> None:
    root = Path(__file__).resolve().parents[2]
    sources = [p.read_text() for p in (root / "kernels" / "prototok_kernels").glob("*.py")]
    named = {
        line.split("def ")[1].split("(")[0]
        for source in sources
        for before, line in zip(source.splitlines(), source.splitlines()[1:], strict=False)
        if before.strip() == "@triton.jit" and "kernel(" in line
    }
    assert len(named) >= 5
    text = (root / "docs" / "profiling.md").read_text()
    missing = {name for name in named if name not in text}
    assert not missing, missing
