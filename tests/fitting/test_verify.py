"""A row is verified alone in both dtypes, and every number it gets is the worse of the two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import prototok
from prototok import Recipe
from prototok.decoding.decode import alone, decode_vectors
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.setup import Setup
from prototok.fitting.verify import verify
from prototok.results.arrangement import Arrangement
from prototok_kernels.backend import _cpu
from prototok_kernels.plan import this_machine
from support import small_llama
from zoo import OWN, made

PAIR = Arrangement.parse("e m*")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_number_is_the_worse_of_both_dtypes(dtype: str) -> None:
    lm = prototok.load(small_llama(), "cpu", dtype)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(lm.vocab_size, (12, 6), generator=generator)
    setup = Setup(lm, OneForward(PAIR), Recipe(spreads=1.0), "auto", None)
    worse_first = 0
    for targets in texts:
        vectors = torch.randn(2, lm.hidden_size, generator=generator)
        (found,) = verify(setup, [(targets, vectors)])
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
        rounding = decode_vectors(lm, vectors[None], PAIR, 6, targets[None], "auto", as_fitted=True)
        differences = (rounding.margin - exactly.margin).square().mean()
        rounded = dtype == "bfloat16"
        assert found.spread == (pytest.approx(float(differences.sqrt())) if rounded else 0.0)
        assert (found.spread > 0) == (dtype == "bfloat16")
        (unasked,) = verify(replace(setup, recipe=Recipe()), [(targets, vectors)])
        assert unasked.spread == 0.0 and unasked.margin == found.margin
        assert int((found.ids == targets).sum()) == found.correct
        assert len(found.margins) == 6
    # Or the last loss would be the larger one by chance.
    assert worse_first > 0 or dtype == "float32"


@pytest.mark.skipif(_cpu is None, reason="installed without the C++ kernels")
def test_what_is_by_row_is_known() -> None:
    for model, takes_packed in (("tiny-neox", True), (made(OWN["qwen3, tied"]), False)):
        lm = prototok.load(model, "cpu", torch.bfloat16)
        packed = takes_packed and bool(this_machine().packed)
        assert alone(lm, PAIR, 9, "auto")[1] == 28
        assert alone(lm, PAIR, 9, "auto", as_fitted=True)[1] == (28 if packed else 1)
        assert alone(lm, PAIR, 9, "torch")[1] == 1
        assert alone(lm.cast(torch.float32), PAIR, 9, "auto")[1] == 28


@pytest.fixture(params=[1, 3])  # C++ chooses its way by them
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["llama, grouped, tied", "qwen3, tied"])
def test_rows_together_are_each_as_alone(name: str, dtype: str) -> None:
    lm = prototok.load(made(OWN[name]), "cpu", dtype)
    generator = torch.Generator().manual_seed(0)
    setup = Setup(lm, OneForward(PAIR), Recipe(spreads=1.0), "auto", None)
    rows = [
        (torch.randint(lm.vocab_size, (length,), generator=generator),
         torch.randn(2, lm.hidden_size, generator=generator))
        for length in (1, 6, 6, 2, 6, 1, 40, 6, 40, 40) + (9,) * 30
    ]  # fmt: skip
    for (ids, vectors), found in zip(rows, verify(setup, rows), strict=True):
        (by_itself,) = verify(setup, [(ids, vectors)])
        for name in ("accuracy", "correct", "margin", "spread", "loss"):
            assert getattr(found, name) == getattr(by_itself, name), name
        assert torch.equal(found.ids, by_itself.ids)
        assert torch.equal(found.margins, by_itself.margins)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_fit_goes_on_until_its_margin_is_above_the_rounding(dtype: str) -> None:
    lm = prototok.load(small_llama(), "cpu", dtype)
    texts = torch.randint(lm.vocab_size, (6, 2), generator=torch.Generator().manual_seed(1))
    bare = Recipe(lr=0.05, betas=(0.9, 0.99), max_steps=600)
    fits = {
        spreads: prototok.fast_fit(lm, texts, recipe=replace(bare, spreads=spreads), prefix=None)
        for spreads in (0.0, 8.0)
    }
    setup = Setup(lm, OneForward(PAIR), replace(bare, spreads=8.0), "auto", None)
    margins = {}
    for spreads, fit in fits.items():
        assert fit.exact.all()
        found = verify(setup, [(ids, fit.tokens.vectors(r)) for r, ids in enumerate(fit.targets)])
        margins[spreads] = [one.margin - 8 * one.spread for one in found]
    assert min(margins[8.0]) >= 0
    assert (min(margins[0.0]) < 0) == (dtype == "bfloat16")
    assert torch.equal(fits[0.0].steps, fits[8.0].steps) == (dtype == "float32")
