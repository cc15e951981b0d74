"""What other tools need of fitted vectors: whole inputs, and where to read them.

Letters: P vectors of the prefix, L input positions, N targets, K [mem] vectors, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prototok.model.identity import ModelIdentity
from prototok.results.arrangement import Arrangement
from prototok.results.fit_result import FitResult
from prototok.results.mem_fit import MemFit
from prototok.results.proto_tokens import ProtoTokens

Exportable = FitResult | ProtoTokens | MemFit


@dataclass(frozen=True, eq=False)
class Exported:
    """One row as a plain input.

    inputs     (P + L, d) fp32, everything that the model is fed, the prefix in front
    read_from  the position that predicts the first token; of [mem] vectors the last one
    tokens     N
    ids        the N target ids; None where they are not known
    """

    inputs: Tensor
    read_from: int
    tokens: int
    ids: list[int] | None


@dataclass(frozen=True, eq=False)
class Export:
    """All rows of an export, the best seed of each text where that is known.

    kind   "one forward", read at every position; or "generate", token by token behind the vectors
    model  the frozen model they belong to
    dtype  in which it was loaded when they were fitted
    """

    kind: str
    model: ModelIdentity
    dtype: str
    rows: list[Exported]


def rows_of(fit: Exportable) -> Export:
    """Return fitted vectors as plain inputs.

    Raises ValueError for what is no fit, and for [mem] vectors behind which t_1 is given.
    """
    if isinstance(fit, MemFit):
        return _of_mem(fit)
    if isinstance(fit, FitResult):
        best = fit.best()
        return _of_tokens(best.tokens, [ids.tolist() for ids in best.targets])
    if isinstance(fit, ProtoTokens):
        return _of_tokens(fit, [None] * len(fit))
    raise ValueError(f"fit: {type(fit).__name__} is not a FitResult, ProtoTokens or MemFit")


def _of_tokens(tokens: ProtoTokens, ids: list[list[int]] | list[None]) -> Export:
    arrangement = Arrangement.parse(tokens.arrangement)
    front = tokens.e.new_empty(0, tokens.e.shape[-1])
    if tokens.prefix is not None:
        front = tokens.prefix.vectors
    rows = []
    for row in range(len(tokens)):
        length = int(tokens.lengths[row // tokens.seeds])
        inputs = torch.cat([front, tokens.vectors(row)[arrangement.layout(length)]])
        rows.append(Exported(inputs, len(front) + arrangement.offset, length, ids[row]))
    return Export("one forward", tokens.model, tokens.provenance.get("dtype", "float32"), rows)


def _of_mem(fit: MemFit) -> Export:
    if fit.first == "given":
        raise ValueError("fit: behind these [mem] vectors t_1 is given; fit with first='predicted'")
    front = fit.mem.new_empty(0, fit.mem.shape[-1])
    if fit.prefix is not None:
        front = fit.prefix.vectors
    rows = []
    for mem, exact, targets in zip(fit.mem, fit.accuracy, fit.targets, strict=True):
        inputs = torch.cat([front, mem[int(exact.argmax())]])
        rows.append(Exported(inputs, len(inputs) - 1, len(targets), targets.tolist()))
    return Export("generate", fit.model, fit.provenance.get("dtype", "float32"), rows)
