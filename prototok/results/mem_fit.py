"""MemFit: fitted [mem] vectors, what they generate, and the model they belong to.

Letters: T texts, S seeds, K vectors in front, d hidden size, N targets of a text.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity
from prototok.model.prefix import Prefix
from prototok.results.prefix_file import (
    prefix_header,
    prefix_in,
    prefix_tensors,
    require_prefix,
)
from prototok.results.tensor_file import require_model, write_tensors

_FORMAT = "prototok.mem_fit"
_VERSION = 1
_MEASURED = {
    "accuracy": torch.float32,
    "exact": torch.bool,
    "margin": torch.float32,
    "accuracy_teacher_forced": torch.float32,
    "steps": torch.int64,
    "seconds": torch.float32,
}


@dataclass(frozen=True, eq=False)
class MemFit:
    """The result of `autoregressive.fit`; every tensor but mem and the targets is (T, S).

    mem       (T, S, K, d) fp32 on the CPU, the vectors that scored
    targets   the target ids of each text, T tensors (N,)
    first     "predicted", or "given": t_1 is part of the prompt and N − 1 tokens are scored
    model     the model they were fitted on
    accuracy  share of the scored tokens that come back when generated alone at batch 1, from the
              vectors and where it is given t_1; the lower of the model's dtype and float32
    exact     bool: all of them come back, in both dtypes
    margin    fp32, smallest (target logit − best other logit) up to the first token that was
              generated wrong; at most 0 where there is one
    accuracy_teacher_forced  the same share with the text before each token given, as Kuratov et al.
              count; it can be near 1 where the accuracy is not
    steps     int64, updates made before the fit of the row ended
    seconds   fp32, the row's share of the wall time of the batches it was in
    prefix    what stands in front of every row's vectors, the same for all; None: nothing
    """

    mem: Tensor
    targets: list[Tensor]
    first: str
    model: ModelIdentity
    accuracy: Tensor
    exact: Tensor
    margin: Tensor
    accuracy_teacher_forced: Tensor
    steps: Tensor
    seconds: Tensor
    provenance: dict[str, str]
    prefix: Prefix | None = None

    def require_model(self, lm: FrozenLM) -> None:
        """ValueError unless these were fitted on the model that `lm` holds."""
        require_model("mem", self.model, lm)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it is there whole or not at all."""
        tensors = {name: getattr(self, name) for name in ("mem", *_MEASURED)}
        tensors |= prefix_tensors(self.prefix)
        tensors["targets"] = torch.cat(self.targets)
        tensors["lengths"] = torch.tensor(
            [len(ids) for ids in self.targets], dtype=torch.int64, device="cpu"
        )
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "first": self.first,
            "model": asdict(self.model),
            "provenance": self.provenance,
            **prefix_header(self.prefix),
        }
        write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> MemFit:
        """Read what `save` wrote; ValueError for anything else."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"path: there is no file {path}")
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("prototok", "null"))
                if not isinstance(header, dict) or header.get("format") != _FORMAT:
                    raise ValueError(f"path: {path} is a safetensors file, but not one of a MemFit")
                if header.get("version") != _VERSION:
                    raise ValueError(
                        f"path: {path} has format version {header.get('version')}; "
                        f"this prototok reads {_VERSION}"
                    )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"path: {path} is not a whole safetensors file ({error})") from error
        try:
            mem, lengths = tensors["mem"], tensors["lengths"].tolist()
            model, first = ModelIdentity(**header["model"]), header["first"]
            measured = {name: tensors[name].to(dtype) for name, dtype in _MEASURED.items()}
            targets = list(tensors["targets"].split(lengths))
            found = {name: ("F32", tuple(t.shape)) for name, t in tensors.items()}
            require_prefix(header, found, model.hidden_size, model.vocab_size)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"path: {path} is inconsistent ({error})") from None
        texts = mem.shape[:2] if mem.ndim == 4 else ()
        if len(lengths) != len(mem) or any(column.shape != texts for column in measured.values()):
            raise ValueError(f"path: {path} is inconsistent, its tensors are of different fits")
        return cls(
            mem=mem, targets=targets, first=first, model=model,
            provenance=header.get("provenance", {}), prefix=prefix_in(header, tensors), **measured,
        )  # fmt: skip
