"""What a fit gives back, and the folder it is kept in.

Letters: T texts, S seeds, N targets of a text.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from prototok.results.proto_tokens import ProtoTokens

if TYPE_CHECKING:
    import pandas

    from prototok.results.mem_fit import MemFit

_TOKENS, _FITS = "proto_tokens.safetensors", "fits.parquet"
_MEASURED = (
    "accuracy", "exact", "margin", "correct", "loss", "steps", "seconds", "accuracy_in_batch",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class FitResult:
    """Fitted vectors and what they decode to; every tensor but the first two is (T, S).

    tokens    the vectors that scored, and what they were fitted on
    targets   the target ids of each text, T tensors (N,)
    accuracy  C_tokens / N, decoded alone at batch 1; the lower of the model's dtype and float32
    exact     bool: the text comes back whole from both of these decodings
    margin    fp32, smallest (target logit − best other logit) over positions and both decodings
    correct   int64, C_tokens behind `accuracy`
    loss      fp32, cross-entropy of the decoding in float32, nats per token
    steps     int64, updates made before the fit of the row ended
    seconds   fp32, the row's share of the wall time of the batches it was in
    accuracy_in_batch  accuracy as seen during the fit, in its batch and dtype
    """

    tokens: ProtoTokens
    targets: list[Tensor]
    accuracy: Tensor
    exact: Tensor
    margin: Tensor
    correct: Tensor
    loss: Tensor
    steps: Tensor
    seconds: Tensor
    accuracy_in_batch: Tensor

    def best(self) -> FitResult:
        """The best seed of each text: most right tokens, then the largest margin. S becomes 1."""
        score = self.correct.double() + torch.sigmoid(self.margin.double()) / 2
        chosen = score.argmax(dim=1)
        at = torch.arange(len(chosen), device="cpu")
        return replace(
            self,
            tokens=self.tokens.select(at.tolist(), chosen.tolist()),
            **{name: getattr(self, name)[at, chosen][:, None] for name in _MEASURED},
        )

    def to_pandas(self) -> pandas.DataFrame:
        """One row a (text, seed), with the target ids."""
        return self._table().to_pandas()

    def save(self, folder: str | Path) -> None:
        """Write `proto_tokens.safetensors` and `fits.parquet` into a folder that appears whole.

        A folder that is already there is replaced only if it holds an earlier FitResult.
        """
        folder = Path(folder)
        require_writable(folder)
        temporary = folder.with_name(folder.name + ".tmp")
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        self.tokens.save(temporary / _TOKENS)
        pq.write_table(self._table(), temporary / _FITS)
        old = folder.with_name(folder.name + ".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path) -> FitResult:
        """Read what `save` wrote; ValueError where the folder does not hold a whole fit."""
        folder = Path(folder)
        if not (folder / _FITS).is_file():
            raise ValueError(f"folder: {folder} holds no fit ({_FITS} is missing)")
        tokens = ProtoTokens.load(folder / _TOKENS)
        try:
            table = pq.read_table(folder / _FITS)
            columns = {name: table[name].to_pylist() for name in (*_MEASURED, "targets")}
        except (pa.ArrowException, KeyError, OSError) as error:
            raise ValueError(f"folder: {folder / _FITS} could not be read ({error})") from error
        if table.num_rows != len(tokens):
            raise ValueError(f"folder: {folder} has {table.num_rows} fits, {len(tokens)} vectors")
        shape = (tokens.texts, tokens.seeds)
        measured = {
            name: torch.tensor(columns[name], dtype=_DTYPES[name], device="cpu").view(shape)
            for name in _MEASURED
        }
        targets = [
            torch.tensor(ids, dtype=torch.int64, device="cpu")
            for ids in columns["targets"][:: tokens.seeds]
        ]
        return cls(tokens=tokens, targets=targets, **measured)

    def _table(self) -> pa.Table:
        texts, seeds = self.accuracy.shape
        columns: dict[str, list] = {
            "text": [t for t in range(texts) for _ in range(seeds)],
            "seed": list(range(seeds)) * texts,
            "length": self.tokens.lengths.repeat_interleave(seeds).tolist(),
        }
        columns |= {name: getattr(self, name).flatten().tolist() for name in _MEASURED}
        columns["targets"] = [self.targets[t].tolist() for t in range(texts) for _ in range(seeds)]
        metadata = {"prototok": json.dumps(self.tokens.provenance)}
        return pa.table(columns).replace_schema_metadata(metadata)


_DTYPES = dict.fromkeys(_MEASURED, torch.float32) | {
    "exact": torch.bool,
    "correct": torch.int64,
    "steps": torch.int64,
}


def require_writable(folder: Path) -> None:
    """ValueError unless a FitResult may be written there: nothing else must be in the way."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: {folder} is a file")
    if folder.exists() and not (folder / _FITS).exists() and any(folder.iterdir()):
        raise ValueError(f"folder: {folder} exists and holds something else than a fit")


class FitInterrupted(KeyboardInterrupt):
    """Ctrl-C during a fit; `result` holds the texts whose fits had ended, None where none had.

    It is a MemFit from `autoregressive.fit`. `texts` are their places in the list that was being
    fitted.
    """

    def __init__(self, result: FitResult | MemFit | None, texts: list[int]) -> None:
        super().__init__(f"interrupted with {len(texts)} texts fitted")
        self.result, self.texts = result, texts
