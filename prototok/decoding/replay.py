"""One forward of a shape that comes again and again: on CUDA a graph, in front of what else runs.

Decoding or verifying one text queues some 150 launches for a millisecond of work, so that it waits
for the host. A shape that came often enough is captured, and from then on is one launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prototok.common.graphs import captured
from prototok.common.per_thread import PerThread
from prototok.common.recent import Recent
from prototok.common.urgent import on_cuda, urgent
from prototok.model.families.body import DecoderBody
from prototok.model.frozen_lm import FrozenLM

# Times that a shape runs without a graph first: a capture costs the host about as much as these,
# and many shapes never come so often.
_EAGER = 3
# Shapes that a thread remembers of a model, graphs or not. Graphs share their memory.
_SHAPES = 8
_forwards = PerThread()

Compute = Callable[..., Sequence[Tensor]]


@dataclass
class _Forward:
    """A shape: how often it ran without a graph, and its graph with what that reads and writes."""

    ran: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    given: list[Tensor] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)  # beside these

    def capture(
        self, body: DecoderBody, compute: Compute, fixed: Sequence[Tensor],
        given: Sequence[Tensor], beside: torch.cuda.CUDAGraph | None,
    ) -> None:  # fmt: skip
        # Outside of what graphs share.
        self.given = [tensor.to(body.embedding.device, copy=True) for tensor in given]
        constants = [tensor.to(body.embedding.device, copy=True) for tensor in fixed]

        def queue() -> None:
            self.results = list(compute(*constants, *self.given))

        # Tables that grow for longer inputs are let go when they do; the graph goes on reading
        # these, and another thread may make them grow meanwhile.
        self.read = [*constants, *body.rotary(0)]
        self.graph = captured(queue, body.embedding.device, beside)
        self.read += body.rotary(0)

    def replay(self, given: Sequence[Tensor]) -> list[Tensor]:
        assert self.graph is not None
        for static, new in zip(self.given, given, strict=True):
            static.copy_(new, non_blocking=True)  # the results are waited for
        self.graph.replay()
        return self.results


def on_the_host(
    lm: FrozenLM, key: Hashable, compute: Compute, fixed: Sequence[Tensor], given: Sequence[Tensor]
) -> list[Tensor]:
    """Return what compute(*fixed, *given) gives, on the CPU.

    On CUDA it runs on a stream of high priority, and from the fourth time on with one key as a
    graph, with the same bits. A forward of transformers, which may wait for the device, always runs
    as it is.

    Args:
        lm: the model; what is kept is let go with it.
        key: everything that `compute` depends on but the values given, their shapes included.
        compute: of tensors on the model's device; may not wait for it; must not be kept, since it
            holds the model.
        fixed: tensors whose values the key decides; a graph takes them to the device once.
        given: tensors on the device or on the CPU.
    """

    def at_once() -> list[Tensor]:
        inputs = [tensor.to(lm.device) for tensor in (*fixed, *given)]
        return [result.cpu() for result in compute(*inputs)]

    with urgent(lm.device):
        if not on_cuda(lm.device) or not isinstance(lm.body, DecoderBody):
            return at_once()
        kept: Recent[_Forward] = _forwards.of.setdefault(lm, Recent(_SHAPES))
        forward = kept.get(key, _Forward)
        if forward.graph is None and forward.ran == _EAGER:
            try:
                forward.capture(lm.body, compute, fixed, given, _one_of(kept))
            except RuntimeError as error:
                why = str(error).strip().split("\n")[0]
                warnings.warn(f"decoding runs without a CUDA graph, slower ({why})", stacklevel=3)
                kept.clear()  # as a rule there is no memory
                forward = kept.get(key, lambda: _Forward(ran=_EAGER + 1))  # never tried again
        if forward.graph is not None:
            # The next replay writes the results in place.
            return [result.to("cpu", copy=True) for result in forward.replay(given)]
        forward.ran += 1
        return at_once()


def _one_of(kept: Recent[_Forward]) -> torch.cuda.CUDAGraph | None:
    """Return a graph, whose memory the next one may use as well."""
    return next((one.graph for one in kept.values() if one.graph is not None), None)
