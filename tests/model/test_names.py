"""Names of models: a slip is answered at once, and a folder needs no more than it must have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

import prototok
from prototok.model.load import BUILT_IN, dtype_of, load_tokenizer, path_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["tiny-lama", "tinyllama", "tiny_llama", "tiny-neo", "Tiny-NeoX"])
def test_a_slip_in_a_built_in_name_asks_nobody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*arguments: object, **options: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(HfApi, "model_info", asked)
    monkeypatch.setattr("prototok.model.load.hf_hub_download", asked)
    for call in (prototok.load, load_tokenizer):
        with pytest.raises(ValueError, match=r"did you mean 'tiny-(llama|neox)'\?"):
            call(name)


def test_a_slip_in_a_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pythia-160m").mkdir()
    (tmp_path / "pythia-160m" / "config.json").write_text("{}")

    def none(*arguments: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "model_info", none)
    with pytest.raises(ValueError, match=r"did you mean 'pythia-160m'\?"):
        prototok.load("pythia160m")
    with pytest.raises(ValueError, match=r"could not be had from the hub \(no network\)"):
        prototok.load("some/thing")


def test_a_folder_with_tokenizer_json_alone(tmp_path: Path) -> None:
    source = Path(path_of(BUILT_IN[0]))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(source / name, tmp_path / name)
    lm = prototok.load(tmp_path, device="cpu")
    ids = lm.encode("Call me Ishmael.")
    assert ids == prototok.load(BUILT_IN[0], device="cpu").encode("Call me Ishmael.")
    assert lm.decode_ids(ids) == "Call me Ishmael."
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("short", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32),
     ("half", torch.float16), ("bfloat16", torch.bfloat16)],
)  # fmt: skip
def test_short_names_of_dtypes(short: str, dtype: torch.dtype) -> None:
    assert dtype_of(short, CPU) == dtype
