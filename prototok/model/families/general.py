"""Any causal language model that takes `inputs_embeds`, through its own transformers forward."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prototok_kernels.plan import Plan, Shape


class GeneralBody:
    """A frozen twin of the model; `hidden` returns logits, whatever stands between them and it."""

    family = "general"
    head: Tensor | None = None
    shape = Shape()

    def __init__(self, model: PreTrainedModel, prefix: Tensor | None = None) -> None:
        self.model, self.prefix = model, prefix  # (P, d)

    def behind(self, vectors: Tensor) -> GeneralBody:
        """Return the same twin with vectors (P, d) in front of every input."""
        return GeneralBody(self.model, vectors)

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, device: torch.device, dtype: torch.dtype
    ) -> GeneralBody:
        # The twin has modules of its own over the same storage: eval mode and frozen weights
        # without touching the caller's model, and without a second copy of its memory.
        memo: dict[int, object] = {
            id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
        }
        twin = copy.deepcopy(model, memo).eval()
        return cls(twin.to(device=device, dtype=dtype))

    def hidden(self, inputs_embeds: Tensor, plan: Plan) -> Tensor:
        """(B, N, d) embeddings to logits (B, N, V), by transformers whatever the plan."""
        if self.prefix is None:
            return self.model(inputs_embeds=inputs_embeds, use_cache=False).logits
        front = self.prefix.expand(len(inputs_embeds), -1, -1)
        whole = torch.cat([front, inputs_embeds], dim=1)
        return self.model(inputs_embeds=whole, use_cache=False).logits[:, len(self.prefix) :]
