"""The benchmark of learned optimisers: no cell hides another, and training is counted whole."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support import BENCHMARKS


def test_cells_are_told_apart_and_count_what_training_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    amortised = importlib.import_module("amortised")
    monkeypatch.setattr(amortised, "RESULTS", tmp_path)
    np.save(tmp_path / "samples.npy", np.random.default_rng(0).integers(0, 4096, (4, 16)))
    story = tmp_path / "story.txt"
    story.write_text("The cat sat down. A dog ran off. Then it was dark.", encoding="utf-8")

    def run(*arguments: object) -> dict[str, dict]:
        given = ["tiny-neox", "--lengths", 3, "--count", 3, "--folder", tmp_path, *arguments]
        monkeypatch.setattr("sys.argv", ["amortised.py", *map(str, given)])
        monkeypatch.setattr(amortised, "provenance", dict)
        amortised.main()
        cells: dict[str, dict] = json.loads((tmp_path / "amortised.json").read_text())["cells"]
        return cells

    first = run("--steps", 2, "--positions", 24)
    (learned,) = (cell for cell in first.values() if "trained" in cell)
    assert learned["training_positions"] == 2 * 24 and learned["texts"] == 3
    assert len(first) == 2
    begin = ["--begin", tmp_path / "optimizer-3-None-2-0.safetensors"]
    more = run("--steps", 3, "--positions", 48, *begin)
    begun = more.keys() - first.keys()
    assert [more[name]["training_positions"] for name in begun] == [2 * 24 + 3 * 48]
    assert all(more[name]["steps"] == cell["steps"] for name, cell in first.items())

    third = run("--steps", 2, "--positions", 24, "--begin",
                tmp_path / "optimizer-3-None-3-0-begun.safetensors")  # fmt: skip
    (twice,) = (third[name] for name in third.keys() - more.keys())
    assert twice["training_positions"] is None  # what came before that is not known

    fourth = run("--steps", 2, "--positions", 24, "--patience", 1)  # a single update
    (hasty,) = (fourth[name] for name in fourth.keys() - third.keys())
    assert hasty["patience"] == 1 and hasty["trained"] == learned["trained"]
    assert hasty["steps"] != learned["steps"]
    assert all(fourth[name]["steps"] == cell["steps"] for name, cell in third.items())

    apart = tmp_path / "apart.json"
    assert run("--steps", 2, "--positions", 24, "--out", apart) == fourth  # nothing is added here
    assert json.loads(apart.read_text())["cells"] == {
        name: cell for name, cell in fourth.items() if name in first
    }
    run("--shipped", "--random")
    others = run("--shipped", "--text", story)
    found = {name.partition(", on ")[2] for name in others.keys() - fourth.keys()}
    assert found == {"random ids", "story.txt"}
    assert all(others[name] == cell for name, cell in fourth.items())


def test_texts_of_training_are_the_books_of_a_model_that_says_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    amortised = importlib.import_module("amortised")
    for name in ("read.txt", "held_out.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    model = tmp_path / "model"
    model.mkdir()
    asked = argparse.Namespace(train_text=tmp_path, train_tokens=2**10)
    lm = SimpleNamespace(
        identity=SimpleNamespace(name=str(model)), encode=lambda text: list(text.encode())
    )

    def found() -> list[bytes]:
        return [bytes(text.tolist()) for text in amortised.training_texts(lm, asked)]

    assert found() == [b"held_out.txt", b"read.txt"]
    (model / "training.json").write_text('{"train_files": ["read.txt"]}', encoding="utf-8")
    assert found() == [b"read.txt"]
