"""The C++ decoder of a model on the CPU, kept between calls that are alike.

Letters: R rows, N positions.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from prototok.model.families.body import DecoderBody
from prototok.model.frozen_lm import FrozenLM
from prototok_kernels.decoder import POSITIONS, Decoder, usable

# Positions (R · N) up to which one pass is faster than torch's products (docs/log.md).
FEW = 64

# What the last call with a model used; a fit's verification and a benchmark repeat themselves.
_decoders: WeakKeyDictionary[FrozenLM, Decoder] = WeakKeyDictionary()


def cpu_decoder(lm: FrozenLM, rows: int, positions: int, longest: int) -> Decoder | None:
    """A decoder of R rows with room for `positions`, in passes of at most `longest` of them.

    None where there is none: on CUDA, in other dtypes than float32 and bfloat16, for models of the
    general family, and in an installation without the C++ kernels.
    """
    body = lm.body
    if not isinstance(body, DecoderBody) or not usable(lm.device, lm.dtype):
        return None
    found = _decoders.get(lm)
    if (
        found is None
        or found.rows != rows
        or found.positions < positions
        or found.longest < longest
    ):
        assert body.head is not None
        capacity = -(-positions // POSITIONS) * POSITIONS
        rotary = body.rotary(capacity)
        found = _decoders[lm] = Decoder(
            body.layers, (body.norm, body.norm_bias), body.head, lm.embedding, rotary,
            (rows, capacity, longest),
        )  # fmt: skip
    return found
