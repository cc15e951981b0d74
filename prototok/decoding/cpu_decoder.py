"""The C++ decoder of a model on the CPU: weights that all threads read, and each thread's state.

Letters: R rows, N positions.
"""

from __future__ import annotations

from typing import Any

from prototok.common.per_thread import PerThread
from prototok.model.families.body import DecoderBody
from prototok.model.frozen_lm import FrozenLM
from prototok_kernels.decoder import POSITIONS, Decoder, decoder_model
from prototok_kernels.packed import packed

# The decoder of a thread's last call with a model; a fit's verification repeats itself.
_decoders = PerThread()


def cpu_decoder(lm: FrozenLM, rows: int, positions: int, longest: int) -> Decoder:
    """Return a decoder with room for R rows of `positions`, at most `longest` of them a pass.

    It is this thread's until its next call with the same model. Only where the plan's decoder is
    "cpu".
    """
    body = lm.body
    assert isinstance(body, DecoderBody) and body.head is not None
    model = _model(lm, body)
    found: Decoder | None = _decoders.of.get(lm)
    if (
        found is None
        or found.model is not model
        or found.most_rows < rows
        or found.positions < body.prefix_length + positions
        or found.longest < longest
    ):
        capacity = -(-(body.prefix_length + positions) // POSITIONS) * POSITIONS
        rotary = body.rotary(capacity)
        found = Decoder(
            model, len(body.head), rotary, (rows, capacity, longest), prefix=lm.prefix_vectors
        )
        _decoders.of[lm] = found
    return found


def _model(lm: FrozenLM, body: DecoderBody) -> Any:
    """Return the weights as C++ reads them, in place: only what was copied can be out of date."""
    assert body.head is not None
    ends, norm = (body.head, lm.embedding), (body.norm, body.norm_bias)
    weights = [weight for layer in body.layers for weight in layer.tensors]
    weights += [weight for weight in (*norm, *ends) if weight is not None]
    return packed(lm, weights, lambda: decoder_model(body.layers, norm, body.rotary.width, ends))
