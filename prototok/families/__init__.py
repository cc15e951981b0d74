"""Frozen decoder bodies: from input embeddings to the hidden states that the head reads.

Each family is a plain functional forward over a frozen model's weights. `body_of` picks one; a
model whose options no family covers takes the general way, through transformers itself.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prototok.families.general import GeneralBody
from prototok.families.gpt_neox import GPTNeoXBody
from prototok.families.llama import LlamaBody


class Body(Protocol):
    """What every family gives: a forward, and the head's weight where it is a plain matrix."""

    family: str
    head: Tensor | None  # (V, d); None: `hidden` returns logits, (B, N, V)

    def hidden(self, inputs_embeds: Tensor) -> Tensor:
        """(B, N, d) embeddings to (B, N, d) hidden states behind the last norm."""
        ...


def body_of(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Body:
    """The family's own forward where it covers the model, else the general one."""
    if LlamaBody.covers(model.config):
        return LlamaBody.from_model(model, device, dtype)
    if GPTNeoXBody.covers(model.config):
        return GPTNeoXBody.from_model(model, device, dtype)
    return GeneralBody.from_model(model, device, dtype)
