"""Eight threads with one model get what one thread gets, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import prototok
from prototok import FrozenLM
from prototok.autoregressive import generate
from prototok.decoding.decode import decode_vectors
from prototok.fitting.recipe import Recipe
from prototok.results.arrangement import Arrangement
from support import small_llama

THREADS = 8
LENGTHS = {"equal lengths": [32] * THREADS, "different lengths": [3, 60, 9, 33, 1, 48, 17, 62]}
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(autouse=True)
def one_core_each() -> Iterator[None]:
    """Or eight teams of threads would wait for each other's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=DTYPES)
def lm(request: pytest.FixtureRequest) -> FrozenLM:
    """Loaded anew, so that the first calls meet as well."""
    return prototok.load("tiny-llama", device="cpu", dtype=request.param)


def at_once(works: list[Callable[[], Any]]) -> list[Any]:
    """Run each in a thread of its own, all begun together."""
    barrier = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(begin, work) for work in works]]


def vectors(lm: FrozenLM, seed: int) -> Tensor:
    """(1, 2, d)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, lm.hidden_size, generator=generator)


def decoded(lm: FrozenLM, thread: int, length: int, times: int) -> list[tuple[Tensor, ...]]:
    found, arrangement = [], Arrangement.parse("e m*")
    for i in range(times):
        d = decode_vectors(lm, vectors(lm, 100 * thread + i), arrangement, length, None, "auto")
        found.append((d.ids, d.margin, d.loss))
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    wrong = sum(
        not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for ones, others in zip(found, expected, strict=True)
        for one, other in zip(ones, others, strict=True)
    )
    assert wrong == 0


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_decoding(lm: FrozenLM, lengths: list[int]) -> None:
    def of(thread: int, times: int = 40) -> list[tuple[Tensor, ...]]:
        return decoded(lm, thread, lengths[thread], times)

    found = at_once([lambda thread=t: of(thread) for t in range(THREADS)])
    assert_same(found, [of(t) for t in range(THREADS)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_generation(lengths: list[int], dtype: torch.dtype) -> None:
    """In float64 that is the decoder in torch, whose buffers are static as well."""
    lm = prototok.load(small_llama(max_position_embeddings=64), device="cpu", dtype=dtype)

    def of(thread: int, times: int = 12) -> list[tuple[Tensor, ...]]:
        seeds = range(100 * thread, 100 * thread + times)
        return [(generate(lm, vectors(lm, s), lengths[thread]),) for s in seeds]

    found = at_once([lambda thread=t: of(thread) for t in range(THREADS)])
    assert_same(found, [of(t) for t in range(THREADS)])


def test_fits_beside_each_other_and_beside_decoding(lm: FrozenLM) -> None:
    recipe = Recipe(name="short", lr=0.1, max_steps=12)
    lengths = LENGTHS["different lengths"]

    def fitted(thread: int) -> list[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(thread)
        ids = torch.randint(lm.vocab_size, (1, lengths[thread]), generator=generator)
        fit = prototok.fast_fit(lm, ids, recipe=recipe, progress=False)
        return [(fit.tokens.e, fit.tokens.m, fit.loss, fit.margin, fit.correct)]

    def of(thread: int) -> list[tuple[Tensor, ...]]:
        return fitted(thread) if thread % 4 else decoded(lm, thread, lengths[thread], 20)

    found = at_once([lambda thread=t: of(thread) for t in range(THREADS)])
    assert_same(found, [of(t) for t in range(THREADS)])
