"""The autoregressive baselines that one forward is timed against: transformers' `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging

from prototok.families.general import GeneralBody
from prototok.frozen_lm import FrozenLM

CACHES = ("dynamic", "static")


class Generate:
    """Greedy `generate` of exactly N tokens behind one, with a dynamic or a static KV cache."""

    def __init__(self, lm: FrozenLM, dtype: torch.dtype) -> None:
        self.model: Any = GeneralBody.from_model(lm.source, lm.device, dtype).model
        self.device, self.context = lm.device, lm.context
        self.first = lm.bos_id or 0

    def __call__(self, length: int, batch: int, cache: str) -> Tensor:
        """(batch, length) int64 generated ids. The prompt is one token, the same in every row."""
        prompt = torch.full((batch, 1), self.first, device=self.device)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=length, min_new_tokens=length, pad_token_id=0,
            cache_implementation="static" if cache == "static" else None,
        )  # fmt: skip
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                out = self.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
                )
        finally:
            logging.set_verbosity(level)
        return out[:, 1:]

    def call(self, length: int, batch: int, cache: str) -> Callable[[], Tensor]:
        """The same, ready to be timed."""
        return lambda: self(length, batch, cache)
