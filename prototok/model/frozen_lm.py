"""A frozen causal language model that takes vectors as its input.

Letters: B rows, N positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prototok.common.world import own_world
from prototok.model.families import Body, DecoderBody, body_of
from prototok.model.families.general import GeneralBody
from prototok.model.identity import ModelIdentity, is_sampled, sampled_fingerprint_of
from prototok.model.prefix import Prefix
from prototok_kernels.plan import Plan, plan_of

_casting = threading.Lock()
_version = attrgetter("_version")
_PREFIXES_KEPT = 8  # models behind other prefixes: a study of thousands must not keep them all


@dataclass(frozen=True, eq=False)
class FrozenLM:
    """A frozen causal language model, ready for input vectors that are not in its vocabulary.

    Attributes:
        identity: name, resolved revision, shape and fingerprint.
        body: the family's forward; `body.family` is "llama", "gpt_neox" or "general", and
            `body.reason` says why.
        context: positions the model was built for; None where it has no limit.
        dtype, device: of the weights and of the arithmetic between them.
        source: the transformers model, its weights as stored; shared with a model of the user's
            that was in memory, which must stay as it was: see `require_unchanged`.
        attention: "sdpa", "flash" (the flash-attn package), or "transformers" for the general body.
        dequantised: how the matrices of a GGUF file are stored, such as "Q4_1"; None elsewhere.
        prefix: what stands in front of every input (see `behind`); None: nothing.
    """

    identity: ModelIdentity
    body: Body
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
    _version: int = field(repr=False, default=0)
    _sampled: str = field(repr=False, default="")
    _twins: dict[torch.dtype, FrozenLM] = field(repr=False, default_factory=dict)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        context = "no limit" if self.context is None else f"context {self.context}"
        front = "" if self.prefix is None else f", behind {self.prefix}"
        return (
            f"FrozenLM({self.identity.name!r}, {self.body.family}, d = {self.hidden_size}, "
            f"V = {self.vocab_size}, {context}, {dtype} on {self.device}{front})"
        )

    @cached_property
    def embedding(self) -> Tensor:
        """(V, d) what the model feeds its first block for each token id."""
        return self.body.embedding.to(self.dtype)

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
        """Map embeddings (B, N, d) to what the head reads, or to logits where there is none."""
        self.require_unchanged()
        rows, length, _ = inputs_embeds.shape
        return self.body.hidden(inputs_embeds, self.plan(rows, length, backend))

    def logits(self, inputs_embeds: Tensor, backend: str = "auto") -> Tensor:
        """Map embeddings (B, N, d) to logits (B, N, V) in the model's dtype."""
        hidden = self.hidden(inputs_embeds, backend)
        return hidden if self.body.head is None else hidden @ self.body.head.T

    def hidden_of_ids(self, ids: Tensor, backend: str = "auto") -> Tensor:
        """`hidden` of token ids (B, N), which go through the model's own embedding."""
        if isinstance(self.body, DecoderBody) or self.prefix is not None:
            return self.hidden(self.embed(ids), backend)
        self.require_unchanged()
        return self.body.hidden_of_ids(ids.to(self.device))

    def embed(self, ids: Tensor) -> Tensor:
        """Return what the model feeds its first block for token ids, (…, d).

        Scales that a model multiplies its embedding matrix with are included. What a model adds for
        ids in later blocks (Gemma 3n) is not: no vector at the input can carry it.

        Raises ValueError for a model that feeds its blocks no multiple of a row for an id.
        """
        self.require_unchanged()
        return self.body.embed(ids.to(self.device))

    @own_world
    def cast(self, dtype: torch.dtype) -> FrozenLM:
        """Return the model in another dtype, made once from the stored weights and kept."""
        self.require_unchanged()
        if dtype == self.dtype:
            return self
        if self._bare is not None:
            return self._bare.cast(dtype).behind(self.prefix)
        with _casting:  # so that threads that start together make it once
            if dtype not in self._twins:
                self.require_unchanged(sampled=True)
                body = None
                if isinstance(self.body, DecoderBody) and self._holds_all_of(dtype):
                    body = self.body.upcast(dtype)
                self._twins[dtype] = freeze(
                    self.source, self.identity, self.tokenizer, self.device, dtype, body
                )
            return self._twins[dtype]

    def _holds_all_of(self, dtype: torch.dtype) -> bool:
        """Return True if the weights here, as they are on the GPU, say all of the stored ones.

        Then a wider twin is made of them block by block: a whole one of 8 billion parameters in
        float32 would take 32 GB. On the CPU the C++ reads a twin's weights where they lie.
        """
        wider = torch.promote_types(self.dtype, dtype) == dtype
        stored = all(weight.dtype == self.dtype for weight in self._weights)
        return wider and stored and self.device.type != "cpu"

    @property
    def bare(self) -> FrozenLM:
        """The model without a prefix."""
        return self._bare or self

    @own_world
    def behind(self, prefix: Prefix | None) -> FrozenLM:
        """Return the model with a constant prefix in front of every input.

        The last few that were asked for are kept, so that asking again costs nothing.

        To its callers it is a model like any other: inputs are as long as they were, and `context`
        is what is left. Keys and values of the prefix are computed here, in the model's dtype. A
        prefix that the model had is replaced; None takes it away.
        """
        bare = self.bare
        if prefix is None:
            return bare
        with _casting:  # so that threads that start together make it once
            made = bare._behind.pop(prefix.key, None) or replace(
                bare,
                body=bare.body.behind(bare._vectors_of(prefix)),
                context=None if bare.context is None else bare.context - len(prefix),
                prefix=prefix,
                _bare=bare,
            )
            bare._behind[prefix.key] = made  # as the latest; the dict is in that order
            while len(bare._behind) > _PREFIXES_KEPT:
                del bare._behind[next(iter(bare._behind))]
            return made

    @property
    def prefix_vectors(self) -> Tensor | None:
        """(P, d) what stands in front, in the model's dtype and on its device; None: nothing."""
        return None if self.prefix is None else self.bare._vectors_of(self.prefix)

    def _vectors_of(self, prefix: Prefix) -> Tensor:
        """The prefix as the model would embed its tokens itself, where it has any."""
        if prefix.ids is not None:
            ids = torch.tensor(prefix.ids, dtype=torch.int64, device="cpu")
            return self.embed(ids)
        return prefix.vectors.to(self.device, self.dtype)

    def in_both_dtypes(self) -> list[FrozenLM]:
        """Return the model in its own dtype and in float32, once where they are the same.

        What is called exact has to hold in each of them.
        """
        return list(dict.fromkeys((self, self.cast(torch.float32))))

    def require_unchanged(self, sampled: bool = False) -> None:
        """ValueError if the stored weights were changed in place since they were loaded.

        It counts the changes that torch counts, in microseconds, and those by torch's optimisers
        (`in_memory.count_steps`). Those made through `.data`, or by kernels of others, are not
        among them; `sampled` also compares 64 elements of every weight.
        """
        if self._version == version_of(self._weights) and (
            not sampled or self._sampled == sampled_fingerprint_of(self.source)
        ):
            return
        raise ValueError(
            f"lm: the weights of {self.identity.name} were changed since it was loaded; "
            "load it again"
        )

    def __setstate__(self, state: dict) -> None:
        """Take over what a copy of another has: its weights are new, and unchanged so far."""
        self.__dict__.update(state)
        object.__setattr__(self, "_version", version_of(list(self.source.parameters())))

    def has_fingerprint(self, stored: str) -> bool:
        """Return True if `stored`, of whatever version, is the fingerprint of this model."""
        return stored == (self._sampled if is_sampled(stored) else self.identity.fingerprint)

    @cached_property
    def _weights(self) -> list[Tensor]:
        return list(self.source.parameters())

    def encode(self, text: str, bos: str = "drop") -> list[int]:
        """Tokenise a text; `bos` = "keep" leaves what the tokenizer puts in front of it."""
        if self.tokenizer is None:
            raise ValueError(
                f"lm: {self.identity.name} came without a tokenizer; pass token ids instead of text"
            )
        ids: list[int] = self.tokenizer(text, add_special_tokens=bos == "keep", verbose=False)[
            "input_ids"
        ]
        return ids

    def decode_ids(self, ids: Tensor | list[int]) -> str:
        """Return the text of token ids."""
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
        """Return the beginning-of-text id, where tokenizer or configuration names one."""
        found = getattr(self.tokenizer, "bos_token_id", None)
        return found if found is not None else getattr(self.config, "bos_token_id", None)


