"""What the caller has set around a call changes nothing in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import prototok
from prototok import FrozenLM, Recipe, autoregressive
from prototok.geometry.paths import BezierSettings
from support import small_llama


@contextlib.contextmanager
def gradients_off() -> Iterator[None]:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(before)


WORLDS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled(False)": gradients_off,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
TEXTS = [[3, 7, 1], [9, 2, 4]]
RECIPE = Recipe(lr=0.1, max_steps=40, margin=0.2)


def load() -> FrozenLM:
    return prototok.load(small_llama(), device="cpu", dtype="float32")


def fitted(lm: FrozenLM) -> prototok.FitResult:
    return prototok.fast_fit(lm, TEXTS, seeds=2, recipe=RECIPE)


def connected(lm: FrozenLM) -> Tensor:
    settings = BezierSettings(max_steps=2, check_every=1)
    curve = prototok.connect(lm, fitted(lm), [(0, 1)], points=3, settings=settings)
    assert curve.control is not None
    return curve.control


def prior_of(lm: FrozenLM) -> prototok.Prior:
    d = lm.hidden_size
    basis = torch.eye(d, dtype=torch.float32, device="cpu").expand(2, d, d).clone()
    mean = torch.zeros(2, d, dtype=torch.float32, device="cpu")
    return prototok.Prior(mean, 0.1 + mean, basis, lm.identity)


def encoded(lm: FrozenLM) -> Tensor:
    """What an encoder says of texts."""
    encoder = prototok.learn_encoder(lm, TEXTS, lengths=(3,), steps=2, prior=prior_of(lm))
    e, _ = encoder(TEXTS)
    assert torch.equal(prototok.encode(lm, TEXTS, encoder).tokens.e[:, 0], e)
    return e


def learned(lm: FrozenLM, backend: str = "auto") -> Tensor:
    """The vectors that a learned optimiser leads to."""
    optimizer = prototok.learn_optimizer(
        lm, TEXTS, lengths=(2,), steps=2, prior=prior_of(lm), backend=backend
    )
    recipe = replace(RECIPE, learned=2, max_steps=3)
    return prototok.fast_fit(lm, TEXTS, recipe=recipe, init=optimizer, backend=backend).tokens.e


CALLS: dict[str, Callable[[FrozenLM], Tensor]] = {
    "fast_fit": lambda lm: fitted(lm).tokens.e,
    "fast_fit, losses": lambda lm: fitted(lm).loss,
    "decode": lambda lm: prototok.decode(lm, fitted(lm).tokens),
    "information": lambda lm: prototok.information(lm, TEXTS).nats,
    "capacity": lambda lm: prototok.capacity(lm, TEXTS, lengths=(1, 2), recipe=RECIPE).exact,
    "interpolate": lambda lm: prototok.interpolate(lm, fitted(lm), [(0, 1)], points=3).accuracy,
    "connect": connected,
    "autoregressive.fit": lambda lm: autoregressive.fit(lm, TEXTS, recipe=RECIPE).mem,
    "generate": lambda lm: autoregressive.generate(lm, torch.ones(1, 1, lm.hidden_size), 3),
    # As on CUDA, whose decoder this is.
    "generate, by torch": lambda lm: autoregressive.generate(
        lm, torch.ones(1, 1, lm.hidden_size), 3, backend="torch"
    ),
    "generate, dynamic": lambda lm: autoregressive.generate(
        lm, torch.ones(1, 1, lm.hidden_size), 3, "dynamic"
    ),
    "learn_encoder": encoded,
    "learn_optimizer": learned,
    "learn_shared": lambda lm: prototok.learn_shared(lm, TEXTS, length=2, steps=3).mean,
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("call", CALLS)
def test_a_result_does_not_depend_on_the_world_around_it(call: str, world: str) -> None:
    expected = CALLS[call](load())
    with WORLDS[world]():
        found = CALLS[call](load())
        assert not found.is_inference()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("world", WORLDS)
def test_the_callers_world_is_back_afterwards(world: str) -> None:
    lm = load()
    with WORLDS[world]():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        cast = torch.is_autocast_enabled("cpu")
        fitted(lm)
        with pytest.raises(ValueError, match="^recipe"):
            prototok.fast_fit(lm, TEXTS, recipe="swift")
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        assert torch.is_autocast_enabled("cpu") == cast


def test_autocast_makes_no_false_exact() -> None:
    """37 of 40 were claimed inside autocast, and 34 came back outside."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).eval()
    lm = prototok.load(model, device="cpu", dtype="float32")
    texts = torch.randint(60, (40, 6), generator=torch.Generator().manual_seed(1))
    recipe = Recipe(lr=0.1, max_steps=60)
    with torch.autocast("cpu", torch.bfloat16):
        fit = prototok.fast_fit(lm, texts, recipe=recipe)
    assert fit.exact.any()
    for text, row in zip(texts[fit.exact[:, 0]], fit.exact[:, 0].nonzero()[:, 0], strict=True):
        e, m = fit.tokens.vectors(int(row))
        z = torch.cat([e[None], m.expand(5, -1)])[None]
        assert torch.equal(model(inputs_embeds=z).logits[0].argmax(-1), text)
