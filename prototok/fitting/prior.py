"""What is known of good vectors on one model before any is fitted.

Letters: d hidden size.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity
from prototok.model.load import BUILT_IN, path_of
from prototok.model.prefix import Prefix
from prototok.results.prefix_file import (
    prefix_header,
    prefix_in,
    prefix_tensors,
    require_prefix,
)
from prototok.results.tensor_file import require_model, write_tensors

FILE = "prior.safetensors"
_FORMAT = "prototok.prior"
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Prior:
    """Where vectors start, N(mean, std²) by coordinate, and the coordinates AdamW sees them in.

    mean   (2, d) fp32, of e and of m
    std    (2, d) fp32; zero for a vector that always starts at its mean
    basis  (2, d, d) fp32, orthonormal columns for e and for m; None: the model's own coordinates
    model  which frozen model it belongs to
    prefix what stood in front of the fits it was learned from; None: nothing
    """

    mean: Tensor
    std: Tensor
    basis: Tensor | None
    model: ModelIdentity
    provenance: dict[str, str] = field(default_factory=dict)
    prefix: Prefix | None = None

    def require_model(self, lm: FrozenLM) -> None:
        """ValueError unless this was learned on the model that `lm` holds."""
        require_model("init", self.model, lm)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it is there whole or not at all."""
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": asdict(self.model),
            "provenance": self.provenance,
            **prefix_header(self.prefix),
        }
        tensors = {"mean": self.mean, "std": self.std, "basis": self.basis}
        tensors |= prefix_tensors(self.prefix)
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Prior:
        """Read what `save` wrote; names, types and shapes are checked before allocation.

        Raises:
            ValueError: no such file, or not one of a prior.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"path: there is no file {path}")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["prototok"])
                if header["format"] != _FORMAT or header["version"] != _VERSION:
                    raise ValueError(f"format {header['format']} {header['version']}")
                model = ModelIdentity(**header["model"])
                d = model.hidden_size
                expected = {"mean": [2, d], "std": [2, d], "basis": [2, d, d]}
                names = set(file.keys())
                if not {"mean", "std"} <= names <= {*expected, "prefix"}:
                    raise ValueError(f"it holds {sorted(names)}")
                if "prefix" in names:
                    front = file.get_slice("prefix")
                    shapes = {"prefix": (front.get_dtype(), tuple(front.get_shape()))}
                    require_prefix(header, shapes, d, model.vocab_size)
                for name in sorted(names & set(expected)):
                    part = file.get_slice(name)
                    if part.get_dtype() != "F32" or part.get_shape() != expected[name]:
                        raise ValueError(f"{name} is {part.get_dtype()} {part.get_shape()}")
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {path} is not a prior ({error})") from error
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
            raise ValueError(f"path: {path} holds numbers that are not finite")
        return cls(
            tensors["mean"], tensors["std"], tensors.get("basis"), model, header["provenance"],
            prefix_in(header, tensors),
        )  # fmt: skip


def shipped_prior(lm: FrozenLM) -> Prior | None:
    """The prior in the package for the model that `lm` holds; None where there is none."""
    if lm.identity.name not in BUILT_IN:
        return None
    path = Path(path_of(lm.identity.name)) / FILE
    return Prior.load(path) if path.exists() else None
