"""A frozen decoder: its blocks, the norm behind them and the head's weight.

Letters: B rows, G groups of rows that share m, N positions, d hidden size, V vocabulary, r rotated
part of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from prototok.families.rotary import RotaryTables
from prototok_kernels.first_layer import first_layer
from prototok_kernels.layers import DecoderLayer, decoder_block
from prototok_kernels.residual_norm import residual_norm


@dataclass(frozen=True)
class DecoderBody:
    """What the Llama and GPT-NeoX families make of a model."""

    family: str
    layers: list[DecoderLayer]
    norm: Tensor  # (d,)
    norm_bias: Tensor | None  # (d,)
    head: Tensor | None  # (V, d)
    rotary: RotaryTables

    def flash(self) -> DecoderBody:
        """The same body, attending by the flash-attn package."""
        return replace(self, layers=[replace(layer, flash=True) for layer in self.layers])

    def hidden(self, inputs_embeds: Tensor, backend: str = "auto") -> Tensor:
        """(B, N, d) embeddings to (B, N, d) hidden states behind the last norm."""
        return self._through(self.layers, inputs_embeds, backend)

    def hidden_of_pair(
        self,
        e: Tensor,  # (B, d)
        m: Tensor,  # (B, d), or (G, d) with `group`
        group: Tensor | None,  # (B,) the row of m each row reads; None = its own
        length: int,  # N
        backend: str = "auto",
    ) -> Tensor:  # (B, N, d)
        """`hidden` of the input [e, m, …, m] (N positions), its first block in closed form.

        Only where `collapses(length)`. e and m may be of any floating dtype.
        """
        first, *rest = self.layers
        x = first_layer(e, m, group, length, first, *self.rotary(length), backend)
        return self._through(rest, x, backend)

    def collapses(self, length: int) -> bool:
        """Whether the first block of [e, m, …, m] (N positions) has its closed form.

        With a shorter sliding window positions beyond it do not see e, and the form is another.
        """
        window = self.layers[0].window
        return window is None or window >= length

    def _through(self, layers: list[DecoderLayer], x: Tensor, backend: str) -> Tensor:
        cos, sin = self.rotary(x.shape[1])
        delta: Tensor | None = None
        for layer in layers:
            x, delta = decoder_block(x, delta, layer, cos, sin, backend)
        eps = self.layers[0].eps
        return residual_norm(x, delta, self.norm, self.norm_bias, eps, backend)[1]
