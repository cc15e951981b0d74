"""One rule for all that C++ makes of weights: made anew when one has changed, let go with them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

import prototok
from prototok import FrozenLM, Recipe, autoregressive
from prototok.decoding.decode import decode_vectors
from prototok.results.arrangement import Arrangement
from prototok_kernels import packed
from prototok_kernels.backend import _cpu
from support import losses_by_step
from zoo import OWN, made

pytestmark = pytest.mark.skipif(_cpu is None, reason="installed without the C++ kernels")

LENGTH = 20  # enough for the closed form of the first layer
MODELS = {
    "llama, grouped, tied": torch.bfloat16,
    "qwen2": torch.float32,
    "gpt-neox, sequential": torch.bfloat16,
}


def model(name: str) -> FrozenLM:
    # From float64, so that no weight is shared with the source, whose changes are refused.
    return prototok.load(made(OWN[name]).double(), device="cpu", dtype=MODELS[name])


def weights(lm: FrozenLM) -> dict[str, Tensor]:
    """Every tensor that the model computes with, by name."""
    body = lm.body
    found = {
        f"layer {i}: {f.name}": getattr(layer, f.name)
        for i, layer in enumerate(body.layers)
        for f in fields(layer)
    }
    found |= {"norm": body.norm, "norm_bias": body.norm_bias, "head": body.head}
    found["embedding"] = lm.embedding
    return {name: weight for name, weight in found.items() if isinstance(weight, Tensor)}


def results(lm: FrozenLM) -> list[Tensor]:
    """Of the packed first layer, blocks and head (a fit), and of the decoder, in both its uses."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(lm.vocab_size, (2, LENGTH), generator=generator)
    losses = losses_by_step(lm, list(ids), recipe=Recipe(max_steps=2))
    vectors = torch.randn(1, 2, lm.hidden_size, generator=generator)
    decoded = decode_vectors(lm, vectors, Arrangement.parse("e m*"), LENGTH, None, "auto")
    # Its margins say more than ids, which a small change leaves as they are.
    generated = autoregressive.generate(lm, vectors, LENGTH)
    return [torch.tensor(list(losses[0].values())), decoded.margin, generated]


def change(weight: Tensor) -> None:
    weight.mul_(1.5).add_(0.25)


@pytest.mark.parametrize("name", MODELS)
def test_a_weight_that_changes_in_place_changes_the_results(name: str) -> None:
    lm = model(name)
    before, changed = results(lm), list[str]()
    for which, weight in weights(lm).items():
        change(weight)
        changed.append(which)
        found = results(lm)
        fresh = model(name)
        for other in changed:
            change(weights(fresh)[other])
        for one, expected in zip(found, results(fresh), strict=True):
            assert torch.equal(one, expected), which
        # What is embedded is only read by generation, whose ids may stay the same.
        if which != "embedding":
            assert not torch.equal(found[1], before[1]), which
        before = found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_all_that_was_made_of_it_along(name: str) -> None:
    gc.collect()
    held = len(packed._packed)
    lm = model(name)
    results(lm)
    assert len(packed._packed) > held
    alive = [weakref.ref(weight) for weight in weights(lm).values()]
    alive.append(weakref.ref(lm))
    del lm
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    assert len(packed._packed) == held


def test_threads_that_begin_together_make_it_once() -> None:
    class Owner:
        pass

    owner, weight, made_by = Owner(), torch.zeros(2), list[object]()
    barrier, found = threading.Barrier(8), list[object]()

    def make() -> object:
        made_by.append(threading.get_ident())
        return object()

    def get() -> None:
        barrier.wait()
        found.append(packed.packed(owner, [weight], make))

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made_by) == 1 and len(set(map(id, found))) == 1


def keep(weight: Tensor) -> None:
    pass


@pytest.mark.parametrize(
    ("touch", "again"),
    [
        (keep, False),
        (lambda weight: weight.add_(1), True),
        (lambda weight: weight.set_(torch.ones(2).untyped_storage()), True),
    ],
)
def test_it_is_made_again_exactly_when_a_weight_has_changed(
    touch: Callable[[Tensor], object], again: bool
) -> None:
    class Owner:
        pass

    owner, kept, weight = Owner(), torch.zeros(2), torch.zeros(2)
    first = packed.packed(owner, [kept, weight], object)
    touch(weight)
    assert (packed.packed(owner, [kept, weight], object) is not first) == again


def test_what_has_no_version_is_never_trusted() -> None:
    class Owner:
        pass

    owner = Owner()
    with torch.inference_mode():
        weight = torch.zeros(2)
    first = packed.packed(owner, [weight], object)
    assert packed.packed(owner, [weight], object) is not first
