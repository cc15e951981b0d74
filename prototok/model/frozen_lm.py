"""A frozen causal language model that takes vectors as its input.

Letters: B rows, N positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prototok.model.families import Body, DecoderBody, body_of
from prototok.model.families.general import GeneralBody
from prototok.model.identity import ModelIdentity
from prototok.model.prefix import Prefix
from prototok_kernels.plan import Plan, plan_of

_casting = threading.Lock()


@dataclass(frozen=True, eq=False)
class FrozenLM:
    """A frozen causal language model, ready for input vectors that are not in its vocabulary.

    Attributes:
        identity: name, resolved revision, shape and fingerprint.
        body: the family's forward; `body.family` is "llama", "gpt_neox" or "general".
        embedding: (V, d) input embedding matrix.
        context: positions the model was built for; None where it has no limit.
        dtype, device: of the weights and of the arithmetic between them.
        attention: "sdpa", "flash" (the flash-attn package), or "transformers" for the general body.
        dequantised: how the matrices of a GGUF file are stored, such as "Q4_1"; None elsewhere.
        prefix: what stands in front of every input (see `behind`); None: nothing.
    """

    identity: ModelIdentity
    body: Body
    embedding: Tensor
    context: int | None
    dtype: torch.dtype
    device: torch.device
    config: PreTrainedConfig = field(repr=False)
    source: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False)
    attention: str = "sdpa"
    dequantised: str | None = None
    prefix: Prefix | None = None
    _bare: FrozenLM | None = field(repr=False, default=None)
    _behind: dict[bytes, FrozenLM] = field(repr=False, default_factory=dict)
    _twins: dict[torch.dtype, FrozenLM] = field(repr=False, default_factory=dict)

    @property
    def hidden_size(self) -> int:
        return self.identity.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.identity.vocab_size

    def plan(self, rows: int, length: int, backend: str = "auto", pair: bool = False) -> Plan:
        """Choose what runs for `rows` rows of `length` positions; print it to see why.

        `backend` is "torch", "triton" (CUDA), "cpu" (C++) or "auto", the fastest there is; `pair`:
        the input is [e, m, …, m], so that the first layers may collapse.

        Raises ValueError for a backend that is unknown or cannot be had.
        """
        return plan_of(
            self.body.shape, rows=rows, length=length, dtype=self.dtype, device=self.device,
            backend=backend, pair=pair,
        )  # fmt: skip

    def hidden(self, inputs_embeds: Tensor, backend: str = "auto") -> Tensor:
        """(B, N, d) embeddings to what the head reads: (B, N, d), or logits when it has none."""
        rows, length, _ = inputs_embeds.shape
        return self.body.hidden(inputs_embeds, self.plan(rows, length, backend))

    def logits(self, inputs_embeds: Tensor, backend: str = "auto") -> Tensor:
        """(B, N, d) embeddings to (B, N, V) logits in the model's dtype."""
        hidden = self.hidden(inputs_embeds, backend)
        return hidden if self.body.head is None else hidden @ self.body.head.T

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding matrix, (…, d)."""
        return self.embedding[ids.to(self.device)]

    def cast(self, dtype: torch.dtype) -> FrozenLM:
        """The same model from the same stored weights in another dtype, made once and kept."""
        if dtype == self.dtype:
            return self
        if self._bare is not None:
            return self._bare.cast(dtype).behind(self.prefix)
        with _casting:  # so that threads that start together make it once
            if dtype not in self._twins:
                self._twins[dtype] = freeze(
                    self.source, self.identity, self.tokenizer, self.device, dtype
                )
            return self._twins[dtype]

    @property
    def bare(self) -> FrozenLM:
        """The model without a prefix."""
        return self._bare or self

    def behind(self, prefix: Prefix | None) -> FrozenLM:
        """Return the model with a constant prefix in front of every input, made once and kept.

        To its callers it is a model like any other: inputs are as long as they were, and `context`
        is what is left. Keys and values of the prefix are computed here, in the model's dtype. A
        prefix that the model had is replaced; None takes it away.
        """
        bare = self.bare
        if prefix is None:
            return bare
        with _casting:  # so that threads that start together make it once
            if prefix.key not in bare._behind:
                bare._behind[prefix.key] = replace(
                    bare,
                    body=bare.body.behind(prefix.on(bare)),
                    context=None if bare.context is None else bare.context - len(prefix),
                    prefix=prefix,
                    _bare=bare,
                )
            return bare._behind[prefix.key]

    def in_both_dtypes(self) -> list[FrozenLM]:
        """Return the model in its own dtype and in float32, once where they are the same.

        What is called exact has to hold in each of them.
        """
        return list(dict.fromkeys((self, self.cast(torch.float32))))

    def encode(self, text: str, bos: str = "drop") -> list[int]:
        """Token ids of a text; `bos` = "keep" leaves what the tokenizer puts in front of it."""
        if self.tokenizer is None:
            raise ValueError(
                f"lm: {self.identity.name} came without a tokenizer; pass token ids instead of text"
            )
        ids: list[int] = self.tokenizer(text, add_special_tokens=bos == "keep", verbose=False)[
            "input_ids"
        ]
        return ids

    def decode_ids(self, ids: Tensor | list[int]) -> str:
        """Text of token ids."""
        if self.tokenizer is None:
            raise ValueError(
                f"lm: {self.identity.name} came without a tokenizer; text=True needs one"
            )
        text = self.tokenizer.decode(
            torch.as_tensor(ids, device="cpu"), clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    @cached_property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-text token, where tokenizer or configuration names one."""
        found = getattr(self.tokenizer, "bos_token_id", None)
        return found if found is not None else getattr(self.config, "bos_token_id", None)


def require_frozen(lm: object) -> None:
    """ValueError unless `lm` is a FrozenLM."""
    if not isinstance(lm, FrozenLM):
        raise ValueError(f"lm: {type(lm).__name__} is not a FrozenLM; see prototok.load")


def freeze(
    source: PreTrainedModel,
    identity: ModelIdentity,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    dtype: torch.dtype,
) -> FrozenLM:
    """Freeze a model in memory: its weights in `dtype` on `device`, laid out by its family."""
    config = source.config
    context = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    body = body_of(source, device, dtype)
    return FrozenLM(
        identity=identity,
        body=body,
        embedding=embedding_of(source).to(device, dtype),
        context=context,
        dtype=dtype,
        device=device,
        config=config,
        source=source,
        tokenizer=tokenizer,
        attention="sdpa" if isinstance(body, DecoderBody) else "transformers",
    )


def embedding_of(source: PreTrainedModel) -> Tensor:
    """Return the (V, d) input embedding matrix as stored."""
    table: Any = source.get_input_embeddings()
    weight: Tensor = table.weight
    return weight.detach()


def twin_of(lm: FrozenLM, dtype: torch.dtype) -> PreTrainedModel:
    """Return a frozen copy of the transformers model whose `generate` stops at no token."""
    model = GeneralBody.from_model(lm.source, lm.device, dtype).model
    model.generation_config = GenerationConfig()
    return model
