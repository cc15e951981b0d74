"""`learn_optimizer(init=)`: training that begins with an optimiser, an encoder, or both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import prototok
from prototok import Encoder, FitResult, FrozenLM, LearnedOptimizer, Prior
from prototok.fitting import learn_encoder as learning
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.setup import Setup
from prototok.fitting.learn_shared import own_texts
from prototok.fitting.learned import guesses, pool
from prototok.fitting.learned.pool import Corpus, Pool
from prototok.fitting.recipe import LEARNED
from prototok.model.load import load
from prototok.results.arrangement import Arrangement
from tests.support import small_llama

LENGTH = 3
TRAINED = torch.randint(97, (64, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prior(small_lm: FrozenLM) -> Prior:
    return prototok.learn_shared(small_lm, length=LENGTH, steps=60, progress=False)


def learn(lm: FrozenLM, **options: object) -> LearnedOptimizer:
    given = {"texts": TRAINED, "lengths": (LENGTH,), "steps": 1, "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_POSITIONS", 64 * LENGTH)
        return prototok.learn_optimizer(lm, **(given | options))


@pytest.fixture(scope="module")
def optimizer(small_lm: FrozenLM, prior: Prior) -> LearnedOptimizer:
    return learn(small_lm, prior=prior, steps=120)


@pytest.fixture(scope="module")
def encoder(small_lm: FrozenLM, prior: Prior) -> Encoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guesses, "_POSITIONS", 64 * LENGTH)
        patch.setattr(learning, "_WIDTH", 96)
        patch.setattr(learning, "_DEPTH", 1)
        return prototok.learn_encoder(
            small_lm, TRAINED, lengths=(LENGTH,), steps=60, prior=prior, progress=False
        )


@pytest.fixture(scope="module")
def unseen(small_lm: FrozenLM) -> Tensor:
    return own_texts(small_lm, 16, LENGTH, seed=9)


def fit(lm: FrozenLM, texts: Tensor, init: LearnedOptimizer) -> FitResult:
    return prototok.fast_fit(lm, texts, recipe="learned", init=init, progress=False)


def test_it_begins_with_weights_and_start_of_the_optimizer(
    small_lm: FrozenLM, optimizer: LearnedOptimizer
) -> None:
    again = learn(small_lm, init=optimizer)  # a pool's first step trains nothing
    assert again.weights.keys() == optimizer.weights.keys()
    assert all(torch.equal(again.weights[name], t) for name, t in optimizer.weights.items())
    for name in ("mean", "std", "basis"):
        assert torch.equal(getattr(again.start, name), getattr(optimizer.start, name))
    assert again.start.provenance["init"] == "LearnedOptimizer trained at N = 3 for 120 steps"
    assert "init" not in optimizer.start.provenance


def test_a_larger_reach_changes_no_text_within_the_smaller(
    small_lm: FrozenLM, optimizer: LearnedOptimizer, unseen: Tensor
) -> None:
    wider = learn(small_lm, init=optimizer, lengths=(2 * LENGTH,))
    assert (optimizer.reach, wider.reach) == (LENGTH, 2 * LENGTH)
    assert wider.weights["along.weight"].shape[1] == 2 * optimizer.weights["along.weight"].shape[1]
    before, after = (fit(small_lm, unseen, init) for init in (optimizer, wider))
    assert torch.equal(before.steps, after.steps)
    torch.testing.assert_close(after.tokens.e, before.tokens.e, rtol=0, atol=1e-3)
    shorter = learn(small_lm, init=wider, lengths=(2,))  # it keeps what it can see
    assert shorter.reach == 2 * LENGTH


def test_from_the_gradient_alone_to_tokens_and_errors(small_lm: FrozenLM, prior: Prior) -> None:
    blind = learn(small_lm, prior=prior, reach=0)
    seeing = learn(small_lm, init=blind)
    assert (blind.reach, seeing.reach) == (0, LENGTH)
    assert not seeing.weights["along.weight"].any() and seeing.weights["token.weight"].any()


def test_a_curriculum_over_calls_pays(
    small_lm: FrozenLM, prior: Prior, optimizer: LearnedOptimizer
) -> None:
    longer = own_texts(small_lm, 16, LENGTH + 1, seed=9)
    options = {"lengths": (LENGTH + 1,), "steps": 40}
    steps = [
        float(fit(small_lm, longer, made).steps.float().mean())
        for made in (
            learn(small_lm, init=optimizer, **options),
            learn(small_lm, prior=prior, **options),
        )
    ]
    assert steps[0] < 0.7 * steps[1]


def test_it_goes_on_from_another_start(
    small_lm: FrozenLM, prior: Prior, optimizer: LearnedOptimizer
) -> None:
    other = replace(prior, mean=prior.mean + 0.1)
    made = learn(small_lm, prior=other, init=optimizer, steps=1, seed=5)
    assert torch.equal(made.start.mean, other.mean)
    assert torch.equal(optimizer.start.mean, prior.mean)
    assert torch.equal(made.network(small_lm).mean.cpu(), other.mean)
    # What the weights count in stays, and they go on.
    assert torch.equal(made.weights["scale"], optimizer.weights["scale"])
    fresh = learn(small_lm, prior=other, steps=1, seed=5).weights["first.weight"].float()
    of = optimizer.weights["first.weight"].float()
    assert float((made.weights["first.weight"].float() - of).norm()) < 0.1 * float(of.norm())
    assert float((fresh - of).norm()) > 0.1 * float(of.norm())


def test_every_other_text_starts_at_the_guess(
    small_lm: FrozenLM, optimizer: LearnedOptimizer, encoder: Encoder
) -> None:
    inputs = OneForward(Arrangement.parse("e m*"), prior=optimizer.start)
    recipe = LEARNED.at_width(small_lm.hidden_size, True)
    setup = Setup(small_lm, inputs, recipe, "auto", None, optimizer.network(small_lm))
    corpus = Corpus(list(TRAINED))
    made = Pool(setup, corpus, LENGTH, torch.Generator().manual_seed(0), encoder)
    made._replace(torch.arange(8))
    # Torch rounds by the size of the batch: as many texts as start there.
    guess = encoder.vectors(small_lm, list(made.slots.targets[1:8:2]))
    values = torch.stack([bank.values[:8, 0] for bank in made.slots.banks], dim=1)
    assert torch.equal(values[1::2], guess)
    away = (values[0::2, 0] - optimizer.start.mean[0]).abs() / optimizer.start.std[0]
    assert 0.5 < float(away.mean()) < 1.2  # as the prior spreads them
    # A text that the encoder does not take starts at the prior.
    assert Pool(setup, corpus, LENGTH + 1, torch.Generator(), encoder).guess is None


def test_it_trains_with_both(
    small_lm: FrozenLM, optimizer: LearnedOptimizer, encoder: Encoder, unseen: Tensor
) -> None:
    made = learn(small_lm, init=(encoder, optimizer), steps=20)
    begun = f"Encoder {encoder.training}; LearnedOptimizer {optimizer.training}"
    assert made.start.provenance["init"] == begun
    found = prototok.fast_fit(
        small_lm, unseen, recipe="learned", init=(encoder, made), progress=False
    )
    assert bool(found.exact.all())


def test_rows_under_way_and_their_updates_are_as_asked(
    small_lm: FrozenLM, prior: Prior, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[Pool] = []
    step, oldest = Pool.train_step, [0]

    def watched(self: Pool, optimizer: torch.optim.Optimizer) -> None:
        pools.append(self)
        step(self, optimizer)
        oldest[0] = max(oldest[0], int(self.slots.step.max()))

    monkeypatch.setattr(Pool, "train_step", watched)
    made = learn(small_lm, prior=prior, steps=12, positions=20 * LENGTH, horizon=5)
    assert pools[0].window.rows == 20 and oldest[0] == 5
    assert (made.start.provenance["positions"], made.start.provenance["horizon"]) == ("60", "5")


def test_the_rate_of_training_is_as_asked(small_lm: FrozenLM, prior: Prior) -> None:
    # Zero before the first update of AdamW, which is as long as its rate.
    made = [learn(small_lm, prior=prior, steps=2, **asked) for asked in ({}, {"rate": 2e-3})]
    usual, higher = (float(one.weights["blocks.0.down.weight"].abs().max()) for one in made)
    assert usual > 0 and higher / usual == pytest.approx(4.0, rel=0.02)
    assert made[1].start.provenance["rate"] == "0.002" and "rate" not in made[0].start.provenance


def test_vectors_that_are_held_near_lie_nearer(small_lm: FrozenLM, prior: Prior) -> None:
    texts = own_texts(small_lm, 8, LENGTH, seed=9)
    alone = replace(LEARNED, learned=5, max_steps=1)  # AdamW has one update
    out = []
    for near in (None, 50.0):
        made = learn(small_lm, prior=prior, steps=80, near=near)
        assert made.start.provenance.get("near") == (None if near is None else "50.0")
        found = prototok.fast_fit(small_lm, texts, recipe=alone, init=made, progress=False)
        away = torch.stack([found.tokens.e, found.tokens.m], 1) - prior.mean
        out.append(float(away.square().mean()))
    assert out[1] < 0.7 * out[0]


def test_a_checkpoint_of_another_beginning_is_refused(
    small_lm: FrozenLM, prior: Prior, optimizer: LearnedOptimizer, tmp_path: Path
) -> None:
    path = tmp_path / "training.safetensors"
    learn(small_lm, init=optimizer, checkpoint=path)
    with pytest.raises(ValueError, match="^checkpoint: .* is of a training with init"):
        learn(small_lm, prior=prior, checkpoint=path)


def test_what_does_not_go_together_is_refused(
    small_lm: FrozenLM, prior: Prior, optimizer: LearnedOptimizer, encoder: Encoder
) -> None:
    for options, message in (
        ({"init": prior}, "init: a Prior is given as prior"),
        ({"init": 3}, "init: int is not"),
        ({"prior": prior, "positions": 0}, "positions: 0 is not a positive integer"),
        ({"prior": prior, "horizon": 2.5}, "horizon: 2.5 is not a positive integer"),
        ({"prior": prior, "rate": 0}, "rate: 0 is not a positive number"),
        ({"prior": prior, "rate": float("nan")}, "rate: nan is not a positive number"),
        ({"prior": prior, "near": -1}, "near: -1 is negative or not a number"),
        ({"init": optimizer, "reach": LENGTH - 1}, "reach: 2 is less than the 3 of"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            learn(small_lm, **options)
    other = load(small_llama(hidden_size=16), dtype="float32")
    for init in (optimizer, encoder):
        with pytest.raises(ValueError, match="^init: fitted on"):
            learn(other, init=init)
