"""Short texts do not pay for long ones, and buckets change no result."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

import prototok
from prototok import FrozenLM, Recipe
from prototok.fitting.engine import buckets as module
from prototok.fitting.engine import step as step_module
from prototok.fitting.engine.buckets import Bucket, make_buckets
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Slots
from prototok.results.arrangement import Arrangement

RECIPE = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=60)
PAIR = OneForward(Arrangement.parse("e m*"))


def texts_of(lengths: list[int], vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]


def buckets_of(
    lm: FrozenLM, lengths: list[int], batch_size: int | None, share: str | None = None
) -> list[Bucket]:
    groups = make_groups(texts_of(lengths, 97), [0], share, 2 if share else None)
    return list(make_buckets(Setup(lm, PAIR, RECIPE, "auto", batch_size), groups))


@pytest.fixture
def no_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a forward of one position were as efficient as a large one."""
    monkeypatch.setitem(module._FEW, "cpu", 1)


def test_lengths_that_differ_part(small_lm: FrozenLM, no_few: None) -> None:
    found = buckets_of(small_lm, [8, 30, 32, 9, 31, 7, 4, 16], 4)
    assert [[group.length for group in b.groups] for b in found] == [
        [32, 31, 30], [16], [9, 8, 7], [4],
    ]  # fmt: skip
    assert [b.length for b in found] == [32, 16, 9, 4]
    assert [b.rows for b in found] == [3, 1, 3, 1]


def test_few_positions_stay_together(small_lm: FrozenLM) -> None:
    """Sixteen rows of 32 are 512 positions; before that many, another row is nearly free."""
    mixed = buckets_of(small_lm, [32] * 4 + [8] * 4, None)
    assert len(mixed) == 1
    many = buckets_of(small_lm, [32] * 16 + [8] * 4, None)
    assert [len(b.groups) for b in many] == [16, 4]
    # Where the caller allows no more rows than these, waiting for others is worth nothing.
    narrow = buckets_of(small_lm, [32] * 4 + [8] * 4, 4)
    assert [len(b.groups) for b in narrow] == [4, 4]


def test_sharing_groups_stay_whole(small_lm: FrozenLM, no_few: None) -> None:
    found = buckets_of(small_lm, [32, 4, 32, 4, 4, 4, 5, 5], 8, "m")
    assert [[len(group.rows) for group in b.groups] for b in found] == [[2, 2], [2, 2]]
    assert [group.index for b in found for group in b.groups] == [0, 1, 3, 2]


def test_short_rows_take_more_at_once(small_lm: FrozenLM) -> None:
    found = buckets_of(small_lm, [32] * 300 + [8] * 300, None)
    assert [(b.length, b.rows) for b in found] == [(32, 64), (8, 256)]


@pytest.mark.parametrize("share", [None, "m"])
def test_results_do_not_depend_on_the_buckets(
    small_lm: FrozenLM, share: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [2, 8, 3, 8, 1, 2, 7, 3, 1, 8]
    texts = texts_of(lengths, small_lm.vocab_size)
    positions: list[int] = []
    hidden = step_module._hidden

    def counted(lm: FrozenLM, slots: Slots, *rest: object) -> torch.Tensor:
        positions.append(slots.window.length)
        return hidden(lm, slots, *rest)  # type: ignore[arg-type]

    def fit() -> tuple[prototok.FitResult, set[int]]:
        positions.clear()
        options = {"share": share, "group_size": 2 if share else None, "batch_size": 4}
        found = prototok.fast_fit(small_lm, texts, recipe=RECIPE, progress=False, **options)
        return found, set(positions)

    monkeypatch.setattr(step_module, "_hidden", counted)
    # All in one bucket at the length of the longest, as a CUDA graph would run them.
    with monkeypatch.context() as patch:
        patch.setitem(module._FEW, "cpu", 10**6)
        patch.setattr(module, "_SIMILAR", 0.0)
        tight = Slots.window.fget  # type: ignore[attr-defined]
        loose = property(lambda self: dataclasses.replace(tight(self), length=8))
        patch.setattr(Slots, "window", loose)
        together, seen = fit()
        assert seen == {8}
    monkeypatch.setitem(module._FEW, "cpu", 1)
    apart, seen = fit()
    assert min(seen) <= 2 and max(seen) == 8
    assert [len(ids) for ids in apart.targets] == lengths
    assert torch.equal(together.exact, apart.exact)
    assert int(apart.exact.sum()) >= 2
    torch.testing.assert_close(together.accuracy, apart.accuracy)
    if share is None:
        solved = apart.exact
        assert float((together.steps - apart.steps)[solved].abs().float().mean()) < 3


def longrope() -> FrozenLM:
    """A model whose angles are others for an input of more than 16 positions."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4, "original_max_position_embeddings": 16,
    }  # fmt: skip
    config = Phi3Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        original_max_position_embeddings=16, initializer_range=0.3, pad_token_id=0,
        rope_parameters=rope,
    )  # fmt: skip
    return prototok.load(Phi3ForCausalLM(config).eval(), device="cpu", dtype="float32")


def test_texts_of_other_lengths_run_apart_where_the_rope_follows_the_length() -> None:
    lm, recipe = longrope(), Recipe(lr=0.1, max_steps=30)
    texts = [list(range(10)), list(range(30, 60))]
    alone = [prototok.fast_fit(lm, [text], recipe=recipe, progress=False) for text in texts]
    both = prototok.fast_fit(lm, texts, recipe=recipe, progress=False)
    for i, fit in enumerate(alone):
        torch.testing.assert_close(both.tokens.e[i], fit.tokens.e[0])
    with pytest.raises(ValueError, match="^texts: those that share a vector must be as long"):
        prototok.fast_fit(lm, texts, share="m", recipe=recipe, progress=False)


def test_threads_of_other_lengths_do_not_turn_each_others_rope() -> None:
    lm, short, long = longrope(), torch.randn(1, 8, 32), torch.randn(1, 40, 32)
    expected = [lm.logits(x) for x in (short, long)]
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(lm.logits, x) for _ in range(100) for x in (short, long)]
        wrong = [i for i, f in enumerate(found) if not torch.equal(f.result(), expected[i % 2])]
    assert not wrong
