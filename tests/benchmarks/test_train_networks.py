"""The training script of the networks that come with the built-in models: it goes on."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import prototok
from prototok import Encoder, LearnedOptimizer
from prototok.model.load import path_of

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "train_networks.py"


def test_it_goes_on_and_writes_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "tiny-neox"
    place.mkdir()
    np.save(place / "samples.npy", np.random.default_rng(0).integers(0, 4096, (4, 16)))
    books = json.loads((Path(path_of("tiny-neox")) / "training.json").read_text())["train_files"]
    for name in books:
        (tmp_path / name).write_text("It was a bright cold day in April. " * 20)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def train(*arguments: str) -> None:
        given = [*arguments, "--train-text", tmp_path, "--folder", tmp_path, "--out", tmp_path]
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, given)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    train("tiny-neox", "--steps", "2", "3", "4", "0")
    made = LearnedOptimizer.load(place / "optimizer.safetensors")
    assert made.start.provenance["steps"] == "4" and made.start.provenance["lengths"] == "8"
    train("tiny-neox", "--steps", "2", "3", "4", "5")
    made = LearnedOptimizer.load(place / "optimizer.safetensors")
    assert made.start.provenance["steps"] == "5" and made.start.provenance["lengths"] == "4, 8, 12"
    assert "Encoder" in made.start.provenance["init"]
    assert made.model.fingerprint == prototok.load("tiny-neox").identity.fingerprint
    encoder = Encoder.load(place / "encoder.safetensors")
    assert encoder.start.provenance["steps"] == "2" and encoder.longest == 8
    for path in place.glob("*r.safetensors"):
        path.unlink()
    train("tiny-neox", "--steps", "2", "3", "4", "5")  # nothing is left to do
    for before in (made, encoder):
        again = type(before).load(place / before._file)
        assert all(torch.equal(again.weights[n], tensor) for n, tensor in before.weights.items())
    with pytest.raises(ValueError, match="is of a training with steps"):
        train("tiny-neox", "--steps", "2", "4", "4", "5")
    with pytest.raises(SystemExit):
        train("pythia")
