"""One token of the KV-cached decoder as CUDA would run it: launches, bytes, and an estimated time.

`rehearse.py` prints it. A launch takes its bytes over the bandwidth and a gap. The least that any
decoder needs is one reading of the weights and of what its cache holds. Letters: R rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prototok.autoregressive.generate import bytes_read
from prototok.autoregressive.static_kv import StaticDecoder
from rehearsal import Compilation, Launch, frozen_shape, rehearsal

LENGTH = 256  # N, behind one vector
TOKENS = (("pythia-160m", 1), ("pythia-1.4b", 1), ("llama-3.2-1b", 1), ("llama-3.2-1b", 4),
          ("llama-3.1-8b", 1))  # fmt: skip


@dataclass(frozen=True)
class Token:
    shape: str
    rows: int
    layers: int
    least: int  # bytes, the mean over the N tokens
    launches: list[Launch]
    compilations: list[Compilation]

    @property
    def a_layer(self) -> float:
        """Launches a layer: all but the last norm, the head's product and the choice."""
        return (len(self.launches) - 3) / self.layers

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    def of_roofline(self, seconds: Callable[[Launch], float], bandwidth: float) -> float:
        """Return the share of the bandwidth that the estimated time leaves."""
        return self.least / bandwidth / sum(map(seconds, self.launches))


@torch.no_grad()
def token(shape: str, rows: int, length: int = LENGTH, capability: int = 90) -> Token:
    """Rehearse one token of the static decoder with room for N."""
    with rehearsal(capability=capability) as seen:
        lm = frozen_shape(shape)
        decoder = StaticDecoder(lm.body, lm, rows, length + 64, lm.plan(rows, 1))
        seen.launches.clear()
        decoder._next()
    least = bytes_read(lm, rows, length) // length
    layers = len(lm.body.layers)
    return Token(shape, rows, layers, least, seen.launches, list(seen.compilations))


def token_lines(gpus: Sequence) -> list[list[object]]:
    """Return the table of `TOKENS`, a line each, with the time and share at each of the GPUs."""
    lines: list[list[object]] = [
        [
            "token",
            "launches",
            "a layer",
            "GB",
            *(f"{gpu.bandwidth / 1e12:.1f} TB/s" for gpu in gpus),
        ]
    ]
    for shape, rows in TOKENS:
        one = token(shape, rows)

        def cost(gpu, one: Token = one) -> str:  # type: ignore[no-untyped-def]
            seconds = sum(map(gpu.seconds, one.launches))
            share = one.of_roofline(gpu.seconds, gpu.bandwidth)
            return f"{1e3 * seconds:.2f} ms, {100 * share:.0f} %"

        lines.append([f"{shape}, {rows}", len(one.launches), f"{one.a_layer:.0f}",
                      f"{one.bytes / 1e9:.2f}", *map(cost, gpus)])  # fmt: skip
    return lines
