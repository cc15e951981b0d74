"""Frozen decoder bodies: from input embeddings to the hidden states that the head reads.

Each family turns a model's weights into the plain blocks of `prototok_kernels.layers`. `body_of`
picks one; a model whose options no family covers takes the general way, through transformers.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from prototok.model.families import gpt_neox, llama
from prototok.model.families.body import DecoderBody
from prototok.model.families.general import GeneralBody

# `family`, `head` (V, d) where it is a plain matrix, and `hidden`, which returns logits where not.
Body = DecoderBody | GeneralBody


def body_of(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Body:
    """Return the family's own forward where it covers the model, else the general one."""
    for family in (llama, gpt_neox):
        if family.covers(model.config):
            return family.body(model, device, dtype)
    return GeneralBody.from_model(model, device, dtype)
