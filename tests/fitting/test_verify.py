"""A row is verified alone in both dtypes, and every number it gets is the worse of the two."""

from __future__ import annotations

import pytest
import torch

import prototok
from prototok import Recipe
from prototok.decoding.decode import decode_vectors
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.setup import Setup
from prototok.fitting.verify import verify
from prototok.results.arrangement import Arrangement
from support import small_llama

PAIR = Arrangement.parse("e m*")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_number_is_the_worse_of_both_dtypes(dtype: str) -> None:
    lm = prototok.load(small_llama(), "cpu", dtype)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(lm.vocab_size, (12, 6), generator=generator)
    setup = Setup(lm, OneForward(PAIR), Recipe(), "auto", None)
    worse_first = 0
    for targets in texts:
        vectors = torch.randn(2, lm.hidden_size, generator=generator)
        found = verify(setup, targets, vectors)
        own, exactly = (
            decode_vectors(model, vectors[None], PAIR, 6, targets[None], "auto")
            for model in (lm, lm.cast(torch.float32))
        )
        right = [int((d.ids[0] == targets).sum()) for d in (own, exactly)]
        losses = [float(d.loss.mean()) for d in (own, exactly)]
        worse_first += losses[0] > losses[1]
        assert found.correct == min(right) and found.accuracy == min(right) / 6
        assert found.margin == min(float(d.margin.min()) for d in (own, exactly))
        assert found.loss == max(losses)
        assert int((found.ids == targets).sum()) == found.correct
        assert len(found.margins) == 6
    # Or the last loss would be the larger one by chance.
    assert worse_first > 0 or dtype == "float32"