def require_frozen(lm: object, sampled: bool = True) -> None:
    """Raise ValueError unless `lm` is a FrozenLM whose weights are those that were loaded.

    `sampled` as in `FrozenLM.require_unchanged`, which reads weights back to the host.
    """
    if not isinstance(lm, FrozenLM):
        raise ValueError(f"lm: {type(lm).__name__} is not a FrozenLM; see prototok.load")
    lm.require_unchanged(sampled=sampled)


def freeze(
    source: PreTrainedModel,
    identity: ModelIdentity,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    dtype: torch.dtype,
    body: Body | None = None,
) -> FrozenLM:
    """Freeze a model in memory: its weights in `dtype` on `device`, laid out by its family."""
    body = body or body_of(source, device, dtype)
    return FrozenLM(
        identity=identity,
        body=body,
        context=context_of(source.config),
        dtype=dtype,
        device=device,
        config=source.config,
        source=source,
        tokenizer=tokenizer,
        attention="sdpa" if isinstance(body, DecoderBody) else "transformers",
        _version=version_of(list(source.parameters())),
        _sampled=sampled_fingerprint_of(source),
    )


def context_of(config: PreTrainedConfig) -> int | None:
    """Return the positions that a model was built for; None where it has no limit."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return found if found is not None and found > 0 else None


def version_of(weights: list[Tensor]) -> int:
    """Return how often these were changed in place; torch counts for all who share the storage."""
    try:
        return sum(map(_version, weights))
    except RuntimeError:  # one was made in inference mode, which counts nothing
        return sum(weight._version for weight in weights if not weight.is_inference())


def twin_of(lm: FrozenLM, dtype: torch.dtype) -> PreTrainedModel:
    """Return a frozen copy of the transformers model whose `generate` stops at no token."""
    lm.require_unchanged(sampled=True)
    model = GeneralBody.from_model(lm.source, lm.device, dtype).model
    model.generation_config = GenerationConfig()
    return model
