"""A fit whose first block runs for two vectors a row goes the way of one that runs it in full."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import prototok
from prototok import FrozenLM, Recipe
from prototok.model.families import DecoderBody
from prototok.results.arrangement import Arrangement
from support import DEVICES, assert_same_losses, losses_by_step, small_llama

pytestmark = pytest.mark.usefixtures("closed_form")

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40, "initializer_range": 0.3,
}  # fmt: skip


def small_neox(parallel: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPTNeoXConfig(**SIZES, rotary_pct=0.5, use_parallel_residual=parallel)
    return GPTNeoXForCausalLM(config).eval()


def small_mistral(window: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=window)
    return MistralForCausalLM(config).eval()


MODELS = {
    "llama": small_llama,
    "neox parallel": lambda: small_neox(True),
    "neox sequential": lambda: small_neox(False),
    "window as long as the input": lambda: small_mistral(9),
}


def losses_of(lm: FrozenLM, **options: object) -> dict[int, dict[int, float]]:
    """Row → updates made → loss, of 20 steps; six texts of 5 to 8 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (6, 8), generator=generator)
    texts = [row[: 5 + i % 4] for i, row in enumerate(ids)]
    found = losses_by_step(lm, texts, recipe=Recipe(max_steps=20, margin=1e9), **options)
    for losses in found.values():
        assert len(losses) == 20 if lm.device.type == "cpu" else losses
    return found


def count_collapsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the input length with every forward from two vectors."""
    lengths: list[int] = []
    forward = DecoderBody.hidden_of_pair

    def counted(self: DecoderBody, e: object, m: object, group: object, length: int, *rest: str):  # type: ignore[no-untyped-def]
        lengths.append(length)
        return forward(self, e, m, group, length, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DecoderBody, "hidden_of_pair", counted)
    return lengths


def in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan every first layer at every position."""
    plan = FrozenLM.plan

    def planned(self: FrozenLM, rows: int, length: int, backend: str = "auto", pair: bool = False):  # type: ignore[no-untyped-def]
        return plan(self, rows, length, backend, False)

    monkeypatch.setattr(FrozenLM, "plan", planned)


@pytest.mark.parametrize("share", [None, "m", "e"])
@pytest.mark.parametrize("arrangement", ["e m*", "e m*+1"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES)
def test_losses_are_those_of_the_general_layer(
    device: str, name: str, arrangement: str, share: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = prototok.load(MODELS[name](), device=device, dtype="float32")
    # Groups of two rows share; batches of four hold two groups, so rows take turns as well.
    options = {"arrangement": arrangement, "share": share, "batch_size": 4}
    if share:
        options["group_size"] = 2
    lengths = count_collapsed(monkeypatch)
    collapsed = losses_of(lm, **options)
    assert max(lengths) == Arrangement.parse(arrangement).input_length(8)
    in_full(monkeypatch)
    lengths.clear()
    general = losses_of(lm, **options)
    assert not lengths
    assert len(general) == 6
    for row, losses in general.items():
        assert_same_losses(collapsed[row], losses, lm, cpu=2e-5, cuda=2e-4)


@pytest.mark.parametrize("arrangement", ["e*", "e* m*", "(e m)*", "e2 m*", "e2 m*+1"])
def test_other_arrangements_run_the_first_layer_in_full(
    arrangement: str, small_lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = count_collapsed(monkeypatch)
    assert len(losses_of(small_lm, arrangement=arrangement)) == 6
    assert not lengths


def test_a_window_shorter_than_the_input_runs_the_first_layer_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a window of 7 the texts of 8 tokens must, and those of up to 7 need not."""
    lm = prototok.load(small_mistral(7), device="cpu", dtype="float32")
    lengths = count_collapsed(monkeypatch)
    losses = losses_of(lm, batch_size=1)
    assert set(lengths) == {5, 6, 7}
    in_full(monkeypatch)
    general = losses_of(lm, batch_size=1)
    for row, expected in general.items():
        assert losses[row] == pytest.approx(expected, rel=2e-5)


def test_hidden_of_a_pair_is_hidden_of_its_layout() -> None:
    """In float64, where what is left is the fp32 of the rotary tables, gradients included."""
    lm = prototok.load(small_llama().double(), device="cpu", dtype="float64")
    assert isinstance(lm.body, DecoderBody)
    generator = torch.Generator().manual_seed(1)
    e, m = (
        torch.randn(n, lm.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (5, 2)
    )
    group = torch.tensor([0, 1, 1, 0, 1])
    full = lm.hidden(torch.cat([e[:, None], m[group][:, None].expand(-1, 8, -1)], dim=1))
    pair = lm.body.hidden_of_pair(e, m, group, 9, lm.plan(5, 9, pair=True))
    torch.testing.assert_close(pair, full, rtol=1e-5, atol=1e-5)
    probe = torch.randn(full.shape, generator=generator, dtype=torch.float64)
    grads = [torch.autograd.grad((h * probe).sum(), (e, m)) for h in (pair, full)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)
