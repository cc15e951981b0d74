"""What the caller has set around a call changes nothing in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel

import prototok
from prototok import FrozenLM, ProtoTokens, Recipe, autoregressive
from prototok.common.ranges import named_range
from prototok.fitting.recipe import recipe_of
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


@contextlib.contextmanager
def rounded_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


WORLDS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled(False)": gradients_off,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float32 products of bfloat16": rounded_products,
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_that_tensors_have_by_default_changes_nothing(dtype: torch.dtype) -> None:
    lm, texts = load(), [[3, 7, 1, 4], [9, 2, 4, 8]]
    recipe = replace(recipe_of("fast"), max_steps=40)

    def everything() -> list[Tensor]:
        fit = prototok.fast_fit(lm, texts, recipe=recipe, prefix=None)
        trained = prototok.learn_optimizer(
            lm, texts, lengths=(2,), steps=2, near=2.0, prior=prior_of(lm), prefix=None
        )
        learned = prototok.fast_fit(
            lm, texts, length=2, recipe="learned", init=trained, max_steps=20, prefix=None
        )
        return [fit.tokens.e, fit.steps, learned.tokens.e, learned.steps, prototok.decode(lm, fit)]

    expected = everything()
    torch.set_default_dtype(dtype)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_networks_that_are_read_in_inference_mode_can_be_used(tmp_path: Path) -> None:
    lm, texts = load(), [[3, 7, 1, 4], [9, 2, 4, 8]]
    more: dict[str, Any] = {"lengths": (2,), "steps": 2, "prior": prior_of(lm), "prefix": None}
    prototok.learn_optimizer(lm, texts, **more).save(tmp_path / "o")
    prototok.learn_encoder(lm, texts, **more).save(tmp_path / "e")
    prior_of(lm).save(tmp_path / "p")
    fitted(lm).tokens.save(tmp_path / "t")
    with torch.inference_mode():
        read = prototok.Encoder.load(tmp_path / "e"), prototok.LearnedOptimizer.load(tmp_path / "o")
        prior, tokens = prototok.Prior.load(tmp_path / "p"), ProtoTokens.load(tmp_path / "t")
    given: dict[str, Any] = {"length": 2, "max_steps": 3, "prefix": None}
    prototok.fast_fit(lm, texts, recipe="learned", init=read, **given)
    prototok.fast_fit(lm, texts, init=prior, **given)
    assert not tokens.e.is_inference()


def test_numbers_may_be_those_of_numpy(tmp_path: Path) -> None:
    lm = load()
    recipe = Recipe(
        lr=np.float32(0.1), eps=np.float64(1e-8), betas=(np.float32(0.9), np.float64(0.9)),
        margin=np.float32(0), weight_decay=np.int64(0), accuracy=np.float64(1),
        max_steps=np.int64(2),
    )  # fmt: skip
    fit = prototok.fast_fit(lm, TEXTS, recipe=recipe, length=np.int64(2))
    fit.save(tmp_path / "fit")
    assert prototok.FitResult.load(tmp_path / "fit").tokens.e.equal(fit.tokens.e)
    done = prototok.fit_stream(
        lm, TEXTS, tmp_path / "s", length=np.int64(2), shard=np.int64(1), recipe=recipe
    )
    assert done.texts == len(TEXTS)
    prototok.learn_optimizer(
        lm, TEXTS, lengths=(np.int64(2),), steps=np.int64(1), seed=np.int64(3), prior=prior_of(lm),
        prefix=None,
    ).save(tmp_path / "o")  # fmt: skip


def test_a_prefix_of_another_model_is_that_of_its_ids_here() -> None:
    theirs = prototok.load(small_llama(initializer_range=0.5), device="cpu", dtype="float32")
    lm, rows = load(), torch.tensor([5, 6])
    given = prototok.fast_fit(theirs, TEXTS, prefix=[5, 6], recipe=RECIPE).tokens.prefix
    assert given is not None and torch.equal(given.vectors, theirs.embed(rows))
    kept = prototok.fast_fit(lm, TEXTS, prefix=given, recipe=RECIPE).tokens.prefix
    assert kept is not None and kept.ids == (5, 6)
    assert torch.equal(kept.vectors, lm.embed(rows)) and not torch.equal(
        kept.vectors, given.vectors
    )


def test_lengths_are_decoded_only_where_inputs_begin_alike() -> None:
    lm = load()
    for name in ("e m*", "(e m)*", "e*", "e m*+1", "e* m*"):
        fit = prototok.fast_fit(lm, [[3, 7, 1, 4]], arrangement=name, recipe=Recipe(max_steps=2))
        if name != "e* m*":
            whole = prototok.decode(lm, fit)
            assert torch.equal(prototok.decode(lm, fit, length=2), whole[:, :2])
        else:
            with pytest.raises(ValueError, match="length: 2 tokens of 'e\\* m\\*'"):
                prototok.decode(lm, fit, length=2)
            assert prototok.decode(lm, fit, length=4).shape == (1, 4)


def test_pairs_of_paths_may_be_a_tensor() -> None:
    lm = load()
    fit = fitted(lm)
    line = prototok.interpolate(lm, fit, [(0, 1)], points=3)
    again = prototok.interpolate(lm, fit, line.pairs, points=3)
    assert torch.equal(line.accuracy, again.accuracy)


def test_tables_that_a_forward_leaves_serve_any_later_one() -> None:
    """Rotary tables are kept, so they must not be inference tensors or fake ones."""
    lm = load()
    with torch.inference_mode():
        expected = lm.hidden(lm.embed(torch.tensor([[3, 7, 1, 4]])))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(lm.body.tables(9)[0], FakeTensor)
    for length in (4, 9):
        embeds = lm.embed(torch.arange(length)[None]).requires_grad_()
        lm.hidden(embeds).sum().backward()
        assert embeds.grad is not None and embeds.grad.abs().max() > 0
    assert torch.equal(lm.hidden(lm.embed(torch.tensor([[3, 7, 1, 4]]))), expected)


@pytest.mark.parametrize("of_all_threads", [False, True])
def test_a_profiler_sees_named_ranges(of_all_threads: bool) -> None:
    lm = load()
    tokens = fitted(lm).tokens
    settings = _ExperimentalConfig(profile_all_threads=of_all_threads)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=settings) as profile:
        prototok.decode(lm, tokens)
    assert "decode" in {event.name for event in profile.events() or ()}
    assert isinstance(named_range("decode", lm.device), contextlib.nullcontext)
