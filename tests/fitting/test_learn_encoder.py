"""`learn_encoder`: a network that says e and m of a text in one pass, its file, fits from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import prototok
from prototok import Encoder, FrozenLM, LearnedOptimizer, Prior
from prototok.fitting import learn_encoder as learning
from prototok.fitting.learn_shared import own_texts
from prototok.fitting.learned import guesses, pool, training
from prototok.fitting.recipe import FAST
from prototok.model.load import load
from tests.support import small_llama

LENGTH = 3
# As random as what this random model makes up.
TRAINED = torch.randint(97, (64, 12), generator=torch.Generator().manual_seed(1))
STILL = dataclasses.replace(FAST, prior_rate=1e-9, weight_decay=0.0, max_steps=1)


@pytest.fixture(scope="module")
def prior(small_lm: FrozenLM) -> Prior:
    return prototok.learn_shared(small_lm, length=LENGTH, steps=60, progress=False)


def learn(lm: FrozenLM, prior: Prior | None, **options: object) -> Encoder:
    """Train one that is small enough for a test."""
    given = {"texts": TRAINED, "lengths": (2, LENGTH), "steps": 300, "prior": prior}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guesses, "_POSITIONS", 64 * LENGTH)
        patch.setattr(learning, "_WIDTH", 192)
        patch.setattr(learning, "_DEPTH", 2)
        return prototok.learn_encoder(lm, progress=False, **(given | options))


@pytest.fixture(scope="module")
def encoder(small_lm: FrozenLM, prior: Prior) -> Encoder:
    return learn(small_lm, prior)


@pytest.fixture(scope="module")
def unseen(small_lm: FrozenLM) -> Tensor:
    return own_texts(small_lm, 48, LENGTH, seed=9)


def silent(encoder: Encoder) -> Encoder:
    """The same as if it had learned nothing: it says the mean of the prior."""
    weights = {
        name: torch.zeros_like(tensor) if name.startswith("last") else tensor
        for name, tensor in encoder.weights.items()
    }
    return dataclasses.replace(encoder, weights=weights)


def same(a: Encoder, b: Encoder) -> bool:
    return all(torch.equal(tensor, b.weights[name]) for name, tensor in a.weights.items())


def test_more_tokens_than_the_mean_of_the_prior(
    small_lm: FrozenLM, encoder: Encoder, unseen: Tensor
) -> None:
    found = prototok.encode(small_lm, unseen, encoder, progress=False)
    nothing = prototok.encode(small_lm, unseen, silent(encoder), progress=False)
    assert float(found.accuracy.mean()) > float(nothing.accuracy.mean()) + 0.2
    assert float(found.loss.mean()) < 0.8 * float(nothing.loss.mean())


def test_what_encode_says_is_what_decoding_gives(
    small_lm: FrozenLM, encoder: Encoder, unseen: Tensor, tmp_path: Path
) -> None:
    found = prototok.encode(small_lm, unseen, encoder, progress=False)
    e, m = encoder(unseen)
    assert found.tokens.m is not None
    assert torch.equal(found.tokens.e[:, 0], e) and torch.equal(found.tokens.m[:, 0], m)
    right = prototok.decode(small_lm, found) == unseen
    assert torch.equal(found.correct[:, 0], right.sum(1))
    assert torch.equal(found.exact[:, 0], right.all(1))
    assert int(found.steps.sum()) == 0
    found.save(tmp_path)
    assert torch.equal(prototok.FitResult.load(tmp_path).tokens.e, found.tokens.e)


def test_a_text_does_not_depend_on_the_others(encoder: Encoder, unseen: Tensor) -> None:
    texts = [ids[: 1 + i % LENGTH] for i, ids in enumerate(unseen[:9])]
    together = torch.stack(encoder(texts), dim=1)
    for i, ids in enumerate(texts):
        alone = torch.stack(encoder([ids]), dim=1)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    assert not torch.equal(encoder([[1, 2]])[0], encoder([[1, 2, 0]])[0])  # 0 pads, and is a token


def test_a_fit_starts_at_what_the_encoder_says(
    small_lm: FrozenLM, encoder: Encoder, unseen: Tensor
) -> None:
    texts = unseen[:6]
    e, m = encoder(texts)
    found = prototok.fast_fit(
        small_lm, texts, recipe=STILL, init=encoder, seeds=[0, 3], progress=False
    )
    assert found.tokens.m is not None
    torch.testing.assert_close(found.tokens.e[:, 0], e, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.tokens.m[:, 0], m, rtol=0, atol=1e-6)
    away = (found.tokens.e[:, 1] - e).std() / encoder.start.std[0].square().mean().sqrt()
    assert 0.7 < float(away) < 1.4


@pytest.mark.parametrize("share", ["m", "e"])
def test_a_shared_vector_starts_at_the_mean(
    small_lm: FrozenLM, encoder: Encoder, unseen: Tensor, share: str
) -> None:
    e, m = encoder(unseen[:4])
    found = prototok.fast_fit(
        small_lm, unseen[:4], recipe=STILL, init=encoder, share=share, group_size=2, progress=False
    ).tokens
    assert found.m is not None
    mean = {"e": e, "m": m}[share].unflatten(0, (2, 2)).mean(1)
    torch.testing.assert_close(getattr(found, share), mean, rtol=0, atol=1e-6)
    own = found.e[:, 0] if share == "m" else found.m[:, 0]
    torch.testing.assert_close(own, e if share == "m" else m, rtol=0, atol=1e-6)


def test_a_fit_from_it_takes_fewer_steps(
    small_lm: FrozenLM, encoder: Encoder, prior: Prior, unseen: Tensor
) -> None:
    recipe = dataclasses.replace(FAST, spreads=0.0)  # this model's rounding is large
    steps = []
    for init in (encoder, prior):
        found = prototok.fast_fit(small_lm, unseen[:24], recipe=recipe, init=init, progress=False)
        assert bool(found.exact.all())
        steps.append(float(found.steps.float().median()))
    assert steps[0] < 0.8 * steps[1]


def test_an_optimizer_goes_on_from_it(
    small_lm: FrozenLM, encoder: Encoder, prior: Prior, unseen: Tensor
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "_POSITIONS", 64 * LENGTH)
        optimizer = prototok.learn_optimizer(
            small_lm, TRAINED, lengths=(LENGTH,), steps=3, prior=prior, progress=False
        )
    assert isinstance(optimizer, LearnedOptimizer)
    both = (encoder, optimizer)
    found = prototok.fast_fit(small_lm, unseen[:4], recipe="learned", init=both, progress=False)
    assert bool(found.exact.all())
    with pytest.raises(ValueError, match="^init: a LearnedOptimizer is for recipe 'learned'"):
        prototok.fast_fit(small_lm, unseen[:4], init=both)


def test_same_seed_same_network(small_lm: FrozenLM, prior: Prior) -> None:
    made = [
        learn(load(small_llama(), dtype="float32"), prior, steps=3, seed=seed) for seed in (0, 0, 1)
    ]
    assert same(made[0], made[1]) and not same(made[0], made[2])


def test_training_goes_on_as_if_it_had_never_stopped(
    small_lm: FrozenLM, prior: Prior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "training.safetensors"
    monkeypatch.setattr(training, "_KEEP_EVERY", 0.0)
    step, made = guesses.Guesses.train_step, []

    def interrupted(self: guesses.Guesses, *given: object) -> None:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(1)
        step(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(guesses.Guesses, "train_step", interrupted)
        learn(small_lm, prior, steps=9, checkpoint=path)
    counted: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            guesses.Guesses, "train_step", lambda self, *g: (counted.append(1), step(self, *g))
        )
        resumed = learn(small_lm, prior, steps=9, checkpoint=path)
    assert len(counted) == 4
    assert same(resumed, learn(small_lm, prior, steps=9))
    with pytest.raises(ValueError, match="^checkpoint: .* is of a training with seed"):
        learn(small_lm, prior, steps=9, checkpoint=path, seed=1)


def test_the_file_gives_the_same_vectors(
    small_lm: FrozenLM, encoder: Encoder, unseen: Tensor, tmp_path: Path
) -> None:
    encoder.save(tmp_path / "encoder.safetensors")
    again = Encoder.from_pretrained(tmp_path)
    assert same(encoder, again) and again.start.provenance == encoder.start.provenance
    with pytest.raises(ValueError, match="^encoder: one from a file has no model"):
        again(unseen)
    assert torch.equal(again.on(small_lm)(unseen)[0], encoder(unseen)[0])
    assert 'Encoder.from_pretrained("me/mine")' in encoder._card("me/mine")
    with pytest.raises(ValueError, match="not a prior"):
        Prior.load(tmp_path / "encoder.safetensors")


def test_behind_a_prefix(small_lm: FrozenLM, prior: Prior) -> None:
    made = learn(small_lm, prior, prefix=[5, 6], lengths=(2,), steps=3)
    assert made.start.prefix is not None and made.start.prefix.ids == (5, 6)
    for found in (
        prototok.encode(small_lm, [[1, 2]], made, progress=False),
        prototok.fast_fit(small_lm, [[1, 2]], init=made, recipe=STILL, progress=False),
    ):
        assert found.tokens.prefix is not None and found.tokens.prefix.ids == (5, 6)


def test_a_model_that_keeps_its_hidden_states_to_itself(prior: Prior) -> None:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=40)
    general = load(GPT2LMHeadModel(config).eval(), dtype="float32")
    assert general.body.head is None
    start = dataclasses.replace(prior, model=general.identity)
    made = learn(general, start, lengths=(1,), steps=60)
    found = prototok.encode(general, TRAINED[:32, :1], made, progress=False)
    nothing = prototok.encode(general, TRAINED[:32, :1], silent(made), progress=False)
    assert float(found.loss.mean()) < float(nothing.loss.mean())


def test_what_does_not_go_together_is_refused(
    small_lm: FrozenLM, prior: Prior, encoder: Encoder
) -> None:
    long = "^texts: text 1 has 4 tokens, more than the 3 that this encoder takes"
    texts = [[1, 2], [1, 2, 3, 4]]
    for call in (
        lambda: encoder(texts),
        lambda: prototok.encode(small_lm, texts, encoder),
        lambda: prototok.fast_fit(small_lm, texts, init=encoder),
    ):
        with pytest.raises(ValueError, match=long):
            call()
    other = load(small_llama(hidden_size=16), dtype="float32")
    with pytest.raises(ValueError, match="^encoder: fitted on"):
        encoder.on(other)
    with pytest.raises(ValueError, match="^encoder: fitted on"):
        prototok.encode(other, [[1]], encoder)
    with pytest.raises(ValueError, match="^init: fitted on"):
        prototok.fast_fit(other, [[1]], init=encoder)
    with pytest.raises(ValueError, match="^arrangement: an Encoder is for 'e m"):
        prototok.fast_fit(small_lm, [[1]], init=encoder, arrangement="e*")
    with pytest.raises(ValueError, match="^recipe: 'learned' needs init"):
        prototok.fast_fit(small_lm, [[1]], init=encoder, recipe="learned")
    with pytest.raises(ValueError, match="^init: tuple is not"):
        prototok.fast_fit(small_lm, [[1]], init=(encoder, prior))
    with pytest.raises(ValueError, match="^encoder: Prior is not an Encoder"):
        prototok.encode(small_lm, [[1]], prior)
    for options, name in (
        ({"texts": [[1, 2, 3], [1, 2]]}, "texts: text 1 has 2 tokens"),
        ({"lengths": (3, 2)}, "lengths"), ({"lengths": ()}, "lengths"), ({"steps": 0}, "steps"),
        ({"backend": "cuda"}, "backend"), ({"seed": 0.5}, "seed"), ({"lengths": (41,)}, "length"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}"):
            learn(small_lm, prior, **options)
