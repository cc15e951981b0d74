"""Texts that a model makes up: sampled continuations of prompts.

Letters: R rows, P tokens of a prompt, N tokens to draw.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging

from prototok.model.frozen_lm import FrozenLM, twin_of

_ROWS = 16  # at once


@torch.no_grad()
def sample(lm: FrozenLM, prompts: Tensor, length: int, seed: int) -> Tensor:
    """Continue prompts (R, P) by ids (R, N) drawn from the model's own distribution, on the CPU.

    Temperature 1, no top-k and no top-p, never ending early: an EOS is a token like others. The
    same seed gives the same ids on the same device.
    """
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length, pad_token_id=0
    )
    model: Any = twin_of(lm, lm.dtype)
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    made = []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            for part in prompts.to(lm.device).split(_ROWS):
                ids = model.generate(
                    input_ids=part, attention_mask=torch.ones_like(part),
                    generation_config=settings,
                )  # fmt: skip
                made.append(ids[:, part.shape[1] :].cpu())
    finally:
        logging.set_verbosity(level)
    return torch.cat(made)
