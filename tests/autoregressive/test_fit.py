"""[mem] fits: the loss is the loop written out; success is what is generated."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import prototok
from prototok import FrozenLM, Recipe, autoregressive
from prototok.autoregressive import MemFit
from prototok.fitting.engine.rows import initial_vectors, make_groups
from prototok.fitting.engine.run import FitEvent
from prototok.fitting.recipe import PAPER
from prototok.results.fit_result import FitInterrupted
from support import shared, stories

verify_module = importlib.import_module("prototok.autoregressive.verify")
QUICK = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=300)


def targets(count: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (count, length), generator=generator)


def test_cosines_do_not_grow_with_the_text(small_lm: FrozenLM) -> None:
    plain = Recipe(lr=0.1, schedule="cosine", cycle=4, max_steps=12)
    texts = targets(1, 6)
    long = replace(plain, cycle_tokens=1)
    mem = [autoregressive.fit(small_lm, texts, recipe=recipe).mem for recipe in (plain, long)]
    assert torch.equal(*mem)
    pairs = [prototok.fast_fit(small_lm, texts, recipe=recipe).tokens.e for recipe in (plain, long)]
    assert not torch.equal(*pairs)


@pytest.mark.parametrize(("k", "given"), [(1, 0), (3, 0), (1, 1), (2, 1)])
def test_losses_are_those_of_a_loop_with_torch_adamw(
    small_lm: FrozenLM, k: int, given: int
) -> None:
    ids = targets(1, 6)[0]
    mem = initial_vectors(make_groups([ids], [0], None, None)[0], k, small_lm.hidden_size, 1.0)[0]
    mem = mem[0].requires_grad_()
    optimizer = torch.optim.AdamW([mem], lr=0.01, betas=(0.9, 0.9), weight_decay=0.01)
    expected = []
    for _ in range(20):
        logits = small_lm.logits(torch.cat([mem, small_lm.embed(ids)])[None])[0]
        # The last vector predicts t_1, the token before it each other one.
        loss = torch.nn.functional.cross_entropy(
            logits[k - 1 : -1][given:], ids[given:], reduction="sum"
        )
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found: list[float] = []
    autoregressive.fit(
        small_lm, [ids], k, recipe=Recipe(**{**vars(PAPER), "max_steps": 20, "margin": 1e9}),
        first="given" if given else "predicted",
        callback=lambda event: found.append(event.loss.item()),
    )  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-4)


def test_batched_losses_equal_single_fits(small_lm: FrozenLM) -> None:
    texts = [row[: 3 + i % 4] for i, row in enumerate(targets(6, 8))]
    recipe = Recipe(max_steps=10, margin=1e9)
    seen: dict[int, list[float]] = {}

    def losses(part: list[Tensor]) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        autoregressive.fit(
            small_lm, part, 2, recipe=recipe, batch_size=6,
            callback=lambda event: [
                found.setdefault(r, []).append(x)
                for r, x in zip(event.rows.tolist(), event.loss.tolist(), strict=True)
            ] and None,
        )  # fmt: skip
        return found

    seen = losses(texts)
    for i in (0, 3, 5):
        assert seen[i] == pytest.approx(losses([texts[i]])[0], rel=2e-5)


@pytest.mark.parametrize("first", ["predicted", "given"])
def test_what_is_called_exact_is_generated(small_lm: FrozenLM, first: str) -> None:
    texts = targets(4, 3)
    fit = autoregressive.fit(small_lm, texts, 2, seeds=2, recipe=QUICK, first=first)
    assert fit.mem.shape == (4, 2, 2, small_lm.hidden_size) and fit.mem.dtype == torch.float32
    given = texts[:, :1] if first == "given" else None
    assert int(fit.exact.sum()) >= 6
    for t in range(4):
        for s in range(2):
            ids = autoregressive.generate(
                small_lm, fit.mem[t, s], 3, "dynamic", None if given is None else given[t]
            )[0]
            scored = (ids == texts[t])[int(first == "given") :]
            assert float(scored.float().mean()) == pytest.approx(float(fit.accuracy[t, s]))
            assert bool(fit.exact[t, s]) == bool(scored.all())
            assert (float(fit.margin[t, s]) > 0) == bool(fit.exact[t, s])
    assert bool((fit.accuracy_teacher_forced >= fit.accuracy).all())
    assert bool((fit.seconds > 0).all())


def test_success_is_decided_by_generating(
    small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that the step counts as done goes on, with a higher margin, until it is generated."""
    ids = targets(1, 2)
    plain = autoregressive.fit(small_lm, ids, recipe=QUICK)
    refused: list[int] = []

    def broken(lm: FrozenLM, mem: Tensor, length: int, *rest: object) -> Tensor:
        made = autoregressive.generate(lm, mem, length, *rest)
        if len(refused) < 4:
            refused.append(1)
            made[0, -1] = (made[0, -1] + 1) % 97
        return made

    monkeypatch.setattr(verify_module, "generate", broken)
    fit = autoregressive.fit(small_lm, ids, recipe=QUICK)
    assert len(refused) == 4
    assert bool(fit.exact.all())
    assert fit.steps.item() > plain.steps.item() and fit.margin.item() > 2 * plain.margin.item()


