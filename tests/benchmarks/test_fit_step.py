"""The fit-step benchmark runs, gates on correctness and reports ratios."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import prototok
from support import BENCHMARKS, small_llama


@pytest.fixture
def fit_step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fit_step

    return fit_step


def test_reports_ratios_on_the_smallest_preset(fit_step, monkeypatch, capsys, tmp_path):
    out = tmp_path / "record.json"
    options = ["--rounds", "2", "--seconds", "0.05", "--flat-steps", "10", "--out", str(out)]
    script = str(BENCHMARKS / "fit_step.py")
    monkeypatch.setattr(sys, "argv", [script, "--preset", "smoke", "--device", "cpu", *options])
    fit_step.main()
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert record == json.loads(out.read_text())
    rates = record["text_steps_per_second"]
    assert set(rates) == {"ours", "batched", "paper"}
    for other in ("batched", "paper"):
        low, middle, high = record["ratio"][other]
        assert 0 < low <= middle <= high
    # two blocks of 4 · 64² for the attention and 8 · 64² for the MLP, and the head
    assert record["flops_per_text_step"] == 4 * 8 * (2 * 12 * 64**2 + 50304 * 64)
    assert record["flatness"]["steps"] == 10


def test_refuses_a_step_that_computes_something_else(fit_step, monkeypatch):
    device = torch.device("cpu")
    model, _ = fit_step.model_of("smoke", None, device)
    lm = fit_step.prototok.load(model, device=device, dtype=model.dtype)
    targets = torch.randint(lm.vocab_size, (2, 8))
    runner = fit_step.engine(lm, targets)
    e, m = (bank.values[:2].clone() for bank in runner.slots.banks)
    plain = fit_step.PlainLoop(model, targets.flip(0), e, m)
    with pytest.raises(SystemExit, match="differs from the plain loop"):
        fit_step.gate(runner, plain, model.dtype)


def test_says_what_a_prefix_costs(fit_step, monkeypatch, capsys, tmp_path):
    out = tmp_path / "record.json"
    options = ["--rounds", "2", "--seconds", "0.05", "--flat-steps", "0", "--out", str(out)]
    options += ["--preset", "smoke", "--device", "cpu", "--prefix", "2"]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "fit_step.py"), *options])
    fit_step.main()  # behind the gate: the plain loop has the tokens in its input
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(record["text_steps_per_second"]) == {"ours", "batched", "paper", "bare"}
    assert record["prefix"] == 2 and "first_layer" in record["plan"]
    low, middle, high = record["prefix_cost"]
    assert -1 < low <= middle <= high


def test_the_slots_are_read_when_the_runner_is_through(fit_step, monkeypatch):
    """On CUDA they are written on the runner's stream and read on another."""
    waited = []
    real = fit_step.StepRunner.finish
    monkeypatch.setattr(
        fit_step.StepRunner, "finish", lambda runner: (waited.append(runner), real(runner))
    )
    lm = prototok.load(small_llama(), device="cpu", dtype="float32")
    runner = fit_step.engine(lm, torch.zeros(2, 5, dtype=torch.int64))
    assert waited == [runner]


def test_the_peak_of_memory_sees_a_graphs_own_pool(fit_step, monkeypatch):
    """Stand-in allocator: a captured graph keeps 70 bytes reserved that nobody has allocated."""
    state = {"allocated": 100, "reserved": 130, "peak": 500, "runs": 0}

    def run():
        state["runs"] += 1
        if state["runs"] == 3:  # captured
            state["reserved"] += 70
        state["peak"] = max(state["peak"], state["reserved"])

    for name, value in {
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: state["reserved"],
        "memory_allocated": lambda device: state["allocated"],
        "reset_peak_memory_stats": lambda device: state.update(peak=state["reserved"]),
        "max_memory_reserved": lambda device: state["peak"],
        "max_memory_allocated": lambda device: state["allocated"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert fit_step.peak_memory(run, torch.device("cuda")) == 170


def test_a_record_is_made_without_git(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import record

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "fit_step.py")])
    assert record.provenance()["commit"] == "unknown"
