"""Provenance of a result: settings, model, kernels and versions, as strings in its file."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
import transformers
from torch import Tensor

from prototok.common.version import VERSION
from prototok.model.frozen_lm import FrozenLM
from prototok_kernels.plan import Plan


def as_json(settings: Any) -> str:
    """Return a dataclass, such as a recipe, as JSON."""
    return json.dumps(dataclasses.asdict(settings))


def versions() -> dict[str, str]:
    """Return the versions that decide a result's last bits."""
    return {
        "prototok": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def arithmetic(lm: FrozenLM) -> dict[str, str]:
    """Return the dtype of a model and the kind of device that it is on."""
    return {"dtype": str(lm.dtype).removeprefix("torch."), "device": lm.device.type}


def provenance_of(lm: FrozenLM, recipe: Any, seeds: list[int], plan: Plan) -> dict[str, str]:
    """Return what a fit's file says of how it was made."""
    return {
        "recipe": as_json(recipe),
        "seeds": json.dumps(seeds),
        **arithmetic(lm),
        "backend": plan.passes.taken,
        "plan": plan.summary(),
        "attention": lm.attention,
        **({"dequantised from": lm.dequantised} if lm.dequantised else {}),
        "family": lm.body.family,
        **versions(),
    }


def seeds_of(provenance: dict[str, str], count: int) -> Tensor:
    """Return the seeds (S,) of a fit whose table lacks them; −1 where its provenance does, too."""
    try:
        given = json.loads(provenance.get("seeds", "[]"))
        known = isinstance(given, list) and len(given) == count
        return torch.tensor(given if known else [-1] * count, dtype=torch.int64, device="cpu")
    except (ValueError, TypeError, RuntimeError):
        seen = provenance["seeds"]
        raise ValueError(f"path: its seeds are {seen!r}, no list of integers") from None