def test_teacher_forcing_alone_is_no_success(
    small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors whose generation goes wrong are not exact, whatever the true text would give."""

    def wrong(lm: FrozenLM, mem: Tensor, length: int, *rest: object) -> Tensor:
        made = autoregressive.generate(lm, mem, length, *rest)
        made[0, 0] = (made[0, 0] + 1) % 97
        return made

    monkeypatch.setattr(verify_module, "generate", wrong)
    recipe = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=80)
    fit = autoregressive.fit(small_lm, targets(1, 2), recipe=recipe)
    assert fit.accuracy_teacher_forced.item() == 1.0
    assert fit.accuracy.item() == 0.5 and not fit.exact.item() and fit.margin.item() == 0.0
    assert fit.steps.item() == 80


def test_a_row_that_is_refused_at_lower_accuracy_goes_on(
    small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher-forced it has enough right tokens at once; generated it never has."""
    calls: list[int] = []

    def wrong(lm: FrozenLM, mem: Tensor, length: int, *rest: object) -> Tensor:
        calls.append(1)
        return autoregressive.generate(lm, mem, length, *rest) * 0 + 96

    monkeypatch.setattr(verify_module, "generate", wrong)
    recipe = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=120, accuracy=0.5)
    fit = autoregressive.fit(small_lm, [[5, 9]], recipe=recipe)
    assert fit.steps.item() == 120 and fit.accuracy.item() == 0.0
    assert fit.accuracy_teacher_forced.item() >= 0.5
    assert 2 <= len(calls) <= 3  # at one token right, at two and at the end


def test_interrupted_fit_carries_what_had_ended(small_lm: FrozenLM) -> None:
    seen: list[int] = []

    def stop(event: FitEvent) -> None:
        seen.append(len(event.rows))
        if len(event.rows) < 3:  # one of three texts has left
            raise KeyboardInterrupt

    texts = [[7], *targets(2, 12).tolist()]
    with pytest.raises(FitInterrupted, match="interrupted with 1 texts fitted") as caught:
        autoregressive.fit(small_lm, texts, recipe=QUICK, batch_size=3, callback=stop)
    assert caught.value.texts == [0]
    result = caught.value.result
    assert isinstance(result, MemFit) and result.mem.shape == (1, 1, 1, small_lm.hidden_size)
    assert result.targets[0].tolist() == [7] and bool(result.exact.all())
    with pytest.raises(FitInterrupted) as caught:
        autoregressive.fit(small_lm, texts[1:], recipe=QUICK, callback=stop)
    assert caught.value.result is None and caught.value.texts == []


def test_one_token_is_predicted(small_lm: FrozenLM) -> None:
    fit = autoregressive.fit(small_lm, [[42]], recipe=QUICK)
    assert bool(fit.exact.all())
    assert autoregressive.generate(small_lm, fit.mem, 1).tolist() == [[42]]


