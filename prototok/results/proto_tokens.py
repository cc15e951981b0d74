"""ProtoTokens: fitted vectors, what they decode to, and the model they belong to.

Letters: T texts, S seeds, K leading vectors, d hidden size, G sharing groups, N targets of a text.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity
from prototok.model.prefix import Prefix
from prototok.results.arrangement import Arrangement
from prototok.results.prefix_file import (
    prefix_header,
    prefix_in,
    prefix_tensors,
    require_prefix,
)
from prototok.results.tensor_file import require_model, write_tensors

_FORMAT = "prototok.proto_tokens"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class ProtoTokens:
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

    @property
    def texts(self) -> int:
        return len(self.lengths)

    def __len__(self) -> int:
        """Rows: texts × seeds, text by text."""
        return self.texts * self.seeds

    def vectors(self, row: int) -> Tensor:
        """(slots, d): e₁ … e_K and, where the arrangement has one, m, of one row."""
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
        """The named texts; with `seeds`, one seed of each: seeds[i] of texts[i]."""
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
        """ValueError unless these were fitted on the model that `lm` holds."""
        require_model("tokens", self.model, lm)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it is there whole or not at all."""
        tensors = {"e": self.e, "m": self.m, "lengths": self.lengths, "groups": self.groups}
        tensors |= prefix_tensors(self.prefix)
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "arrangement": self.arrangement,
            "share": self.share,
            "seeds": self.seeds,
            "model": asdict(self.model),
            "provenance": self.provenance,
            **prefix_header(self.prefix),
        }
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> ProtoTokens:
        """Read what `save` wrote. Names, types and shapes are checked before anything is allocated.

        Raises:
            ValueError: no such file, damaged, not written by prototok, or inconsistent.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"path: there is no file {path}")
        try:
            with safe_open(path, "pt") as file:
                header = _header(path, file.metadata())
                shapes = {}
                for key in file.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
                    part = file.get_slice(key)
                    shapes[key] = (part.get_dtype(), tuple(part.get_shape()))
                _require_consistent(path, header, shapes)
                tensors = {key: file.get_tensor(key) for key in shapes}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"path: {path} is not a whole safetensors file ({error})") from error
        for name, stored in tensors.items():
            if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
                raise ValueError(f"path: {path} holds values in {name} that are not finite")
        return cls(
            e=tensors["e"],
            m=tensors.get("m"),
            lengths=tensors["lengths"],
            arrangement=header["arrangement"],
            model=ModelIdentity(**header["model"]),
            seeds=header["seeds"],
            share=header["share"],
            groups=tensors.get("groups"),
            provenance=header["provenance"],
            prefix=prefix_in(header, tensors),
        )


def _header(path: Path, metadata: dict[str, str] | None) -> dict:
    foreign = ValueError(f"path: {path} is a safetensors file, but not one of proto-tokens")
    try:
        header = json.loads((metadata or {})["prototok"])
    except (KeyError, ValueError):
        raise foreign from None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise foreign
    if header.get("version") != _VERSION:
        raise ValueError(
            f"path: {path} has format version {header.get('version')}; "
            f"this prototok reads {_VERSION}"
        )
    return header


def _require_consistent(path: Path, header: dict, shapes: dict) -> None:
    """The shapes in the file are the ones its header implies."""

    def refuse(what: str) -> ValueError:
        return ValueError(f"path: {path} is inconsistent, {what}")

    try:
        arrangement = Arrangement.parse(header["arrangement"])
        identity = ModelIdentity(**header["model"])
        seeds, share, _ = header["seeds"], header["share"], header["provenance"]
    except (KeyError, TypeError, ValueError) as error:
        raise refuse(f"its header does not parse ({error})") from None
    names = {"e", "lengths"} | ({"m"} if arrangement.has_m else set())
    names |= {"groups"} if share else set()
    try:
        require_prefix(header, shapes, identity.hidden_size, identity.vocab_size)
    except ValueError as error:
        raise refuse(str(error)) from None
    if set(shapes) - {"prefix"} != names or share not in (None, "e", "m"):
        raise refuse(f"it holds {sorted(shapes)} where {sorted(names)} are expected")
    (texts,) = shapes["lengths"][1] if len(shapes["lengths"][1]) == 1 else (-1,)
    inner = {"e": (arrangement.leading,) if arrangement.leading > 1 else (), "m": ()}
    for name in names & {"e", "m"}:
        dtype, shape = shapes[name]
        tail = (*inner[name], identity.hidden_size)
        expected = (shape[0] if shape else 0, *tail) if share == name else (texts, seeds, *tail)
        if dtype != "F32" or shape != expected:
            raise refuse(f"{name} is {dtype} {shape} where F32 {expected} is expected")
    for name in names & {"lengths", "groups"}:
        if shapes[name] != ("I64", (texts,)):
            raise refuse(f"{name} is {shapes[name]} where one int64 a text is expected")
