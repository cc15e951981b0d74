"""ProtoTokens: fitted vectors, what they decode to, and the model they belong to.

Letters: T texts, S seeds, K leading vectors, d hidden size, G sharing groups, N targets of a text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from prototok.common.arguments import is_count
from prototok.common.shown import count
from prototok.common.world import own_world
from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity
from prototok.model.prefix import Prefix
from prototok.results.arrangement import Arrangement
from prototok.results.hub import OnHub
from prototok.results.tensor_file import (
    Origin,
    Shapes,
    read_tensors,
    require_model,
    require_tokenizer,
    write_tensors,
)

FILE = "proto_tokens.safetensors"
_FORM = ("prototok.proto_tokens", 1)
_MOST_TOKENS = 1 << 24  # of one text; no model has room for as many


@dataclass(frozen=True, eq=False)
class ProtoTokens(OnHub):
    """Vectors for T texts and S seeds each, fp32 on the CPU.

    e        (T, S, d), or (T, S, K, d) for K > 1 leading vectors; (G, d) or (G, K, d) if shared
    m        (T, S, d), or (G, d) if shared; None for the arrangement without m
    lengths  (T,) int64, the N of each text
    groups   (T,) int64, each text's sharing group; None when nothing is shared
    prefix   what stands in front of every row, the same for all; None: nothing
    """

    e: Tensor
    m: Tensor | None
    lengths: Tensor
    arrangement: str
    model: ModelIdentity
    seeds: int
    share: str | None = None
    groups: Tensor | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    prefix: Prefix | None = None

    def __repr__(self) -> str:
        shared = "" if self.share is None else f", {self.share} shared"
        front = "" if self.prefix is None else f", behind {self.prefix}"
        return (
            f"ProtoTokens({self.size}, {self.arrangement!r}{shared}{front}, "
            f"for {self.model.name!r})"
        )

    @property
    def size(self) -> str:
        """Texts, seeds and lengths in words, such as "2 texts × 2 seeds of 7–14 tokens"."""
        rows = f"{count(self.texts, 'text')} × {count(self.seeds, 'seed')}"
        if not self.texts:
            return rows
        shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        span = f"{shortest}–{longest} tokens" if shortest < longest else count(longest, "token")
        return f"{rows} of {span}"

    @property
    def texts(self) -> int:
        return len(self.lengths)

    def __len__(self) -> int:
        """Count the rows: texts × seeds, text by text."""
        return self.texts * self.seeds

    def vectors(self, row: int) -> Tensor:
        """Return (slots, d): e₁ … e_K and, where the arrangement has one, m, of one row."""
        text, seed = divmod(row, self.seeds)
        parts = []
        for name, stored in (("e", self.e), ("m", self.m)):
            if stored is None:
                continue
            if self.share == name:
                assert self.groups is not None
                parts.append(stored[self.groups[text]])
            else:
                parts.append(stored[text, seed])
        width = self.e.shape[-1]
        return torch.cat([part.reshape(-1, width) for part in parts])

    def select(self, texts: list[int], seeds: list[int] | None = None) -> ProtoTokens:
        """Keep the named texts; with `seeds`, one seed of each: seeds[i] of texts[i]."""
        at = torch.tensor(texts, dtype=torch.int64, device="cpu")

        def pick(name: str, stored: Tensor | None) -> Tensor | None:
            if stored is None or self.share == name:
                return stored
            return (
                stored[at]
                if seeds is None
                else stored[at, torch.tensor(seeds, dtype=torch.int64, device="cpu")][:, None]
            )

        e = pick("e", self.e)
        assert e is not None
        return replace(
            self,
            e=e,
            m=pick("m", self.m),
            lengths=self.lengths[at],
            groups=None if self.groups is None else self.groups[at],
            seeds=self.seeds if seeds is None else 1,
        )

    def require_model(self, lm: FrozenLM) -> None:
        """Raise ValueError unless these were fitted on the model that `lm` holds."""
        require_model("tokens", self.model, lm)

    def require_tokenizer(self, lm: FrozenLM) -> None:
        """ValueError unless the ids that these decode to mean to `lm` the text that was fitted."""
        require_tokenizer("tokens", self.model, lm)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it is there whole or not at all."""
        tensors = {"e": self.e, "m": self.m, "lengths": self.lengths, "groups": self.groups}
        write_tensors(
            path, _FORM, tensors, Origin(self.model, self.provenance, self.prefix),
            arrangement=self.arrangement, share=self.share, seeds=self.seeds,
        )  # fmt: skip

    _file: ClassVar[str] = FILE
    _usage: ClassVar[str] = (
        'tokens = prototok.ProtoTokens.from_pretrained("{repo_id}")\n'
        "print(prototok.decode(lm, tokens, text=True))"
    )

    @classmethod
    @own_world
    def load(cls, path: str | Path) -> ProtoTokens:
        """Read what `save` wrote. Names, types and shapes are checked before anything is allocated.

        Raises:
            ValueError: no such file, damaged, not written by prototok, or inconsistent.
        """
        header, tensors, origin = read_tensors(
            path, "one of proto-tokens", _FORM, _require_consistent
        )
        lengths, groups = tensors["lengths"], tensors.get("groups")
        if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= _MOST_TOKENS:
            raise ValueError(f"path: {path} is inconsistent, a text of it has no possible length")
        if groups is not None and len(groups):
            last = len(tensors[header["share"]]) - 1
            if not 0 <= int(groups.min()) <= int(groups.max()) <= last:
                raise ValueError(f"path: {path} is inconsistent, a text of it is in no group")
        return cls(
            e=tensors["e"],
            m=tensors.get("m"),
            lengths=tensors["lengths"],
            arrangement=header["arrangement"],
            model=origin.model,
            seeds=header["seeds"],
            share=header["share"],
            groups=tensors.get("groups"),
            provenance=origin.provenance,
            prefix=origin.prefix,
        )


def _require_consistent(header: dict, shapes: Shapes, model: ModelIdentity) -> None:
    """Raise ValueError unless the shapes in the file are the ones its header implies."""
    arrangement = Arrangement.parse(header["arrangement"])
    seeds, share = header["seeds"], header["share"]
    if not is_count(seeds):
        raise ValueError(f"it has {seeds!r} seeds")
    if share not in (None, "e", "m"):
        raise ValueError(f"it shares {share!r}")
    names = {"e", "lengths"} | ({"m"} if arrangement.has_m else set())
    names |= {"groups"} if share else set()
    if set(shapes) != names or share not in (None, *names):
        raise ValueError(f"it holds {sorted(shapes)} where {sorted(names)} are expected")
    (texts,) = shapes["lengths"][1] if len(shapes["lengths"][1]) == 1 else (-1,)
    inner = {"e": (arrangement.leading,) if arrangement.leading > 1 else (), "m": ()}
    for name in names & {"e", "m"}:
        dtype, shape = shapes[name]
        tail = (*inner[name], model.hidden_size)
        expected = (shape[0] if shape else 0, *tail) if share == name else (texts, seeds, *tail)
        if dtype != "F32" or shape != expected:
            raise ValueError(f"{name} is {dtype} {shape} where F32 {expected} is expected")
    for name in names & {"lengths", "groups"}:
        if shapes[name] != ("I64", (texts,)):
            raise ValueError(f"{name} is {shapes[name]} where one int64 a text is expected")
