"""`learn_optimizer`: a network that makes the first updates of a fit, its file, and its end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel

import prototok
from prototok import Encoder, FitResult, FrozenLM, LearnedOptimizer, Prior, Recipe
from prototok.fitting.engine.learned import hand_over
from prototok.fitting.engine.rows import Group, Row, make_groups
from prototok.fitting.engine.slots import Room, Slots
from prototok.fitting.engine.step import step
from prototok.fitting.fast_fit import one_forward
from prototok.fitting.learn_shared import own_texts
from prototok.fitting.learned import pool, training
from prototok.fitting.learned.pool import Corpus, Pool
from prototok.fitting.recipe import LEARNED
from prototok.fitting.shipped import shipped
from prototok.model.load import BUILT_IN, load, path_of
from prototok.results.arrangement import Arrangement
from prototok_kernels.backend import this_machine
from tests.fitting.engine.test_lagging_polls import as_on_cuda
from tests.support import small_llama

LENGTH = 3
# As random as what this random model makes up.
TRAINED = torch.randint(97, (64, 12), generator=torch.Generator().manual_seed(1))
BLIND = dataclasses.replace(LEARNED, learned=1)


@pytest.fixture(scope="module")
def prior(small_lm: FrozenLM) -> Prior:
    return prototok.learn_shared(small_lm, length=LENGTH, steps=60, progress=False)


def learn(lm: FrozenLM, prior: Prior | None, **options: object) -> LearnedOptimizer:
    patch = pytest.MonkeyPatch()
    patch.setattr(pool, "_POSITIONS", 64 * LENGTH)
    given = {"texts": TRAINED, "lengths": (2, LENGTH), "steps": 300, "prior": prior}
    try:
        return prototok.learn_optimizer(lm, progress=False, **(given | options))
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def optimizer(small_lm: FrozenLM, prior: Prior) -> LearnedOptimizer:
    return learn(small_lm, prior)


@pytest.fixture(scope="module")
def unseen(small_lm: FrozenLM) -> torch.Tensor:
    return own_texts(small_lm, 16, LENGTH, seed=9)


def fit(lm: FrozenLM, texts: object, init: object, **options: object) -> FitResult:
    given = {"recipe": LEARNED, "init": init, "progress": False}
    return prototok.fast_fit(lm, texts, **(given | options))


def broken(optimizer: LearnedOptimizer, bias: float) -> LearnedOptimizer:
    """The same with updates that lead nowhere."""
    wrong = torch.full_like(optimizer.weights["last.bias"], bias)
    return dataclasses.replace(optimizer, weights=optimizer.weights | {"last.bias": wrong})


def test_fewer_updates_than_adamw_and_no_text_less(
    small_lm: FrozenLM, prior: Prior, optimizer: LearnedOptimizer, unseen: torch.Tensor
) -> None:
    recipe = dataclasses.replace(LEARNED, spreads=0.0)  # this model's rounding is large
    fast = fit(small_lm, unseen, prior, recipe=dataclasses.replace(recipe, learned=0))
    found = fit(small_lm, unseen, optimizer, recipe=recipe)
    assert bool(found.exact.all()) and bool(fast.exact.all())
    # What was trained depends on the processor: without AVX-512 it has taken 10 updates for 14.
    most = 0.6 if "avx512" in this_machine().instruction_sets else 0.8
    assert float(found.steps.float().median()) < most * float(fast.steps.float().median())
    assert float(found.margin.min()) >= 0.19


def test_same_seed_same_network(small_lm: FrozenLM, prior: Prior) -> None:
    again = [
        learn(load(small_llama(), dtype="float32"), prior, steps=3, seed=seed) for seed in (0, 0, 1)
    ]
    same = [
        [torch.equal(a.weights[name], again[0].weights[name]) for name in a.weights if "w" in name]
        for a in again
    ]
    assert all(same[1]) and not all(same[2])


@pytest.mark.parametrize("bias", [0.0, 1e30])
def test_adamw_takes_over_where_the_network_fails(
    small_lm: FrozenLM, optimizer: LearnedOptimizer, unseen: torch.Tensor, bias: float
) -> None:
    """Updates of zero, and as large as they get."""
    useless = {
        name: torch.zeros_like(t) if name.startswith("last") else t
        for name, t in optimizer.weights.items()
    }
    init = broken(dataclasses.replace(optimizer, weights=useless), bias)
    found = fit(small_lm, unseen[:8], init, recipe=BLIND)
    assert bool(found.exact.all())
    assert int(found.steps.min()) > 3


def test_adamw_starts_as_new_from_the_best_vectors(
    small_lm: FrozenLM, optimizer: LearnedOptimizer
) -> None:
    recipe = dataclasses.replace(LEARNED, learned=5)
    setup = one_forward(small_lm, Arrangement.parse("e m*"), recipe, optimizer, "auto", None)
    slots = Slots(setup, Room(3, 3, LENGTH))
    ids = torch.tensor([1, 2, 3])
    slots.admit([Group(g, (Row(g, g, 0, ids),), None) for g in range(3)])
    slots.step[:] = 9
    slots.progressed_at[:] = torch.tensor([4, 5, 4])  # the second moved on since, the third is done
    slots.done[2] = True
    for bank in slots.banks:
        bank.best.fill_(7.0)
        bank.adam.exp_avg.fill_(1.0)
        bank.adam.step.fill_(9)
    before = slots.banks[0].values.clone()
    none = torch.zeros(3, dtype=torch.bool)
    assert hand_over(slots, slots.window, none, none).tolist() == [True, False, False]
    assert slots.by_network.tolist() == [False, True, True]
    e, _ = slots.banks
    assert torch.equal(e.values[0], e.best[0]) and torch.equal(e.values[1:], before[1:])
    assert e.adam.step.tolist() == [0, 9, 9] and float(e.adam.exp_avg[0].sum()) == 0
    slots.step[:] = 12
    assert slots.clock.tolist() == [3, 0, 0]
    # Not finite: at once, and it has not failed.
    assert hand_over(slots, slots.window, none, ~none).tolist() == [False, True, False]


def test_adamw_goes_further_where_the_network_led_far_out(
    small_lm: FrozenLM, optimizer: LearnedOptimizer
) -> None:
    recipe = dataclasses.replace(LEARNED, learned=5, warmup=0, weight_decay=0.0)
    setup = one_forward(small_lm, Arrangement.parse("e m*"), recipe, optimizer, "auto", None)
    assert setup.network is not None
    slots = Slots(setup, Room(3, 3, LENGTH))
    ids = torch.tensor([1, 2, 3])
    slots.admit([Group(g, (Row(g, 0, 0, ids),), None) for g in range(3)])
    none = torch.zeros(3, dtype=torch.bool)
    slots.step[:] = 9
    slots.progressed_at[:] = torch.tensor([4, 4, 9])  # the third is still the network's
    out = 4 * float(setup.network.scale)  # four times as far as good vectors lie
    for bank, mean in zip(slots.banks, setup.network.mean, strict=True):
        bank.best[:] = mean + torch.tensor([0.5, 1.0, 1.0])[:, None, None] * out / 2
    before = [bank.values.clone() for bank in slots.banks]
    assert hand_over(slots, slots.window, none, none).tolist() == [True, True, False]
    for bank, was in zip(slots.banks, before, strict=True):
        assert bank.longer.tolist() == pytest.approx([0.0, 1.0, 0.0])
        bank.values.copy_(was[:1].expand_as(was))  # the same gradient for all
    step(small_lm, slots, 3)
    for bank, was in zip(slots.banks, before, strict=True):
        near, far, _ = (bank.values - was[:1])[:, 0]
        torch.testing.assert_close(far, 2 * near, rtol=1e-3, atol=1e-6)
    slots.release([0])
    assert [bank.longer.tolist() for bank in slots.banks] == [pytest.approx([1.0, 0.0, 0.0])] * 2


def test_adamw_goes_on_cold_from_what_the_network_left_right(
    small_lm: FrozenLM, optimizer: LearnedOptimizer
) -> None:
    recipe = dataclasses.replace(LEARNED, learned=5, cold=0.1, warmup=0)
    setup = one_forward(small_lm, Arrangement.parse("e m*"), recipe, optimizer, "auto", None)
    slots = Slots(setup, Room(2, 2, LENGTH))
    ids = torch.tensor([1, 2, 3])
    slots.admit([Group(g, (Row(g, g, 0, ids),), None) for g in range(2)])
    slots.step[:] = 9
    slots.progressed_at[:] = 4
    slots.row_correct[:] = torch.tensor([3, 2])
    none = torch.zeros(2, dtype=torch.bool)
    assert hand_over(slots, slots.window, none, none).all()
    lr, full = setup.recipe.lr, setup.recipe.lr_at(torch.arange(10), 3)
    slots.step[:] = 9 + 8  # for as many updates as the network made
    assert slots.rate_after(slots.clock).tolist() == pytest.approx([0.1 * lr, float(full[8])])
    slots.step[:] = 9 + 9
    assert slots.rate_after(slots.clock).tolist() == [float(full[9])] * 2


def test_rows_do_not_influence_each_other(
    small_lm: FrozenLM, optimizer: LearnedOptimizer, unseen: torch.Tensor
) -> None:
    texts = [ids[: 1 + i % LENGTH] for i, ids in enumerate(unseen[:9])]
    together = fit(small_lm, texts, optimizer, batch_size=4)
    for i, ids in enumerate(texts):
        alone = fit(small_lm, [ids], optimizer)
        assert abs(int(alone.steps) - int(together.steps[i])) <= 1
        if int(alone.steps) == int(together.steps[i]):
            torch.testing.assert_close(alone.tokens.e[0], together.tokens.e[i], rtol=0, atol=1e-2)


@pytest.mark.parametrize("share", ["m", "e"])
def test_a_vector_may_be_shared(
    small_lm: FrozenLM, optimizer: LearnedOptimizer, share: str
) -> None:
    texts = [[1, 2], [1, 3], [4, 5], [4, 6]]  # what follows e alone is the same in a group
    found = fit(small_lm, texts, optimizer, share=share, group_size=2)
    assert bool(found.exact.all())
    kept = getattr(found.tokens, share)
    assert kept is not None and len(kept) == 2


def test_a_folder_of_the_hub_is_read(optimizer: LearnedOptimizer, tmp_path: Path) -> None:
    optimizer.save(tmp_path / "optimizer.safetensors")
    again = LearnedOptimizer.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.weights[n]) for n, tensor in optimizer.weights.items())
    assert 'LearnedOptimizer.from_pretrained("me/mine")' in optimizer._card("me/mine")


def test_longer_than_it_ever_saw(small_lm: FrozenLM, optimizer: LearnedOptimizer) -> None:
    found = fit(small_lm, own_texts(small_lm, 4, LENGTH + 2, seed=5), optimizer)
    fast = fit(small_lm, own_texts(small_lm, 4, LENGTH + 2, seed=5), optimizer.start, recipe="fast")
    assert torch.equal(found.exact, fast.exact)


def test_flags_read_late_as_on_cuda(
    small_lm: FrozenLM, optimizer: LearnedOptimizer, unseen: torch.Tensor
) -> None:
    at_once = fit(small_lm, unseen[:6], optimizer, batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        as_on_cuda(patch)
        late = fit(small_lm, unseen[:6], optimizer, batch_size=4)
    assert bool(late.exact.all()) and bool(at_once.exact.all())
    assert int((late.steps - at_once.steps).abs().max()) <= 2


def test_behind_a_prefix(small_lm: FrozenLM, prior: Prior) -> None:
    learned = learn(small_lm, prior, prefix=[5, 6], lengths=(2,), steps=3)
    assert learned.start.prefix is not None and learned.start.prefix.ids == (5, 6)
    found = fit(small_lm, [[1, 2]], learned)
    assert found.tokens.prefix is not None and found.exact.item()


def test_gradient_alone(small_lm: FrozenLM, prior: Prior, unseen: torch.Tensor) -> None:
    learned = learn(small_lm, prior, reach=0, steps=20)
    assert not any(name.startswith("along") for name in learned.weights)
    assert bool(fit(small_lm, unseen[:4], learned).exact.all())


def test_a_model_that_keeps_its_hidden_states_to_itself(
    prior: Prior, optimizer: LearnedOptimizer
) -> None:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=40)
    general = load(GPT2LMHeadModel(config).eval(), dtype="float32")
    assert general.body.head is None
    start = dataclasses.replace(prior, model=general.identity)
    seeing = dataclasses.replace(optimizer, start=start)
    with pytest.raises(ValueError, match="^init: this LearnedOptimizer reads errors"):
        fit(general, [[1, 2]], seeing)
    blind = learn(general, start, steps=2)
    assert not any(name.startswith("along") for name in blind.weights)
    assert bool(fit(general, [[1]], blind).exact.all())


def test_training_holds_vectors_near_where_fits_start(
    small_lm: FrozenLM, optimizer: LearnedOptimizer
) -> None:
    """The signal is the gradient of log(0.3 + nats) and of the mean square distance, in spreads."""
    setup = one_forward(small_lm, Arrangement.parse("e m*"), LEARNED, optimizer, "auto", None)
    corpus, generator = Corpus([TRAINED[0]]), torch.Generator().manual_seed(0)
    made = Pool(setup, corpus, LENGTH, generator, near=2.0)
    slots, network = made.slots, made.network
    rows = made.window.rows
    for bank in slots.banks:
        bank.values.normal_(generator=torch.Generator().manual_seed(3))
        bank.grad.normal_(generator=torch.Generator().manual_seed(4))
    slots.loss[:] = torch.linspace(1, 9, rows)
    good = torch.arange(rows) != 1
    pending = torch.zeros(rows, 2, small_lm.hidden_size, requires_grad=True)
    made._learn(torch.optim.SGD(network.parameters(), lr=0.0), pending, good)
    # The same by autograd, of a loss that has the gradient at hand and no more.
    moved = torch.zeros_like(pending).requires_grad_()
    t = LEARNED.temperature
    nats, square = t * slots.loss / LENGTH, torch.zeros(rows)
    for k, (bank, mean) in enumerate(zip(slots.banks, network.mean, strict=True)):
        move = bank.turned_back(moved[:, k])
        nats = nats + t / LENGTH * (bank.grad[:, 0] * move).sum(1)
        out = (bank.values[:, 0] + move - mean) / network.scale
        square = square + out.square().mean(1) / 2  # of e and m together
    total = ((0.3 + nats).log() + 2 * square)[good].sum() / rows
    total.backward()
    assert pending.grad is not None and moved.grad is not None
    torch.testing.assert_close(pending.grad, moved.grad, rtol=1e-4, atol=1e-7)


def test_the_file_gives_the_same_fit(
    small_lm: FrozenLM, optimizer: LearnedOptimizer, unseen: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "optimizer.safetensors"
    optimizer.save(path)
    again = LearnedOptimizer.load(path)
    assert again.start.provenance == optimizer.start.provenance
    assert again.weights.keys() == optimizer.weights.keys()
    assert all(torch.equal(again.weights[name], t) for name, t in optimizer.weights.items())
    for name in ("mean", "std", "basis"):
        assert torch.equal(getattr(again.start, name), getattr(optimizer.start, name))
    assert bool(fit(small_lm, unseen[:4], again).exact.all())
    with pytest.raises(ValueError, match="not a prior"):
        Prior.load(path)
    other = dataclasses.replace(optimizer, weights=optimizer.weights | {"scale": torch.tensor(2)})
    other.save(path)
    with pytest.raises(ValueError, match="scale is I64"):
        LearnedOptimizer.load(path)


def test_training_goes_on_from_where_it_was_kept(
    small_lm: FrozenLM, prior: Prior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "training.safetensors"
    monkeypatch.setattr(training, "_KEEP_EVERY", 0.0)
    made: list[int] = []
    step = Pool.train_step

    def interrupted(self: Pool, optimizer: torch.optim.Optimizer) -> None:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(1)
        step(self, optimizer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pool, "train_step", interrupted)
        learn(small_lm, prior, steps=9, checkpoint=path)
    with safe_open(path, "pt") as file:
        half = file.get_tensor("last.weight")
        moments = file.get_tensor("exp_avg_sq of last.weight")
        assert file.get_tensor("step of last.weight") == 3  # a pool's first step trains nothing
    assert float(moments.sum()) > 0
    counted: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "train_step", lambda self, opt: (counted.append(1), step(self, opt)))
        whole = learn(small_lm, prior, steps=9, checkpoint=path)
    assert len(counted) == 4
    moved = (whole.weights["last.weight"].float() - half).abs().max()
    assert 0 < float(moved) < 1e-3  # a few small updates away, not from the beginning again
    again = learn(small_lm, prior, steps=9, checkpoint=path)  # nothing is left to do
    assert torch.equal(again.weights["last.weight"], whole.weights["last.weight"])
    for options in ({"seed": 1}, {"steps": 8}, {"lengths": (1, LENGTH)}):
        with pytest.raises(ValueError, match="^checkpoint: .* is of a training with"):
            learn(small_lm, prior, **({"steps": 9, "checkpoint": path} | options))


def test_what_does_not_go_together_is_refused(
    small_lm: FrozenLM, prior: Prior, optimizer: LearnedOptimizer
) -> None:
    texts = [[1, 2]]
    with pytest.raises(ValueError, match="^init: a LearnedOptimizer is for recipe 'learned'"):
        fit(small_lm, texts, optimizer, recipe="fast")
    for init in (None, prior):
        with pytest.raises(ValueError, match="^recipe: 'learned' needs init"):
            fit(small_lm, texts, init)
    with pytest.raises(ValueError, match="^arrangement: recipe 'learned' is for 'e m"):
        fit(small_lm, texts, optimizer, arrangement="e*")
    with pytest.raises(ValueError, match="^recipe: 'learned' needs init"):
        prototok.autoregressive.fit(small_lm, texts, recipe="learned")
    other = load(small_llama(hidden_size=16), dtype="float32")
    with pytest.raises(ValueError, match="^init: fitted on"):
        fit(other, texts, optimizer)
    for options, name in (
        ({"texts": [[1, 2, 3], [1, 2]]}, "texts: text 1 has 2 tokens"),
        ({"lengths": (3, 2)}, "lengths"), ({"lengths": ()}, "lengths"), ({"reach": -1}, "reach"),
        ({"backend": "cuda"}, "backend"), ({"steps": 0}, "steps"), ({"seed": 0.5}, "seed"),
        ({"lengths": (41,)}, "length"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}"):
            learn(small_lm, prior, **options)


def test_a_recipe_of_ones_own_keeps_what_it_says(
    small_lm: FrozenLM, optimizer: LearnedOptimizer
) -> None:
    still = dataclasses.replace(LEARNED, m_rate=0.0, max_steps=5, margin=1e9)
    found = fit(small_lm, [[1, 2, 3]], optimizer, recipe=still)
    assert found.tokens.m is not None
    torch.testing.assert_close(found.tokens.m[0, 0], optimizer.start.mean[1])
    assert Recipe().learned == 0


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_models_bring_theirs(name: str) -> None:
    """They are what is used where none is given, and worth having."""
    lm = load(name)
    encoder, optimizer = shipped(Encoder, lm), shipped(LearnedOptimizer, lm)
    for network in (encoder, optimizer):
        assert network is not None and network.model.fingerprint == lm.identity.fingerprint
        assert (Path(path_of(name)) / network._file).stat().st_size < 10e6
    ids = lm.encode((Path(path_of(name)) / "held_out.txt").read_text())
    texts = [ids[i : i + 8] for i in range(0, 128, 8)]
    fast = prototok.fast_fit(lm, texts, progress=False)
    found = prototok.fast_fit(lm, texts, recipe="learned", progress=False)
    assert bool(found.exact.all()) and bool(fast.exact.all())
    assert float(found.steps.float().median()) < 0.3 * float(fast.steps.float().median())
    both = (encoder, optimizer)
    named = prototok.fast_fit(lm, texts, recipe="learned", init=both, progress=False)
    assert torch.equal(named.tokens.e, found.tokens.e)
    guesses = prototok.encode(lm, texts, progress=False)
    assert float(guesses.accuracy.mean()) > 0.4


def test_a_text_too_long_for_the_encoder_starts_from_the_prior() -> None:
    lm = load("tiny-neox")
    ids = lm.encode((Path(path_of("tiny-neox")) / "held_out.txt").read_text())
    texts = [ids[:9], ids[20:28]]
    encoder, optimizer = shipped(Encoder, lm), shipped(LearnedOptimizer, lm)
    assert encoder is not None
    groups = make_groups([torch.tensor(text) for text in texts], [0], None, None)
    starts = [group.rows[0].start for group in encoder.started(lm, groups, shorter=True)]
    assert starts[0] is None and starts[1] is not None
    assert torch.equal(starts[1], torch.stack(encoder.on(lm)(texts[1:])).squeeze(1))
    found = prototok.fast_fit(lm, texts, recipe="learned", progress=False)
    assert found.exact.all() and found.steps[1] < found.steps[0]
    with pytest.raises(ValueError, match="text 0 has 9 tokens"):
        prototok.fast_fit(lm, texts, recipe="learned", init=(encoder, optimizer), progress=False)


def test_other_models_bring_none(small_lm: FrozenLM) -> None:
    assert shipped(LearnedOptimizer, small_lm) is None and shipped(Encoder, small_lm) is None
    with pytest.raises(ValueError, match="^encoder: none comes with"):
        prototok.encode(small_lm, [[1, 2]])
