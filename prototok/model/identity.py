"""The identity of a model: its name, its revision and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FINGERPRINT_SAMPLES = 64


@dataclass(frozen=True)
class ModelIdentity:
    """The frozen model that proto-tokens belong to; stored with them."""

    name: str
    revision: str | None  # commit of the hub repository, where the model came from one
    family: str
    hidden_size: int
    vocab_size: int
    fingerprint: str  # of the weights, the same in every dtype the model is loaded in
    tokenizer_hash: str | None


@torch.no_grad()
def fingerprint_of(source: PreTrainedModel) -> str:
    """Hash shapes and a few elements of every weight, rounded to bfloat16.

    The rounding makes it the same for a checkpoint and for its bfloat16 or float32 copies.
    """
    digest = hashlib.sha256()
    for key, parameter in sorted(source.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _FINGERPRINT_SAMPLES)].bfloat16().float().cpu()
        digest.update(f"{key} {tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Hash a tokenizer's vocabulary and rules; None where there is no tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
