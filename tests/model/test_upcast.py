"""Blocks in float32 made one at a time: the bits of a whole copy, without its memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import prototok
from prototok.model.families.upcast import Upcast
from prototok.model.frozen_lm import FrozenLM
from prototok.model.prefix import Prefix
from zoo import OWN


def loaded(make: Callable[[], Any]) -> FrozenLM:
    return prototok.load(make().bfloat16(), device="cpu", dtype="bfloat16")


def by_block(monkeypatch: pytest.MonkeyPatch, lm: FrozenLM) -> FrozenLM:
    """The twin that a GPU would get."""
    monkeypatch.setattr(FrozenLM, "_holds_all_of", lambda lm, dtype: True)
    twin = lm.cast(torch.float32)
    monkeypatch.undo()
    lm.bare._twins.clear()
    return twin


@pytest.mark.parametrize("front", [0, 3])
@pytest.mark.parametrize("name", OWN)
def test_gives_the_bits_of_a_whole_copy(
    monkeypatch: pytest.MonkeyPatch, name: str, front: int
) -> None:
    lm = loaded(OWN[name])
    if front:
        lm = lm.behind(Prefix(torch.randn(front, lm.hidden_size)))
    twin, whole = by_block(monkeypatch, lm), lm.cast(torch.float32)
    assert isinstance(twin.body.layers, Upcast) and not isinstance(whole.body.layers, Upcast)
    assert twin.dtype == torch.float32 and len(twin.prefix or ()) == front
    x = torch.randn(2, 5, lm.hidden_size)
    with torch.no_grad():
        for backend in ("torch", "auto"):
            # One row is the C++ decoder's where there is one; more are the blocks'.
            assert torch.equal(twin.hidden(x, backend), whole.hidden(x, backend))
            assert torch.equal(twin.logits(x, backend), whole.logits(x, backend))
    ids = torch.arange(7)
    assert torch.equal(twin.embed(ids), whole.embed(ids))
    assert torch.equal(twin.embedding, whole.embedding)


class Alive(TorchDispatchMode):
    """The most bytes that casts hold at a time, and all that they ever made."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and isinstance(out, Tensor):
            size = out.numel() * out.element_size()
            self.now += size
            self.all += size
            self.most = max(self.most, self.now)
            weakref.finalize(out, self._let_go, size)
        return out

    def _let_go(self, size: int) -> None:
        self.now -= size


def test_holds_few_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    make = OWN["llama, grouped, tied"]
    source = make()
    config = type(source.config).from_dict(source.config.to_dict() | {"num_hidden_layers": 12})
    lm = loaded(lambda: type(source)(config).eval())
    twin = by_block(monkeypatch, lm)
    block = 2 * sum(t.numel() * t.element_size() for t in lm.body.layers[0].tensors)
    x = torch.randn(2, 5, lm.hidden_size)
    with Alive() as seen, torch.no_grad():
        twin.logits(x, "torch")
    # One that runs and the next; of the first a plan reads its shape meanwhile.
    assert seen.all >= 12 * block and seen.most < 3.5 * block


def test_only_where_what_is_stored_is_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    make = OWN["llama, grouped, tied"]
    on_gpu = torch.device("cuda")
    narrow = loaded(make)
    rounded = prototok.load(make(), device="cpu", dtype="bfloat16")
    for lm, dtype, wanted in (
        (narrow, torch.float32, True),
        (narrow, torch.float16, False),  # not wider
        (rounded, torch.float32, False),  # its stored weights say more
    ):
        assert not lm._holds_all_of(dtype)  # on the CPU
        object.__setattr__(lm, "device", on_gpu)
        assert lm._holds_all_of(dtype) is wanted
