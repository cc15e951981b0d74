"""Plans for blocks that stand alone."""

from __future__ import annotations

from collections.abc import Sequence

from prototok_kernels.layers import DecoderLayer
from prototok_kernels.plan import Plan, Shape, plan_of


def plan_for(
    layers: Sequence[DecoderLayer], rows: int, length: int, backend: str, pair: bool = True
) -> Plan:
    """The plan of `rows` rows of `length` positions through these blocks, with no head behind."""
    first = layers[0]
    if pair:
        rows = 1 << 22  # few of them are faster without the closed form, which is what is tried
    return plan_of(
        Shape.of(layers, None), rows=rows, length=length, dtype=first.dtype,
        device=first.qkv.device, backend=backend, pair=pair,
    )  # fmt: skip
