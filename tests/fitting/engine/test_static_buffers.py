"""The step rebinds no buffer and reads nothing back, so that it can be a CUDA graph; and it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prototok
from prototok import FrozenLM, Recipe
from prototok.fitting.engine.inputs import Inputs, OneForward, TeacherForced
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.runner import CapturedStep, StepRunner
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Bank, Room, Slots, Window
from prototok.fitting.engine.step import step
from prototok.fitting.learned.network import UpdateNetwork
from prototok.results.arrangement import Arrangement
from support import small_llama

RECIPE = Recipe(lr=0.1, schedule="cosine", warmup=3, max_steps=60, patience=50, temperature=0.5)
# What makes the host wait for a number on a GPU.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


def buffers(slots: Slots) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that slots hold, by name."""
    for name, value in vars(slots).items():
        if isinstance(value, Tensor):
            yield name, value
    for b, bank in enumerate(slots.banks):
        assert isinstance(bank, Bank)
        for name, value in {**vars(bank), **vars(bank.adam)}.items():
            if isinstance(value, Tensor):
                yield f"banks[{b}].{name}", value


def untrained(lm: FrozenLM) -> UpdateNetwork:
    """A network that sees the first four positions and makes small updates."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UpdateNetwork(lm.hidden_size, 16, 1, 4)
    network.rate.fill_(0.1)
    return network.requires_grad_(False)


def filled(
    lm: FrozenLM,
    share: str | None,
    inputs: Inputs,
    recipe: Recipe = RECIPE,
    network: UpdateNetwork | None = None,
) -> tuple[Slots, list]:
    """Room for eight rows, six of them taken, and the groups that still wait."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (12, 8), generator=generator)
    texts = [row[: 8 - i % 4] for i, row in enumerate(ids)]
    groups = make_groups(texts, [0], share, 2 if share else None)
    slots = Slots(Setup(lm, inputs, recipe, "auto", 8, network), Room(8, 8, 8), share)
    first = 6 // len(groups[0].rows)
    slots.admit(groups[:first])
    return slots, groups[first:]


