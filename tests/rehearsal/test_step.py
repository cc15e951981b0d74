"""The CUDA step of every family, input and sharing: nothing waits for the host or mixes devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from prototok import Recipe
from prototok.fitting.engine.step import step
from prototok_kernels import plan
from rehearsal import (
    DEVICE,
    HostRead,
    MixedDevices,
    Seen,
    frozen,
    frozen_shape,
    rehearsal,
    slots_of,
)
from zoo import OWN

ROWS, LENGTH = 8, 33


@pytest.fixture(autouse=True)
def closed_form(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the closed form of the first layer, though models as small as these are faster without.

    What they would have runs for "e* m*".
    """
    monkeypatch.setattr(plan, "FEW_ON_CUDA", 0)
    plan._plan_of.cache_clear()
    yield
    plan._plan_of.cache_clear()


# A schedule, patience, temperature and warm-up: everything of a recipe that a step computes with.
RECIPE = Recipe(lr=0.1, schedule="cosine", warmup=3, max_steps=60, patience=50, temperature=0.5)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )


def rehearsed(
    make: Callable[[], PreTrainedModel], inputs: str, share: str | None = None, prefix: int = 0,
    recipe: Recipe = RECIPE, rows_per_forward: int = ROWS,
) -> Seen:  # fmt: skip
    """One step, and nothing else."""
    with rehearsal() as seen:
        lm = frozen(make, prefix)
        slots = slots_of(lm, inputs, ROWS, LENGTH, share=share, recipe=recipe)
        if lm.body.family != "general":
            lm.body.tables(slots.inputs.input_length(LENGTH))  # as a runner does
        seen.launches.clear()
        seen.copied.clear()
        sent = seen.sent
        step(lm, slots, rows_per_forward)
    assert seen.copied == [] and seen.sent == sent
    return seen


CASES = {
    "e m*": {"inputs": "e m*"},
    "e m*, m shared": {"inputs": "e m*", "share": "m"},
    "e m*, e shared": {"inputs": "e m*", "share": "e"},
    "e m* behind a prefix": {"inputs": "e m*", "prefix": 3},
    "e* m*": {"inputs": "e* m*"},
    "e m*+1": {"inputs": "e m*+1"},
    "[mem]": {"inputs": "[mem]"},
    "[mem] behind a prefix": {"inputs": "[mem]", "prefix": 3},
    "e m*, in turns": {"inputs": "e m*", "rows_per_forward": 3},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", OWN)
def test_a_step_of_an_own_forward(model: str, case: str) -> None:
    seen = rehearsed(OWN[model], **CASES[case])
    kernels = {launch.name for launch in seen.launches if launch.kind == "triton"}
    # What CUDA would get: Triton's passes, and torch's attention between them.
    passes = {"_residual_norm_kernel", "_activation_kernel", "_rotary_kernel", "_head_kernel"}
    assert passes <= kernels and "_adamw_kernel" in kernels
    assert any(launch.name == "attention backward" for launch in seen.launches)
    assert {launch.part for launch in seen.launches} >= {"forward", "head", "backward", "update"}
    # Sums over the rows of a group have one order: no atomics.
    backward = {launch.name for launch in seen.launches if launch.part == "backward"}
    assert not {"index_add", "index_add_", "scatter_add", "index_put", "index_put_"} & backward


def test_the_eigenbasis_and_a_lower_goal() -> None:
    rehearsed(OWN["llama, grouped, tied"], "e m*", recipe=Recipe(max_steps=60, accuracy=0.9))


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_the_general_family(case: str) -> None:
    seen = rehearsed(gpt2, **CASES[case])
    assert {"_head_kernel", "_adamw_kernel"} <= {launch.name for launch in seen.launches}


@pytest.mark.parametrize("length", [63, 64])
def test_transformers_attends_without_cudnn_where_its_gradient_may_be_nan(length: int) -> None:
    asked = []
    with rehearsal():
        lm = frozen(gpt2)
        lm.body.model.register_forward_pre_hook(
            lambda module, args: asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        )
        step(lm, slots_of(lm, "e m*", 2, length), 2)
    assert asked == [length == 63] and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(("capability", "tiles"), [(80, 0), (90, 11)])
def test_attention_of_128_keys_is_one_launch_each_way_from_sm_90_on(
    capability: int, tiles: int
) -> None:
    with rehearsal(capability=capability) as seen:
        lm = frozen_shape("pythia-160m")
        step(lm, slots_of(lm, "e m*", 256, 128), 256)
        assert lm.plan(256, 128).attention.taken == ("tile" if tiles else "triton")
    names = [launch.name for launch in seen.launches]
    assert names.count("_attention_halves_kernel") == tiles
    assert names.count("_attention_halves_backward_kernel") == tiles
    assert names.count("attention") == 11 - tiles


def test_a_host_read_is_seen() -> None:
    with rehearsal():
        x = torch.ones(4, device=DEVICE)
        for read in (
            lambda: x.sum().item(),
            lambda: bool((x > 0).all()),
            lambda: x.nonzero(),
            lambda: x[x > 0],
            lambda: torch.equal(x, x),
            lambda: x.masked_select(x > 0),
        ):
            with pytest.raises(HostRead):
                read()


def test_mixed_devices_are_seen() -> None:
    with rehearsal() as seen:
        x = torch.ones(4, device=DEVICE)
        for mixed in (
            lambda: x + torch.ones(4, device="cpu"),
            lambda: x[torch.zeros(2, dtype=torch.int64, device="cpu")],
        ):
            with pytest.raises(MixedDevices):
                mixed()
        x.copy_(torch.ones(4, device="cpu"))
        torch.ones(3, device="cpu").to(DEVICE)
        assert seen.copied == [("copy_", (4,)), ("_to_copy", (3,))]
