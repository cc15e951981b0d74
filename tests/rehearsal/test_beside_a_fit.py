"""What runs beside a fit, on a device that mixes with no other: paths, robustness, information."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import prototok
from prototok import FitResult, FrozenLM, Recipe
from prototok.decoding.decode import decode
from prototok.fitting.fast_fit import one_forward
from prototok.fitting.verify import verify
from prototok.geometry import BezierSettings, decodings, perturbations
from prototok.model.families.upcast import Upcast
from prototok.results.arrangement import Arrangement
from prototok.results.proto_tokens import ProtoTokens
from rehearsal import Seen, frozen, rehearsal
from zoo import OWN

FAMILIES = {
    "llama": OWN["llama, grouped, tied"],
    "gpt_neox": OWN["gpt-neox, parallel"],
    "general": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
}
TEXTS, SEEDS = [[5, 9, 11, 2, 7], [40, 41, 7]], 2


def made_up(lm: FrozenLM, arrangement: str) -> FitResult:
    """A fit of two texts by two seeds, all exact."""
    layout = Arrangement.parse(arrangement)
    leading = (layout.leading,) if layout.leading > 1 else ()
    e = torch.randn(len(TEXTS), SEEDS, *leading, lm.hidden_size, device="cpu")
    tokens = ProtoTokens(
        e=e, m=torch.randn(len(TEXTS), SEEDS, lm.hidden_size, device="cpu"),
        lengths=torch.tensor([len(ids) for ids in TEXTS], device="cpu"), arrangement=arrangement,
        model=lm.identity, seeds=SEEDS, share=None, groups=None, provenance={}, prefix=lm.prefix,
    )  # fmt: skip
    ones = torch.ones(len(TEXTS), SEEDS, device="cpu")
    many = dict.fromkeys(("accuracy", "margin", "loss", "seconds", "accuracy_in_batch"), ones)
    counts = {name: ones.long() for name in ("correct", "steps", "seed")}
    targets = [torch.tensor(ids, device="cpu") for ids in TEXTS]
    return FitResult(tokens=tokens, targets=targets, exact=ones.bool(), **many, **counts)


def beside(
    what: Callable[[FrozenLM, FitResult], object], make: Callable[[], PreTrainedModel],
    prefix: int, arrangement: str = "e m*",
) -> Seen:  # fmt: skip
    with rehearsal(may_read=True) as seen:
        lm = frozen(make, prefix)
        # A fit is loaded on the CPU, whatever the model's device.
        fit = made_up(lm, arrangement)
        seen.launches.clear()
        what(lm.bare, fit)
    assert seen.launches and seen.reads
    return seen


def connect(lm: FrozenLM, fit: FitResult) -> None:
    settings = BezierSettings(max_steps=3, samples=2, check_every=2)
    paths = prototok.connect(lm, fit, points=5, settings=settings)
    assert paths.control is not None and paths.control.device.type == "cpu"
    assert all(t.device.type == "cpu" for t in (paths.accuracy, paths.length, paths.straight))


def interpolate(lm: FrozenLM, fit: FitResult) -> None:
    paths = prototok.interpolate(lm, fit, points=5)
    assert all(t.device.type == "cpu" for t in (paths.accuracy, paths.length, paths.straight))


def robustness(lm: FrozenLM, fit: FitResult) -> None:
    found = [*perturbations(lm, fit), *decodings(lm, fit, batch_sizes=(1, 2))]
    assert len(found) > 10 and all(one.accuracy.device.type == "cpu" for one in found)


def information(lm: FrozenLM, fit: FitResult) -> None:
    found = prototok.information(lm, fit.targets)
    assert found.nats.device.type == "cpu" and found.scored.tolist() == [4, 2]


def decoded(lm: FrozenLM, fit: FitResult) -> None:
    for batch in (1, 2):
        assert decode(lm, fit, batch_size=batch).shape == (4, 5)


def verified(lm: FrozenLM, fit: FitResult) -> None:
    """In both dtypes: the wider one is made block by block."""
    lm = lm.behind(fit.tokens.prefix)
    layout = Arrangement.parse(fit.tokens.arrangement)
    setup = one_forward(lm, layout, Recipe(spreads=2.0), None, "auto", None)
    verify(setup, [(fit.targets[0], fit.tokens.vectors(0))])
    wide = lm.cast(torch.float32)
    assert wide.body.family == "general" or isinstance(wide.body.layers, Upcast)


DONE = [connect, interpolate, robustness, information, decoded, verified]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", DONE, ids=lambda what: what.__name__)
def test_nothing_mixes_devices(what: Callable[..., None], family: str) -> None:
    beside(what, FAMILIES[family], 0)


@pytest.mark.parametrize("what", DONE, ids=lambda what: what.__name__)
def test_nor_behind_a_prefix(what: Callable[..., None]) -> None:
    beside(what, FAMILIES["llama"], 3)


@pytest.mark.parametrize("what", [connect, interpolate, robustness, decoded])
def test_nor_with_several_leading_vectors(what: Callable[..., None]) -> None:
    beside(what, FAMILIES["llama"], 0, "e* m*")
