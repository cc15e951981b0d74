"""The training script of the optimisers that come with the built-in models: it goes on."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import prototok
from prototok import LearnedOptimizer

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "train_optimizers.py"


def test_it_goes_on_and_writes_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = tmp_path / "tiny-neox" / "samples.npy"
    samples.parent.mkdir()
    np.save(samples, np.random.default_rng(0).integers(0, 4096, (4, 16)))
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def train(*arguments: str) -> None:
        given = [*arguments, "--folder", tmp_path, "--out", tmp_path]
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, given)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    train("tiny-neox", "--steps", "3")
    path = tmp_path / "tiny-neox" / "optimizer.safetensors"
    made = LearnedOptimizer.load(path)
    assert made.start.provenance["steps"] == "3" and made.start.provenance["lengths"] == "8"
    assert made.model.fingerprint == prototok.load("tiny-neox").identity.fingerprint
    path.unlink()
    train("tiny-neox", "--steps", "3")  # nothing is left to do
    again = LearnedOptimizer.load(path)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in made.weights.items())
    with pytest.raises(ValueError, match="is of a training with steps"):
        train("tiny-neox", "--steps", "4")
    with pytest.raises(SystemExit):
        train("pythia")
