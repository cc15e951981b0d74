"""MemFit: fitted [mem] vectors, what they generate, and the model they belong to.

Letters: T texts, S seeds, K vectors in front, d hidden size, N targets of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prototok.common.shown import html_table
from prototok.common.world import own_world
from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity
from prototok.model.prefix import Prefix
from prototok.results.provenance import seeds_of
from prototok.results.summary import summary_of
from prototok.results.tensor_file import (
    Origin,
    Shapes,
    read_tensors,
    require_model,
    write_tensors,
)

_FORM = ("prototok.mem_fit", 1)
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
    seed      int64, the seed that the row started from
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
    seed: Tensor
    provenance: dict[str, str]
    prefix: Prefix | None = None

    def __repr__(self) -> str:
        return f"MemFit({summary_of(self)}, K = {self.mem.shape[2]})"

    def _repr_html_(self) -> str:
        """Return a small table for notebooks, one row a fit."""
        texts, seeds = self.exact.shape
        return html_table(
            repr(self),
            ("text", "seed", "tokens", "accuracy", "exact", "margin", "steps", "seconds"),
            (
                (
                    t,
                    int(self.seed[t, s]),
                    len(self.targets[t]),
                    f"{float(self.accuracy[t, s]):.3f}",
                    bool(self.exact[t, s]),
                    f"{float(self.margin[t, s]):.2f}",
                    int(self.steps[t, s]),
                    f"{float(self.seconds[t, s]):.1f}",
                )
                for t in range(texts)
                for s in range(seeds)
            ),
            texts * seeds,
        )

    @property
    def failed(self) -> Tensor:
        """Flag (T, S) fits that ended because a loss or a gradient was not finite.

        Such a row has accuracy 0 and a margin of −inf, which no decoding gives.
        """
        return torch.isneginf(self.margin)

    def require_model(self, lm: FrozenLM) -> None:
        """Raise ValueError unless these were fitted on the model that `lm` holds."""
        require_model("mem", self.model, lm)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it is there whole or not at all."""
        tensors = {name: getattr(self, name) for name in ("mem", "seed", *_MEASURED)}
        tensors["targets"] = torch.cat(self.targets)
        tensors["lengths"] = torch.tensor(
            [len(ids) for ids in self.targets], dtype=torch.int64, device="cpu"
        )
        origin = Origin(self.model, self.provenance, self.prefix)
        write_tensors(path, _FORM, tensors, origin, first=self.first)

    @classmethod
    @own_world
    def load(cls, path: str | Path) -> MemFit:
        """Read what `save` wrote; ValueError for anything else."""
        header, tensors, origin = read_tensors(path, "one of a MemFit", _FORM, _require_consistent)
        lengths = tensors["lengths"].tolist()
        if not all(n >= 1 for n in lengths) or sum(lengths) != len(tensors["targets"]):
            raise ValueError(f"path: {path} is inconsistent, its lengths are not of its targets")
        ids = tensors["targets"]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < origin.model.vocab_size:
            raise ValueError(f"path: {path} is inconsistent, a target is no token of its model")
        shape = tensors["mem"].shape[:2]
        seed = tensors.get("seed")
        if seed is None:  # a file from before they were kept
            seed = seeds_of(origin.provenance, shape[1]).expand(shape).clone()
        return cls(
            mem=tensors["mem"], targets=list(ids.split(lengths)), first=header["first"],
            model=origin.model, provenance=origin.provenance, seed=seed, prefix=origin.prefix,
            **{name: tensors[name] for name in _MEASURED},
        )  # fmt: skip


_NAMES = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}


def _require_consistent(header: dict, shapes: Shapes, model: ModelIdentity) -> None:
    """Raise ValueError unless the shapes in the file are those of one fit."""
    width = model.hidden_size
    if header["first"] not in ("predicted", "given"):
        raise ValueError(f"it says that the first token is {header['first']!r}")
    if set(shapes) - {"seed"} != {"mem", "targets", "lengths", *_MEASURED}:
        raise ValueError(f"it holds {sorted(shapes)}")
    dtype, shape = shapes["mem"]
    if dtype != "F32" or len(shape) != 4 or shape[3] != width:
        raise ValueError(f"mem is {dtype} {shape} where F32 (texts, seeds, K, {width}) is expected")
    for name, kind in {**_MEASURED, "seed": torch.int64}.items():
        if name in shapes and shapes[name] != (_NAMES[kind], shape[:2]):
            raise ValueError(f"{name} is {shapes[name]} where one value a fit is expected")
    if shapes["lengths"] != ("I64", shape[:1]):
        raise ValueError(f"lengths is {shapes['lengths']} where one int64 a text is expected")
    if shapes["targets"][0] != "I64" or len(shapes["targets"][1]) != 1:
        raise ValueError(f"targets is {shapes['targets']} where one row of int64 is expected")
