"""A fit in a batch is the fit alone; what is stored is what scored; sharing is joint."""

from __future__ import annotations

import dataclasses
import pickle
from collections import defaultdict

import pytest
import torch
from torch import Tensor

import prototok
from prototok import FrozenLM, Recipe
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots
from prototok.fitting.fast_fit import FitEvent
from prototok.fitting.recipe import PAPER
from prototok.results.arrangement import Arrangement
from support import assert_same_losses, losses_by_step

QUICK = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=400)


def losses_of(
    lm: FrozenLM, texts: list, steps: int, **options: object
) -> dict[int, dict[int, float]]:
    """Row → updates made → loss, of the first steps."""
    found = losses_by_step(lm, texts, recipe=Recipe(max_steps=steps, margin=1e9), **options)
    for losses in found.values():
        assert len(losses) == steps if lm.device.type == "cpu" else losses
    return found


def targets(count: int, length: int, vocabulary: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, length), generator=generator)


@pytest.mark.parametrize("arrangement", ["e m*", "e m*+1", "e* m*", "(e m)*", "e*", "e2 m*+2"])
def test_batched_losses_equal_single_fits(any_lm: FrozenLM, arrangement: str) -> None:
    texts = [row[: 3 + i % 5] for i, row in enumerate(targets(16, 8, any_lm.vocab_size))]
    together = losses_of(any_lm, texts, 20, arrangement=arrangement, batch_size=16)
    for i in (0, 3, 7, 15):
        alone = losses_of(any_lm, [texts[i]], 20, arrangement=arrangement)[0]
        # On CUDA another batch size is another kernel, with sums in another order.
        assert_same_losses(together[i], alone, any_lm, cpu=2e-5, cuda=2e-4)


def test_batched_results_equal_single_fits(any_lm: FrozenLM) -> None:
    texts = list(targets(16, 3, any_lm.vocab_size))
    together = prototok.fast_fit(any_lm, texts, recipe=QUICK, batch_size=16)
    for i in range(0, 16, 3):
        alone = prototok.fast_fit(any_lm, [texts[i]], recipe=QUICK)
        assert alone.accuracy.item() == together.accuracy[i].item()


def test_each_row_of_a_batch_has_the_cosines_of_its_own_length(any_lm: FrozenLM) -> None:
    texts = [row[:n] for n, row in zip((8, 6, 7), targets(3, 8, any_lm.vocab_size), strict=True)]
    plain = Recipe(lr=0.05, schedule="cosine", cycle=6, max_steps=20, margin=1e9)
    recipe = dataclasses.replace(plain, cycle_tokens=5)
    together = losses_by_step(any_lm, texts, recipe=recipe, batch_size=3)
    for i, text in enumerate(texts):
        # Cosines of 10 and 10, 8 and 12, 9 and 12 updates.
        cycle, rest = ((10, 10), (8, 12), (9, 12))[i]
        assert [recipe.end_of_cycle(step, len(text)) for step in (0, cycle)] == [
            cycle, min(cycle + rest, 20),
        ]  # fmt: skip
        alone = losses_by_step(any_lm, [text], recipe=recipe)[0]
        assert_same_losses(together[i], alone, any_lm, cpu=2e-5, cuda=2e-4)
        other = losses_by_step(any_lm, [text], recipe=plain)[0]
        assert together[i] != pytest.approx(other, rel=1e-3)


def test_the_length_of_a_row_moves_with_it(small_lm: FrozenLM) -> None:
    setup = Setup(small_lm, OneForward(Arrangement.parse("e m*")), QUICK, "auto", None)
    rows = [ids[:n] for n, ids in zip((8, 6, 7), targets(3, 8, 97), strict=True)]
    slots = Slots(setup, Room(3, 3, 8))
    slots.admit(make_groups(rows, [0], None, None))
    assert slots.tokens.tolist() == [8, 6, 7]
    slots.release([0])
    slots.admit(make_groups([rows[0]], [0], None, None))
    assert slots.tokens.tolist() == [6, 7, 8]


def test_slots_refill_without_changing_results(any_lm: FrozenLM) -> None:
    texts = [row[: 1 + i % 4] for i, row in enumerate(targets(12, 4, any_lm.vocab_size))]
    wide = prototok.fast_fit(any_lm, texts, recipe=QUICK, batch_size=12)
    narrow = prototok.fast_fit(any_lm, texts, recipe=QUICK, batch_size=3)
    assert torch.equal(wide.accuracy, narrow.accuracy)
    solved = wide.exact & narrow.exact
    assert int(solved.sum()) >= 8
    assert float((wide.steps - narrow.steps)[solved].abs().float().mean()) < 3


def test_losses_are_those_of_torch_adamw(any_lm: FrozenLM) -> None:
    """The paper's loop, written out with torch's own optimiser."""
    from prototok.fitting.engine.rows import initial_vectors, make_groups

    ids = targets(1, 6, any_lm.vocab_size)[0]
    e, m = initial_vectors(make_groups([ids], [0], None, None)[0], 1, any_lm.hidden_size, 1.0)
    e, m = e[0].requires_grad_(), m.requires_grad_()
    optimizer = torch.optim.AdamW([e, m], lr=0.01, betas=(0.9, 0.9), weight_decay=0.01)
    expected = []
    for _ in range(31):  # on CUDA a row goes on until it is looked at, without updates
        vectors = torch.cat([e, m.expand(5, -1)]).to(any_lm.device)
        logits = any_lm.logits(vectors[None])[0].cpu()
        loss = torch.nn.functional.cross_entropy(logits, ids, reduction="sum")
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    recipe = Recipe(**{**vars(PAPER), "max_steps": 30, "margin": 1e9})
    found = losses_by_step(any_lm, [ids], recipe=recipe)[0]
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-4)
    assert len(found) >= (3 if any_lm.device.type == "cpu" else 1)


