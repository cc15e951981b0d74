"""Exported vectors give the same ids in the tools they are for, with no prototok in sight."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import prototok
from prototok import FitResult, FrozenLM, autoregressive
from prototok.cli import main
from prototok.exporting.formats import FORMATS
from prototok.results.mem_fit import MemFit

MODEL = Path(prototok.__file__).parent / "models" / "tiny-llama"
TEXTS = ["Call me Ishmael.", "It was the best of times"]


def fit_of(lm: FrozenLM, prefix: str | None, arrangement: str) -> FitResult:
    found = prototok.fast_fit(lm, TEXTS, seeds=2, prefix=prefix, arrangement=arrangement)
    assert bool(found.best().exact.all())
    return found


@pytest.fixture(scope="module", params=[(None, "e m*"), (None, "e m*+1")])
def fit(request: pytest.FixtureRequest, tiny_lm: FrozenLM) -> FitResult:
    return fit_of(tiny_lm, *request.param)


@pytest.fixture(scope="module")
def behind(tiny_lm: FrozenLM) -> FitResult:
    return fit_of(tiny_lm, " the", "e m*")


@pytest.fixture(scope="module")
def mem(tiny_lm: FrozenLM) -> MemFit:
    found = autoregressive.fit(tiny_lm, TEXTS, k=1, length=3)
    assert bool(found.exact.all())
    return found


def plain() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def manifest(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text())


def forward_ids(inputs: torch.Tensor, row: dict) -> list[int]:
    assert len(inputs) == row["positions"]
    with torch.no_grad():
        logits = plain()(inputs_embeds=inputs[None]).logits[0]
    return logits[row["read_from"] :][: row["tokens"]].argmax(-1).tolist()


def generated_ids(inputs: torch.Tensor, tokens: int) -> list[int]:
    made = plain().generate(
        inputs_embeds=inputs[None].float(), attention_mask=torch.ones(1, len(inputs)),
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return made[0].tolist()


def test_a_prefix_is_part_of_the_input(behind: FitResult, tmp_path: Path) -> None:
    folder = prototok.export(behind, tmp_path / "out", "npz")
    for row, target in zip(manifest(folder)["rows"], behind.targets, strict=True):
        inputs = np.load(folder / "inputs.npz")[row["name"]]
        assert row["read_from"] == 1 and row["positions"] == 1 + len(target)
        assert forward_ids(torch.tensor(inputs), row) == target.tolist()


def test_peft_adapters_give_the_text(fit: FitResult, tmp_path: Path) -> None:
    folder = prototok.export(fit, tmp_path / "out", "peft")
    for row, target in zip(manifest(folder)["rows"], fit.targets, strict=True):
        model = PeftModel.from_pretrained(plain(), str(folder / row["name"]))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[5]])).logits[0]
        ids = logits[row["read_from"] :][: row["tokens"]].argmax(-1)
        assert torch.equal(ids, target) and row["ids"] == target.tolist()
        config = json.loads((folder / row["name"] / "adapter_config.json").read_text())
        assert config["num_virtual_tokens"] == row["positions"]


@pytest.mark.parametrize("format", ["npz", "llamacpp"])
def test_raw_arrays_are_whole_inputs(fit: FitResult, format: str, tmp_path: Path) -> None:
    folder = prototok.export(fit, tmp_path / "out", format)
    for row, target in zip(manifest(folder)["rows"], fit.targets, strict=True):
        if format == "npz":
            inputs = np.load(folder / "inputs.npz")[row["name"]]
        else:
            inputs = np.fromfile(folder / row["name"], "<f4").reshape(row["positions"], -1)
        assert forward_ids(torch.tensor(inputs), row) == target.tolist()


@pytest.mark.parametrize("format", ["transformers", "peft"])
def test_the_program_beside_the_vectors_needs_no_prototok(
    behind: FitResult, format: str, tmp_path: Path
) -> None:
    folder = prototok.export(behind, tmp_path / "out", format)
    run = subprocess.run(
        [sys.executable, "-P", folder / f"with_{format}.py", MODEL],
        cwd=tmp_path, env={"PATH": "", "PYTHONUTF8": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for text in TEXTS:
        assert text in run.stdout
    lengths = behind.tokens.lengths.tolist()
    assert all(f"# {n} of {n} tokens right" in run.stdout for n in lengths)


def test_mem_vectors_generate_with_transformers(mem: MemFit, tmp_path: Path) -> None:
    folder = prototok.export(mem, tmp_path / "out")
    run = subprocess.run(
        [sys.executable, folder / "with_transformers.py", MODEL],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("# 3 of 3 tokens right") == 2


def test_requests_for_servers_hold_the_vectors(mem: MemFit, tmp_path: Path) -> None:
    """Against the documented schemas; no server runs here."""
    folder = prototok.export(mem, tmp_path / "vllm", "vllm")
    for row, target in zip(manifest(folder)["rows"], mem.targets, strict=True):
        body = json.loads((folder / row["name"]).read_text())
        assert set(body) == {"model", "prompt_embeds", "max_tokens", "temperature", "ignore_eos"}
        stored = io.BytesIO(base64.b64decode(body["prompt_embeds"]))
        inputs = torch.load(stored, weights_only=True)
        assert inputs.shape == (1, 192) and str(inputs.dtype).endswith(mem.provenance["dtype"])
        assert generated_ids(inputs, body["max_tokens"]) == target.tolist()
    folder = prototok.export(mem, tmp_path / "sglang", "sglang")
    for row, target in zip(manifest(folder)["rows"], mem.targets, strict=True):
        body = json.loads((folder / row["name"]).read_text())
        assert set(body) == {"input_embeds", "sampling_params"}
        inputs = torch.tensor(body["input_embeds"])
        made = generated_ids(inputs, body["sampling_params"]["max_new_tokens"])
        assert made == target.tolist()


def test_what_cannot_be_carried_is_refused_and_leaves_nothing(
    fit: FitResult, mem: MemFit, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for one, format, says in (
        (fit, "vllm", "'vllm' cannot carry these vectors: vLLM gives no predictions"),
        (fit, "sglang", "'sglang' cannot carry these vectors"),
        (mem, "peft", "'peft' cannot carry these vectors"),
        (fit, "petf", "'petf' is not one of npz, .*; did you mean 'peft'?"),
        ([1], "npz", "fit: list is not a FitResult, ProtoTokens or MemFit"),
        (replace(mem, first="given"), "npz", "behind these .mem. vectors t_1 is given"),
    ):
        with pytest.raises(ValueError, match=says):
            prototok.export(one, out, format)  # type: ignore[arg-type]
        assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something"):
        prototok.export(fit, out)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_an_export_cut_short_leaves_nothing(
    fit: FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(made: object, folder: Path) -> list[str]:
        (folder / "half").mkdir()
        (folder / "half" / "file").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(FORMATS, "npz", full)
    with pytest.raises(OSError, match="No space"):
        prototok.export(fit, tmp_path / "out", "npz")
    assert not (tmp_path / "out").exists()


def test_the_command_reads_every_kind(
    fit: FitResult, mem: MemFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit.save("tokens")
    fit.tokens.save("tokens.safetensors")
    mem.save("mem.safetensors")
    for place, kind, rows in (
        ("tokens", "one forward", 2), ("tokens.safetensors", "one forward", 4),
        ("mem.safetensors", "generate", 2),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(["export", place, "-o", f"out-{place}", "--format", "npz"])
        assert not ended.value.code
        made = manifest(tmp_path / f"out-{place}")
        assert (made["kind"], len(made["rows"])) == (kind, rows)
        assert made["model"]["name"] == "tiny-llama"
    with pytest.raises(SystemExit) as ended:
        main(["export", "nowhere", "-o", "out"])
    assert ended.value.code == 2
