"""`CapturedStep` itself, on the CPU, with stand-ins for torch.cuda's streams, events and graphs.

What this cannot show is a real capture; what it does show is everything around one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import pytest
import torch

import prototok
from fake_cuda import FITTING, Event, FakeCuda, stand_in, windows_of_cuda
from prototok import FitResult, FrozenLM, Recipe
from prototok.fitting.engine import runner as module
from prototok.fitting.engine.runner import CapturedStep, StepRunner
from prototok.fitting.engine.slots import Slots

RECIPE = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=100)
real_step = module.step


class Patient(StepRunner):
    """Steps without a graph that look as seldom and as late as captured ones of 5 ms."""

    burst, lags = CapturedStep.burst, CapturedStep.lags
    advances = 0

    def advance(self, steps: int) -> None:
        super().advance(steps)
        self.advances += 1
        # One with a capture, one that is timed, one while that is read.
        self.burst = CapturedStep.burst if self.advances < 3 else module.burst_for(5e-3)


@dataclass
class Device(FakeCuda):
    """Rows a step has `room` for, what a capture `fails` with, and whether a step `waits`."""

    room: int | None = None
    fails: str | None = None
    waits: bool = False
    captured: list[int] = field(default_factory=list)  # rows a forward

    def step(self, lm: FrozenLM, slots: Slots, rows: int) -> None:
        if self.room is not None and min(rows, slots.window.rows) > self.room:
            raise torch.OutOfMemoryError("no room")
        if self.waits:
            bool(slots.done.any())
        if self.capturing is None:
            Event.clock += 1
        elif self.fails:
            raise RuntimeError(self.fails)
        else:
            self.captured.append(rows)
        real_step(lm, slots, rows)


def fitted(
    monkeypatch: pytest.MonkeyPatch, lm: FrozenLM, kind: type[StepRunner], fake: Device,
    share: str | None,
) -> FitResult:  # fmt: skip
    ids = torch.randint(lm.vocab_size, (6, 2), generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patched:
        stand_in(patched, fake, *FITTING)
        windows_of_cuda(patched)
        patched.setattr(module, "step", fake.step)
        patched.setattr(module, "CapturedStep", kind)
        return prototok.fast_fit(
            lm, ids, share=share, group_size=2 if share else None, recipe=RECIPE, batch_size=4,
            progress=False, backend="torch",
        )  # fmt: skip


def assert_same(found: FitResult, wanted: FitResult) -> None:
    assert torch.equal(found.tokens.e, wanted.tokens.e)
    assert torch.equal(found.tokens.m, wanted.tokens.m)
    for name in ("steps", "loss", "margin", "exact"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("room", [None, 2, 1], ids=["room enough", "room for 2", "room for 1"])
@pytest.mark.parametrize("share", [None, "m", "e"])
def test_is_the_same_as_steps_without_graphs(
    monkeypatch: pytest.MonkeyPatch, small_lm: FrozenLM, share: str | None, room: int | None
) -> None:
    fake = Device(room=room)
    found = fitted(monkeypatch, small_lm, CapturedStep, fake, share)
    assert sum(graph.replays for graph in fake.graphs) > 20
    assert len(fake.current) == 1  # every stream was left
    assert_same(found, fitted(monkeypatch, small_lm, Patient, Device(room=room), share))


@dataclass
class TightCapture(Device):
    """The steps have room, and a graph has it for two rows."""

    def step(self, lm: FrozenLM, slots: Slots, rows: int) -> None:
        if self.capturing is not None and min(rows, slots.window.rows) > 2:
            raise RuntimeError("capture failed") from torch.OutOfMemoryError("no room")
        super().step(lm, slots, rows)


@pytest.mark.parametrize("share", [None, "m", "e"])
def test_out_of_memory_in_the_capture_alone(
    monkeypatch: pytest.MonkeyPatch, small_lm: FrozenLM, share: str | None
) -> None:
    fake = TightCapture()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="share: with e shared")  # of these texts
        found = fitted(monkeypatch, small_lm, CapturedStep, fake, share)
    assert fake.captured and max(fake.captured) <= 2
    plain = fitted(monkeypatch, small_lm, Patient, Device(), share)
    # Other rows a forward round otherwise; nobody is lost for that.
    assert abs(int(found.exact.sum()) - int(plain.exact.sum())) <= 2
    assert found.steps.min() > 0


def test_a_capture_that_fails_otherwise_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, small_lm: FrozenLM
) -> None:
    fake = Device(fails="operation not permitted when stream is capturing\nand so on")
    with pytest.warns(UserWarning, match=r"without a CUDA graph, slower \(operation not permitted"):
        found = fitted(monkeypatch, small_lm, CapturedStep, fake, None)
    assert not fake.graphs
    assert_same(found, fitted(monkeypatch, small_lm, Patient, Device(), None))


def test_a_model_that_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward of transformers may read values back; that is found out before a capture."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    lm = prototok.load(GPT2LMHeadModel(config).eval(), device="cpu", dtype="float32")
    captures: list[object] = []
    monkeypatch.setattr(CapturedStep, "_capture", lambda runner, key: captures.append(key))
    fake = Device(waits=True)
    with pytest.warns(UserWarning, match=r"slower \(\w+ waits for the device\)"):
        found = fitted(monkeypatch, lm, CapturedStep, fake, None)
    assert not captures and fake.debug == 0
    assert_same(found, fitted(monkeypatch, lm, Patient, Device(), None))


def test_the_time_of_a_step_decides_how_long_a_burst_is() -> None:
    """At most 50 ms and 32 steps, and a power of two; a step that takes longer is looked at."""
    found = {ms: module.burst_for(1e-3 * ms) for ms in (0.0, 0.1, 1, 1.7, 5, 12, 34, 50.1, 138)}
    assert found == {0.0: 32, 0.1: 32, 1: 32, 1.7: 16, 5: 8, 12: 4, 34: 1, 50.1: 1, 138: 1}


def test_a_burst_is_timed_once_and_without_captures(
    monkeypatch: pytest.MonkeyPatch, small_lm: FrozenLM
) -> None:
    """Decided by replays alone: warming up and capturing take longer than a step."""
    decided: list[tuple[int, int]] = []
    decide = CapturedStep._decide

    def seen(runner: CapturedStep, begin: Event, end: Event, steps: int) -> None:
        replays = sum(graph.replays for graph in fake.graphs)
        decide(runner, begin, end, steps)
        decided.append((replays, runner.burst))

    monkeypatch.setattr(CapturedStep, "_decide", seen)
    fake = Device()
    fitted(monkeypatch, small_lm, CapturedStep, fake, None)
    first = CapturedStep.burst
    assert decided == [(3 * first - 2, 8)]  # two steps warmed up
