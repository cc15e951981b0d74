"""The formats: each writes rows to a folder and returns the name of every row there."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from prototok.exporting.rows import Export

_SCRIPTS = Path(__file__).parent / "scripts"


def _npz(made: Export, folder: Path) -> list[str]:
    names = _names(made)
    arrays = {name: row.inputs.numpy() for name, row in zip(names, made.rows, strict=True)}
    np.savez(folder / "inputs.npz", **arrays)  # type: ignore[arg-type]
    return names


def _transformers(made: Export, folder: Path) -> list[str]:
    names = _names(made)
    tensors = {n: row.inputs.contiguous() for n, row in zip(names, made.rows, strict=True)}
    save_file(tensors, folder / "inputs.safetensors")
    shutil.copy(_SCRIPTS / "with_transformers.py", folder)
    return names


def _peft(made: Export, folder: Path) -> list[str]:
    """Prompt-tuning adapters whose virtual tokens are the whole input."""
    for name, row in zip(_names(made), made.rows, strict=True):
        adapter = folder / name
        adapter.mkdir()
        config = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": made.model.name,
            "revision": made.model.revision,
            "inference_mode": True,
            "num_virtual_tokens": len(row.inputs),
            "token_dim": made.model.hidden_size,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }
        (adapter / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
        tensors = {"prompt_embeddings": row.inputs.contiguous()}
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(_SCRIPTS / "with_peft.py", folder)
    return _names(made)


def _vllm(made: Export, folder: Path) -> list[str]:
    """Bodies for POST /v1/completions of a server with --enable-prompt-embeds."""
    dtype = getattr(torch, made.dtype)
    names = [f"{name}.json" for name in _names(made)]
    for name, row in zip(names, made.rows, strict=True):
        stored = io.BytesIO()
        torch.save(row.inputs.to(dtype).contiguous(), stored)
        body = {
            "model": made.model.name,
            "prompt_embeds": base64.b64encode(stored.getvalue()).decode(),
            "max_tokens": row.tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        (folder / name).write_text(json.dumps(body) + "\n")
    return names


def _sglang(made: Export, folder: Path) -> list[str]:
    """Bodies for POST /generate of a server with --disable-radix-cache."""
    names = [f"{name}.json" for name in _names(made)]
    for name, row in zip(names, made.rows, strict=True):
        body = {
            "input_embeds": row.inputs.tolist(),
            "sampling_params": {"temperature": 0, "max_new_tokens": row.tokens, "ignore_eos": True},
        }
        (folder / name).write_text(json.dumps(body) + "\n")
    return names


def _llamacpp(made: Export, folder: Path) -> list[str]:
    """What `llama_batch.embd` points to: positions × d little-endian float32, nothing else."""
    names = [f"{name}.f32" for name in _names(made)]
    for name, row in zip(names, made.rows, strict=True):
        (folder / name).write_bytes(row.inputs.numpy().astype("<f4").tobytes())
    return names


def _names(made: Export) -> list[str]:
    return [f"{i:05d}" for i in range(len(made.rows))]


FORMATS: dict[str, Callable[[Export, Path], list[str]]] = {
    "npz": _npz,
    "transformers": _transformers,
    "peft": _peft,
    "vllm": _vllm,
    "sglang": _sglang,
    "llamacpp": _llamacpp,
}

# What a format cannot carry, and why.
UNREADABLE = {
    ("vllm", "one forward"): "vLLM gives no predictions at the positions of prompt_embeds",
    ("sglang", "one forward"): "SGLang is asked for the tokens it generates behind input_embeds",
    ("peft", "generate"): "PEFT's virtual tokens are read at their own positions here",
}
