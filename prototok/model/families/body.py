"""A frozen decoder: its blocks, the norm behind them and the head's weight.

Letters: B rows, G groups of rows that share m, N positions, d hidden size, V vocabulary, r rotated
part of a head, P vectors of a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from prototok.model.families.rotary import RotaryTables
from prototok.model.families.upcast import Upcast
from prototok_kernels.decoder_blocks import DecoderBlocks
from prototok_kernels.layers import DecoderLayer
from prototok_kernels.one_forward import PreparedForward
from prototok_kernels.pair.first_layer import first_layer, first_layer_spanned
from prototok_kernels.pair.second_layer import second_layer_projections
from prototok_kernels.plan import Plan, Shape
from prototok_kernels.prefix import keys_and_values


class Ends(NamedTuple):
    """What stands in front of a model's blocks and behind them."""

    embedding: Tensor  # (V, d)
    rotary: RotaryTables
    norm: Tensor  # (d,)
    norm_bias: Tensor | None  # (d,)
    head: Tensor | None  # (V, d)


@dataclass(frozen=True)
class DecoderBody:
    """A model of the Llama or GPT-NeoX family as plain tensors."""

    family: str
    layers: Sequence[DecoderLayer]
    embedding: Tensor  # (V, d)
    norm: Tensor  # (d,)
    norm_bias: Tensor | None  # (d,)
    head: Tensor | None  # (V, d)
    rotary: RotaryTables
    bare: DecoderBody | None = None  # the same without a prefix

    reason = "its own forward"
    by_length = False  # its rope follows no length

    def __repr__(self) -> str:
        return f"DecoderBody({self.family}, {len(self.layers)} blocks)"

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding matrix, (…, d)."""
        return self.embedding[ids].to(self.norm.dtype)

    def flash(self) -> DecoderBody:
        """Return the same body, attending by the flash-attn package."""
        return replace(self, layers=[replace(layer, flash=True) for layer in self.layers])

    def behind(self, vectors: Tensor) -> DecoderBody:
        """Return the same body with vectors (P, d) in front of every input."""
        prefixes = keys_and_values(self.layers, vectors, *self.rotary(len(vectors)))
        layers = self.layers
        behind = (
            layers.behind(prefixes)
            if isinstance(layers, Upcast)
            else [
                replace(layer, prefix=prefix)
                for layer, prefix in zip(layers, prefixes, strict=True)
            ]
        )
        return replace(self, layers=behind, bare=self)

    def upcast(self, dtype: torch.dtype) -> DecoderBody:
        """Return the body in a wider dtype, its blocks made of these one at a time (`Upcast`).

        The embedding matrix stays as it is; the rows that are asked for are cast.
        """
        return replace(
            self, layers=Upcast(self.layers, dtype), norm=self.norm.to(dtype), bare=None,
            norm_bias=None if self.norm_bias is None else self.norm_bias.to(dtype),
            head=None if self.head is None else self.head.to(dtype),
        )  # fmt: skip

    @cached_property
    def prefix_length(self) -> int:
        """P; 0 without a prefix."""
        return self.layers[0].prefix_length

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin (P + N, r) for inputs of N positions, row i for position i."""
        return self.rotary(self.prefix_length + length)

    def _tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the rows (N, r) of `tables` for the inputs, without the prefix's."""
        cos, sin = self.tables(length)
        if self.prefix_length == 0:
            return cos, sin
        return cos[self.prefix_length :], sin[self.prefix_length :]

    def hidden(self, inputs_embeds: Tensor, plan: Plan) -> Tensor:
        """Map (B, N, d) embeddings to (B, N, d) hidden states behind the last norm."""
        return self._blocks(inputs_embeds, *self._tables(inputs_embeds.shape[1]), plan)

    def one_forward(self, layout: Tensor) -> PreparedForward:
        """Prepare the forward from vectors, laid out over N positions, to their ids.

        Only for plans that `why_not_one_call` says nothing against.
        """
        assert self.head is not None
        return PreparedForward(self._blocks, self.head, layout, *self._tables(len(layout)))

    def hidden_of_pair(
        self,
        e: Tensor,  # (B, d)
        m: Tensor,  # (B, d), or (G, d) with `group`
        group: Tensor | None,  # (B,) the row of m each row reads; None = its own
        length: int,  # N
        plan: Plan,
    ) -> Tensor:  # (B, N, d)
        """Compute `hidden` of [e, m, …, m] (N positions), its first block in closed form.

        And, where the plan says so, the first projections of the second block. Its first layer must
        not be "in full". e and m may be of any floating dtype.
        """
        tables, (cos, sin) = self.tables(length), self._tables(length)
        pair = (e, m, group, length, self.layers[0], *tables, plan)
        second = plan.second_layer.taken
        if second == "in full":
            return self._blocks(first_layer(*pair), cos, sin, plan, start=1)
        x, coef, span = first_layer_spanned(*pair)
        projected = second_layer_projections(x, coef, span, self.layers[1], second == "combined")
        return self._blocks(x, cos, sin, plan, start=1, projected=projected)

    @cached_property
    def shape(self) -> Shape:
        """Return what a plan must know of this body."""
        return Shape.of(self.layers, self.head)

    @cached_property
    def _blocks(self) -> DecoderBlocks:
        bare = None if self.bare is None else self.bare._blocks
        return DecoderBlocks(self.layers, self.norm, self.norm_bias, bare)