class NoWaiting(TorchDispatchMode):
    """Refuses every operation that a GPU's host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        waits = name in WAITS or (
            # An index of bool is counted first.
            name.startswith("index")
            and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in tree_leaves(args[1:]))
        )
        assert not waits, f"{name} waits for the device"
        self.seen.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("share", [None, "m", "e"])
@pytest.mark.parametrize("arrangement", ["e m*", "e* m*"])
def test_a_step_waits_for_nothing(small_lm: FrozenLM, arrangement: str, share: str | None) -> None:
    slots, _ = filled(small_lm, share, OneForward(Arrangement.parse(arrangement)))
    with NoWaiting() as mode:
        step(small_lm, slots, 4)
    assert "where" in mode.seen and "mm" in mode.seen
    for waiting in (lambda: bool(slots.done.any()), lambda: slots.step[slots.done]):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            waiting()


@pytest.mark.parametrize("share", [None, "m", "e"])
def test_a_learned_step_waits_for_nothing(small_lm: FrozenLM, share: str | None) -> None:
    inputs, recipe = OneForward(Arrangement.parse("e m*")), replace(RECIPE, learned=1)
    slots, _ = filled(small_lm, share, inputs, recipe, untrained(small_lm))
    slots.device = torch.device("cuda")  # on the CPU it asks whether any group is the network's
    with NoWaiting() as mode:
        step(small_lm, slots, 4)
    assert "gelu" in mode.seen


@pytest.mark.parametrize("share", [None, "m"])
def test_buffers_stay_where_they_are(small_lm: FrozenLM, share: str | None) -> None:
    """Over steps, refills and the shrinking end of a queue."""
    slots, waiting = filled(small_lm, share, OneForward(Arrangement.parse("e m*")))
    runner = StepRunner(small_lm, slots, 8)
    places = {name: tensor.data_ptr() for name, tensor in buffers(slots)}
    assert len(places) > 25
    while slots.groups:
        runner.advance(3)
        slots.release([0])
        if waiting:
            slots.admit([waiting.pop()])
    assert {name: tensor.data_ptr() for name, tensor in buffers(slots)} == places


@pytest.mark.parametrize("learned", [0, 4])
@pytest.mark.parametrize("share", [None, "m", "e"])
def test_free_places_inside_the_window_change_nothing(
    small_lm: FrozenLM, share: str | None, learned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA a step computes more places than are taken; they must not be seen."""
    inputs, recipe = OneForward(Arrangement.parse("e m*")), replace(RECIPE, learned=learned)
    network = untrained(small_lm) if learned else None
    results = []
    for whole in (False, True):
        slots, waiting = filled(small_lm, share, inputs, recipe, network)
        if whole:
            monkeypatch.setattr(Slots, "window", Window(8, 8, 8))
        runner = StepRunner(small_lm, slots, 8)
        runner.advance(5)
        slots.release([1])
        runner.advance(5)
        slots.admit([waiting[0]])
        runner.advance(5)
        results.append(runner.poll())
    tight, loose = results
    assert [group.index for group in tight.groups] == [group.index for group in loose.groups]
    assert torch.equal(tight.step, loose.step) and torch.equal(tight.done, loose.done)
    torch.testing.assert_close(tight.loss, loose.loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(tight.scored_at, loose.scored_at)


def test_windows_halve_with_what_is_in_flight(small_lm: FrozenLM) -> None:
    slots, _ = filled(small_lm, None, OneForward(Arrangement.parse("e m*")))
    assert (slots.window.rows, slots.window.length) == (6, 8)  # the CPU computes what is there
    slots.device = torch.device("cuda")
    assert (slots.window.rows, slots.window.groups, slots.window.length) == (8, 8, 8)
    slots.groups = slots.groups[:4]
    assert slots.window.rows == 4
    slots.groups = slots.groups[:1]
    assert slots.window.rows == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs", ["e m*", "e* m*", "[mem]"])
def test_replays_equal_eager_steps_bit_by_bit(inputs: str, dtype: str) -> None:
    lm = prototok.load(small_llama(), device="cuda", dtype=dtype)
    what: Inputs = (
        TeacherForced(lm.embedding, 2)
        if inputs == "[mem]"
        else OneForward(Arrangement.parse(inputs))
    )
    found = []
    for kind in (StepRunner, CapturedStep):
        slots, waiting = filled(lm, None, what)
        runner = kind(lm, slots, 8)
        for _ in range(3):
            runner.advance(6)
            with runner.changing():
                slots.release([2])
                slots.admit([waiting.pop()])
        runner.advance(6)
        runner.finish()
        torch.cuda.synchronize()
        if isinstance(runner, CapturedStep):
            assert runner.capturing and len(runner.graphs) == 1
        found.append(dict(buffers(slots)))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("share", [None, "m", "e"])
def test_a_fit_on_cuda_goes_through_graphs_to_its_end(
    share: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[object] = []
    capture = CapturedStep._capture

    def counted(self: CapturedStep, key: object) -> None:
        capture(self, key)  # type: ignore[arg-type]
        captured.extend(self.graphs)
        assert self.capturing

    monkeypatch.setattr(CapturedStep, "_capture", counted)
    lm = prototok.load(small_llama(), device="cuda", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocab_size, (10, 2), generator=generator)
    recipe = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=400)
    options = {"share": share, "group_size": 2 if share else None, "recipe": recipe}
    fit = prototok.fast_fit(lm, ids, batch_size=4, **options)
    assert captured
    single = prototok.fast_fit(lm, ids[:2], batch_size=4, **options)
    assert torch.equal(single.exact, fit.exact[:2])
    if share is None:
        assert int(fit.exact.sum()) >= 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_capture_that_runs_out_of_memory_loses_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from prototok.fitting.engine import step as module

    forward, refused = module.forward_backward, []

    def limited(lm: FrozenLM, slots: Slots, leaves: list, part: slice) -> object:
        if torch.cuda.is_current_stream_capturing() and part.stop - part.start > 2:
            refused.append(part)
            raise torch.OutOfMemoryError("no room")
        return forward(lm, slots, leaves, part)

    monkeypatch.setattr(module, "forward_backward", limited)
    lm = prototok.load(small_llama(), device="cuda", dtype="float32")
    ids = torch.randint(lm.vocab_size, (7, 2), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=400)
    fit = prototok.fast_fit(lm, ids, batch_size=7, recipe=recipe)
    assert refused
    assert int(fit.exact.sum()) >= 5
