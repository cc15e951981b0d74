"""Models as a sweep names them: `NAME`, `NAME@REVISION`, `random:NAME`.

`EleutherAI/pythia-160m@step1000` is a checkpoint by its revision. `random:NAME` is a control: it
has the shape of NAME and random weights, NAME a published shape of `prototok.model.shapes` or a
model of the hub.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import hash_of_tokenizer
from prototok.model.load import load, load_tokenizer, path_of
from prototok.model.shapes import SHAPES, random_model

_RANDOM = "random:"


def split(model: str) -> tuple[str, str | None, bool]:
    """Return name, revision, and True if the weights are random."""
    is_random = model.startswith(_RANDOM)
    name = model.removeprefix(_RANDOM)
    if Path(name).exists():
        return name, None, is_random
    name, at, revision = name.partition("@")
    if not name or (at and not revision):
        raise ValueError(f"model: {model!r} is not NAME, NAME@REVISION or random:NAME")
    return name, revision or None, is_random


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model as a sweep names it, without its weights."""
    name, revision, _ = split(model)
    return load_tokenizer(name, revision)


def load_model(model: str, device: str = "auto", dtype: str = "auto") -> FrozenLM:
    """Load a model as a sweep names it; results carry that name."""
    name, revision, is_random = split(model)
    if not is_random:
        lm = load(name, device, dtype, revision)
        return dataclasses.replace(lm, identity=dataclasses.replace(lm.identity, name=model))
    if name in SHAPES:
        lm = load(random_model(name, torch.device("cpu"), torch.float32), device, dtype)
        tokenizer = None
    else:
        config = AutoConfig.from_pretrained(path_of(name), revision=revision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: Any = AutoModelForCausalLM.from_config(config)
        lm = load(made.eval(), device, dtype)
        tokenizer = load_tokenizer(name, revision)
    identity = dataclasses.replace(
        lm.identity, name=model, tokenizer_hash=hash_of_tokenizer(tokenizer)
    )
    return dataclasses.replace(lm, identity=identity, tokenizer=tokenizer)