def test_stored_vectors_are_the_ones_that_scored(small_lm: FrozenLM) -> None:
    """With a fixed learning rate the last vectors are rarely the best ones."""
    texts = targets(6, 7, small_lm.vocab_size)
    best: dict[int, int] = defaultdict(int)

    def note(event: FitEvent) -> None:
        for row, correct in zip(event.rows.tolist(), event.correct.tolist(), strict=True):
            best[row] = max(best[row], correct)

    recipe = Recipe(lr=0.5, max_steps=60)
    fit = prototok.fast_fit(small_lm, texts, recipe=recipe, callback=note)
    assert fit.correct[:, 0].tolist() == [best[i] for i in range(6)]
    decoded = prototok.decode(small_lm, fit.tokens)
    assert (decoded == texts).sum(1).tolist() == fit.correct[:, 0].tolist()


def test_early_stop_counts_the_updates_made(small_lm: FrozenLM) -> None:
    ids = targets(1, 2, small_lm.vocab_size)
    steps: list[int] = []
    fit = prototok.fast_fit(
        small_lm, ids, recipe=QUICK, callback=lambda event: steps.append(event.steps.item())
    )
    assert fit.exact.item()
    assert steps == list(range(fit.steps.item() + 1))


@pytest.mark.parametrize("share", ["m", "e"])
def test_sharing_is_joint_and_the_unit_ends_as_one(any_lm: FrozenLM, share: str) -> None:
    texts = targets(5, 2, any_lm.vocab_size)
    fit = prototok.fast_fit(
        any_lm, texts, share=share, group_size=2, seeds=2, recipe=QUICK, batch_size=5
    )
    tokens, width = fit.tokens, any_lm.hidden_size
    shapes = {"e": (3, width), "m": (3, width)}
    other = {"e": tokens.m, "m": tokens.e}[share]
    assert getattr(tokens, share).shape == shapes[share]
    assert other is not None and other.shape == (5, 2, width)
    assert tokens.groups is not None and tokens.groups.tolist() == [0, 0, 1, 1, 2]
    for group in ([0, 1], [2, 3], [4]):
        assert len(set(fit.steps[group].flatten().tolist())) == 1
    decoded = prototok.decode(any_lm, tokens).view(5, 2, 2)
    assert ((decoded == texts[:, None]).sum(-1) == fit.correct).all()


def test_shared_gradient_is_the_sum_over_the_group(any_lm: FrozenLM) -> None:
    """Two copies of one text share m, in one forward and taking turns."""
    ids = targets(1, 4, any_lm.vocab_size)
    single = losses_of(any_lm, [ids[0], ids[0]], 10, share="m", batch_size=2)
    turns = losses_of(any_lm, [ids[0], ids[0]], 10, share="m", batch_size=1)
    assert single[0] == pytest.approx(single[1], rel=1e-6)  # same targets, same seed, same e
    assert_same_losses(
        turns[0], single[0], any_lm, cpu=1e-4, cuda=1e-4
    )  # rows that take turns add up


def test_running_out_of_memory_halves_the_rows_and_loses_none(
    small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prototok.fitting.engine import step as step_module

    forward, refused = step_module.forward_backward, []

    def limited(lm: FrozenLM, slots: object, leaves: list, part: slice) -> object:
        if part.stop - part.start > 2:
            refused.append(part)
            raise torch.OutOfMemoryError("no room")
        return forward(lm, slots, leaves, part)

    texts = targets(7, 2, small_lm.vocab_size)
    expected = prototok.fast_fit(small_lm, texts, recipe=QUICK, batch_size=7)
    monkeypatch.setattr(step_module, "forward_backward", limited)
    found = prototok.fast_fit(small_lm, texts, recipe=QUICK, batch_size=7)
    assert refused
    assert torch.equal(found.accuracy, expected.accuracy)


def test_a_claim_that_does_not_hold_alone_goes_on(
    any_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prototok.fitting import fast_fit as module

    verify, refusals = module.verify, []

    def strict(*args: object) -> list[object]:
        (found,) = verify(*args)
        if len(refusals) < 2:
            refusals.append(found.margin)
            return [dataclasses.replace(found, accuracy=0.5, correct=1)]
        return [found]

    ids = targets(1, 2, any_lm.vocab_size)
    first = prototok.fast_fit(any_lm, ids, recipe=QUICK)
    monkeypatch.setattr(module, "verify", strict)
    fit = prototok.fast_fit(any_lm, ids, recipe=QUICK)
    assert len(refusals) == 2
    assert fit.exact.item() and fit.steps.item() > first.steps.item()
    assert fit.margin.item() >= 2 * refusals[0]


def test_interruption_returns_what_had_ended(small_lm: FrozenLM) -> None:
    texts = targets(8, 2, small_lm.vocab_size)
    seen: set[int] = set()

    def stop(event: FitEvent) -> None:
        seen.update(event.rows.tolist())
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(prototok.FitInterrupted) as caught:
        prototok.fast_fit(small_lm, texts, recipe=QUICK, batch_size=2, callback=stop)
    result, kept = caught.value.result, caught.value.texts
    assert result is not None and 1 <= len(kept) < 6
    assert result.tokens.texts == len(kept)
    assert [ids.tolist() for ids in result.targets] == [texts[t].tolist() for t in kept]
    other = pickle.loads(pickle.dumps(caught.value))  # as from another process
    assert other.texts == kept and torch.equal(
        other.result.tokens.vectors(0), result.tokens.vectors(0)
    )
