"""Which model proto-tokens belong to: its name, its revision and a fingerprint of what it computes.

A fingerprint is of every weight and of the settings that weights do not show. Files made before
hold one of 64 samples a weight; it has no version in front, and is compared as it was made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_VERSION = "2-"
_SAMPLES = 64
_CHUNK = 1 << 22  # elements rounded and hashed at once

# What of a config changes a forward and leaves the weights' shapes alone, by its name. A list of
# what does not would make a new transformers with a new setting refuse the files of an old one.
_SETTINGS = re.compile(
    r"rope|rotary|position|_eps$|epsilon|_act$|activation|window|layer_types|_heads$|head_dim|"
    r"head_size|parallel|scal|soft_?cap|multiplier|norm|causal|is_decoder|per_tok|top_?k|alibi"
)


@dataclass(frozen=True)
class ModelIdentity:
    """The frozen model that proto-tokens belong to; stored with them."""

    name: str
    revision: str | None  # commit of the hub repository, where the model came from one
    family: str
    hidden_size: int
    vocab_size: int
    fingerprint: str  # of weights and settings, the same in every dtype the model is loaded in
    tokenizer_hash: str | None


@torch.no_grad()
def fingerprint_of(source: PreTrainedModel, changed: str = "") -> str:
    """Hash every weight, rounded to bfloat16, and the settings that change a forward.

    The rounding makes it the same for a checkpoint and for its bfloat16 or float32 copies. Buffers
    that a checkpoint holds count as weights do, and rotary frequencies where they are not those of
    the config. `changed` says what else the model does that neither weights nor config show.
    """
    stored = source.state_dict().keys()
    tensors: list[tuple[str, Tensor]] = sorted(source.named_parameters())
    tensors += sorted((key, b) for key, b in source.named_buffers() if key in stored)
    with ThreadPoolExecutor() as pool:  # hashing and rounding both let other threads run
        digests = list(pool.map(_digest, (tensor for _, tensor in tensors)))
    total = hashlib.sha256()
    for (key, tensor), digest in zip(tensors, digests, strict=True):
        total.update(f"{key} {tuple(tensor.shape)}".encode() + digest)
    for key, frequencies in _own_frequencies(source):
        total.update(key.encode() + frequencies.detach().double().cpu().numpy().tobytes())
    total.update(json.dumps(_settings(source.config), sort_keys=True, default=str).encode())
    total.update(changed.encode())
    return _VERSION + total.hexdigest()[:32]


@torch.no_grad()
def sampled_fingerprint_of(source: PreTrainedModel) -> str:
    """Hash shapes and 64 elements of every weight: quick, and what the files made before hold."""
    digest = hashlib.sha256()
    for key, parameter in sorted(source.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].bfloat16().float().cpu()
        digest.update(f"{key} {tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def is_sampled(fingerprint: str) -> bool:
    """Return True for a fingerprint that was made before every weight counted."""
    return not fingerprint.startswith(_VERSION)


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Hash a tokenizer's vocabulary and rules; None where there is no tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@torch.no_grad()
def _digest(parameter: Tensor) -> bytes:
    digest = hashlib.sha256()
    for part in parameter.detach().flatten().split(_CHUNK):
        if not part.is_floating_point():
            digest.update(part.cpu().contiguous().numpy())
            continue
        digest.update(part.bfloat16().cpu().contiguous().view(torch.int16).numpy())
    return digest.digest()


def _own_frequencies(source: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield rotary frequencies that are not what the config makes, but for their rounding."""
    for name, module in source.named_modules():
        held = getattr(module, "inv_freq", None)
        config = getattr(module, "config", None)
        if not isinstance(held, Tensor) or not isinstance(config, PreTrainedConfig):
            continue
        kind: Any = type(module)
        try:
            with torch.device("cpu"):
                made = kind(config=config).inv_freq
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError):
            continue  # it is not made of its config alone
        if not torch.equal(made.to(held.dtype), held.detach().cpu()):
            yield f"{name}.inv_freq", held


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings that differ from those of the config's class, named by `_SETTINGS`."""
    text = config.get_text_config()
    usual = type(text)().to_dict()
    return {
        key: value
        for key, value in text.to_dict().items()
        if _SETTINGS.search(key) and (key not in usual or usual[key] != value)
    }
