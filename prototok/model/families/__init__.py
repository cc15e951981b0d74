"""Frozen decoder bodies: from input embeddings to the hidden states that the head reads.

Each family turns a model's weights into the plain blocks of `prototok_kernels.layers`. `body_of`
picks one; a model that is not exactly the stock one of a family takes the general way, through
transformers, and its body says why.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from prototok.model.families import gpt_neox, llama
from prototok.model.families.body import DecoderBody
from prototok.model.families.general import GeneralBody
from prototok.model.families.stock import why_changed

# `family`, `reason`, `embed`, `head` (V, d) where it is a plain matrix, and `hidden`, which returns
# logits where not.
Body = DecoderBody | GeneralBody


class Chosen(NamedTuple):
    """Which family has a forward of a model, or None; why; and whether the model was changed."""

    family: ModuleType | None
    reason: str
    changed: bool = False


def choose(model: PreTrainedModel) -> Chosen:
    """Choose the family that covers a model, if one does."""
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    family = next((family for family in (llama, gpt_neox) if kind in family.CLASSES), None)
    if family is None:
        return Chosen(None, f"there is no forward of {type(model).__name__} here")
    change = why_changed(model)
    if change is not None:
        return Chosen(None, change, changed=True)
    refusal = family.refusal(model)
    return Chosen(family, DecoderBody.reason) if refusal is None else Chosen(None, refusal)


def body_of(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, chosen: Chosen | None = None
) -> Body:
    """Make a body of the model on a device: by its family where it has one."""
    family, reason, _ = chosen or choose(model)
    if family is None:
        return GeneralBody.from_model(model, device, dtype, reason)
    ends = family.ends(model, device, dtype)
    layers = list(family.layers(model, device, dtype))
    return DecoderBody(family=family.NAME, layers=layers, **ends._asdict())
