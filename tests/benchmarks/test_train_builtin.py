"""The training script of the built-in models: resumable, seeded, and honest about its settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import prototok

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "train_builtin.py"
HELD_OUT = Path(prototok.__file__).parent / "models" / "tiny-llama" / "held_out.txt"
SMALL = [
    "--width", "32", "--layers", "1", "--vocab", "300", "--context", "16", "--batch", "2",
    "--tokens", "192", "--held-out", "0.3", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    text = HELD_OUT.read_text()
    for i in range(3):
        paragraph = text[i * 3000 : (i + 1) * 3000]
        (folder / f"{i}.txt").write_text(paragraph + "\n\n" + paragraph)
    return folder


def train(books: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "tiny-neox", "--text", books, "--out", out, *SMALL]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_interrupted_and_resumed_is_the_same_run(books: Path, tmp_path: Path) -> None:
    whole = train(books, tmp_path / "a" / "m")
    assert whole.returncode == 0, whole.stderr
    stopped = train(books, tmp_path / "b" / "m", "--stop-after", "4")
    assert stopped.returncode == 0 and not (tmp_path / "b" / "m").exists()
    other = train(books, tmp_path / "b" / "m", "--seed", "1")
    assert other.returncode == 1 and "holds a run with other settings" in other.stderr
    resumed = train(books, tmp_path / "b" / "m")
    assert "step 4/6" in resumed.stdout
    one, two = (load_file(tmp_path / x / "m" / "model.safetensors") for x in "ab")
    assert all(torch.equal(one[k], two[k]) for k in one)

    lm = prototok.load(tmp_path / "a" / "m", device="cpu")
    record = json.loads((tmp_path / "a" / "m" / "training.json").read_text())
    card = (tmp_path / "a" / "m" / "README.md").read_text()
    assert f"{record['held_out_loss']:.3f} nats per token" in card
    assert not set(record["held_out_files"]) & set(record["train_files"])
    text = (tmp_path / "a" / "m" / "held_out.txt").read_text()
    assert text in (books / record["held_out_files"][0]).read_text()
    assert lm.decode_ids(lm.encode(text)) == text


def test_too_few_files(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("one")
    run = train(tmp_path, tmp_path / "m")
    assert run.returncode == 1 and "at least two .txt files are needed" in run.stderr