def test_kuratov_recipe(small_lm: FrozenLM) -> None:
    recipe = autoregressive.kuratov(small_lm)
    assert (recipe.lr, recipe.betas, recipe.weight_decay) == (0.01, (0.9, 0.9), 0.01)
    assert (recipe.max_steps, recipe.patience, recipe.accuracy) == (5000, 2000, 1.0)
    assert recipe.init_std == pytest.approx(small_lm.embedding.std().item())
    fit = autoregressive.fit(small_lm, [[7, 9]], recipe="kuratov", first="given")
    assert json.loads(fit.provenance["recipe"])["name"] == "kuratov"


def test_patience_ends_a_fit_that_does_not_improve(small_lm: FrozenLM) -> None:
    recipe = Recipe(lr=1e-9, max_steps=500, patience=7)
    fit = autoregressive.fit(small_lm, targets(1, 12), recipe=recipe)
    assert fit.steps.item() == 7


def test_general_models_are_verified_by_transformers() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, initializer_range=0.3, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    lm = prototok.load(model, device="cpu", dtype="float32")
    fit = autoregressive.fit(lm, [[5, 9]], recipe=QUICK)
    assert fit.provenance["verified with"] == "dynamic"
    assert bool(fit.exact.all())


def test_save_and_load(small_lm: FrozenLM, tmp_path: Path) -> None:
    texts = [[5, 9, 3], [7]]
    fit = autoregressive.fit(small_lm, texts, 2, seeds=2, recipe=Recipe(max_steps=3))
    fit.save(tmp_path / "folder" / "mem.safetensors")
    found = MemFit.load(tmp_path / "folder" / "mem.safetensors")
    found.require_model(small_lm)
    assert [ids.tolist() for ids in found.targets] == texts
    assert (found.first, found.model, found.provenance) == (fit.first, fit.model, fit.provenance)
    for name in ("mem", "accuracy", "exact", "margin", "accuracy_teacher_forced", "steps"):
        assert torch.equal(getattr(found, name), getattr(fit, name))
    (tmp_path / "cut").write_bytes((tmp_path / "folder" / "mem.safetensors").read_bytes()[:99])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        MemFit.load(tmp_path / "cut")
    with pytest.raises(ValueError, match="there is no file"):
        MemFit.load(tmp_path / "none")
    tokens = prototok.fast_fit(small_lm, [[5]], recipe=Recipe(max_steps=1)).tokens
    tokens.save(tmp_path / "other")
    with pytest.raises(ValueError, match="not one of a MemFit"):
        MemFit.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lm": 3}, "lm: int is not a FrozenLM"),
        ({"k": 0}, "k: 0 is not a positive integer"),
        ({"first": "taken"}, "first: 'taken' is not 'predicted' or 'given'"),
        ({"recipe": "slow"}, "recipe: 'slow' is not"),
        ({"seeds": 0}, "seeds: 0 is not"),
        ({"batch_size": 0}, "batch_size: 0 is not"),
        ({"texts": []}, "texts: the list is empty"),
        ({"texts": [[1] * 40], "k": 2}, "texts: text 0 is too long; length: 40 tokens behind 2"),
        ({"texts": [[4]], "first": "given"}, "texts: text 0 has one token, and first = 'given'"),
    ],
)
def test_bad_input_is_named(small_lm: FrozenLM, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autoregressive.fit(**{"lm": small_lm, "texts": [[1, 2]], **arguments})


def test_short_stories_come_back_whole() -> None:
    lm = prototok.load(shared("models", "stories3m"), device="cpu")
    texts = stories(3, lm, 10)
    fit = autoregressive.fit(lm, texts, 1, length=10)
    assert bool(fit.exact.all())
    for model in (lm, lm.cast(torch.float32)):
        for text, mem in zip(texts, fit.mem, strict=True):
            ids = autoregressive.generate(model, mem, 10, "static")[0]
            assert ids.tolist() == lm.encode(text)[:10]
