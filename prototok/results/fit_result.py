"""The result of a fit, and the folder it is kept in.

Letters: T texts, S seeds, N targets of a text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from prototok.common.files import flush, for_arrow, is_temporary, remove_orphans, whole
from prototok.common.json import parse_json
from prototok.common.shown import html_table
from prototok.common.world import own_world
from prototok.results.history import History
from prototok.results.proto_tokens import ProtoTokens
from prototok.results.provenance import seeds_of
from prototok.results.summary import summary_of
from prototok.results.tensor_file import is_tensor_file
from prototok.results.unfinished import is_left_over

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from prototok.results.mem_fit import MemFit

_TOKENS, _FITS = "proto_tokens.safetensors", "fits.parquet"
_SHA256 = b"prototok.tensors_sha256"  # of the vectors' file, so that the two go together
_MEASURED = (
    "accuracy", "exact", "margin", "correct", "loss", "steps", "seconds", "accuracy_in_batch",
    "seed",
)  # fmt: skip
# In the metadata of a table whose column `seed` holds seeds, and not their places in the list.
_SEEDS = b"prototok.seeds"


@dataclass(frozen=True, eq=False)
class FitResult:
    """Fitted vectors and what they decode to; every tensor but the first two is (T, S).

    tokens    the vectors that scored, and what they were fitted on
    targets   the target ids of each text, T tensors (N,)
    accuracy  C_tokens / N, decoded alone at batch 1; the lower of the model's dtype and float32
    exact     bool: the text comes back whole from both of these decodings
    margin    fp32, smallest (target logit − best other logit) over positions and both decodings
    correct   int64, C_tokens behind `accuracy`
    loss      fp32, cross-entropy of the decoding, nats per token; the higher of both
    steps     int64, updates made before the fit of the row ended
    seconds   fp32, the row's share of the wall time of the batches it was in
    accuracy_in_batch  accuracy as seen during the fit, in its batch and dtype
    seed      int64, the seed that the row started from; −1 where a file from before seeds were kept
              holds the best of several
    history   what was seen of each row as it was fitted, where `fast_fit` was asked for it; no file
              keeps it
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
    seed: Tensor
    history: History | None = None

    def __repr__(self) -> str:
        return f"FitResult({summary_of(self)})"

    def _repr_html_(self) -> str:
        """Return a small table for notebooks, the best seed of each text."""
        best = self.best()
        return html_table(
            repr(self),
            ("text", "tokens", "right", "exact seeds", "margin", "steps", "seconds"),
            (
                (
                    t,
                    int(best.tokens.lengths[t]),
                    int(best.correct[t, 0]),
                    f"{int(self.exact[t].sum())} of {self.tokens.seeds}",
                    f"{float(best.margin[t, 0]):.2f}",
                    int(best.steps[t, 0]),
                    f"{float(self.seconds[t].sum()):.1f}",
                )
                for t in range(self.tokens.texts)
            ),
            self.tokens.texts,
        )

    def plot(self) -> Figure:
        """Draw loss and accuracy of every row over its steps; needs matplotlib.

        Raises ValueError where nothing was recorded: fit with `history=True`.
        """
        if self.history is None:
            raise ValueError("history: nothing was recorded; fit with history=True")
        return self.history.plot()

    @property
    def failed(self) -> Tensor:
        """Flag (T, S) fits that ended because a loss or a gradient was not finite.

        Such a row has accuracy 0 and a margin of −inf, which no decoding gives.
        """
        return torch.isneginf(self.margin)

    def best(self) -> FitResult:
        """Keep the best seed of each text: most right tokens, then largest margin; S becomes 1."""
        score = self.correct.double() + torch.sigmoid(self.margin.double()) / 2
        chosen = score.argmax(dim=1)
        at = torch.arange(len(chosen), device="cpu")
        return replace(
            self,
            tokens=self.tokens.select(at.tolist(), chosen.tolist()),
            history=self.history and self.history.select(chosen.tolist()),
            **{name: getattr(self, name)[at, chosen][:, None] for name in _MEASURED},
        )

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame, one row a (text, seed), with the target ids."""
        return self._table().to_pandas()

    def save(
        self,
        folder: str | Path,
        overwrite: bool = False,
        columns: Mapping[str, Sequence | pa.Array] | None = None,
    ) -> None:
        """Write `proto_tokens.safetensors` and `fits.parquet` into a folder.

        Both are written whole and flushed to the disk before the first of them gets its name, the
        measurements last: a folder with `fits.parquet` is a whole fit. Nothing else in the folder
        is touched.

        Args:
            folder: to write to; it is made where it is missing.
            overwrite: replace an earlier fit even if that one has more texts.
            columns: more columns for `fits.parquet`, a value a (text, seed); `load` leaves them.

        Raises:
            ValueError: the folder is a file, holds something else than a fit, or a larger fit.
            OSError: the files cannot be written, as on a full disk.
        """
        folder = Path(folder)
        require_writable(folder)
        if not overwrite and (folder / _FITS).exists():
            texts = FitResult.load(folder).tokens.texts
            if texts > self.tokens.texts:
                raise ValueError(
                    f"folder: {folder} holds a fit of {texts} texts, and this one has "
                    f"{self.tokens.texts}; pass overwrite=True to replace it"
                )
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with whole(folder / _FITS) as fits, whole(folder / _TOKENS) as tokens:
                self.tokens.save(tokens)
                table = self._table(_sha256_of(tokens), columns)
                pq.write_table(table, for_arrow(fits), write_page_checksum=True)
                flush(fits)
            remove_orphans(folder)
        except BaseException:
            # An interrupt may come when both have their names: then it is a whole fit.
            if is_new and not (folder / _FITS).exists():
                (folder / _TOKENS).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise

    @classmethod
    @own_world
    def load(cls, folder: str | Path) -> FitResult:
        """Read what `save` wrote.

        Raises:
            ValueError: the folder does not hold a whole fit, or its two files do not go together.
        """
        folder = Path(folder)
        if not (folder / _FITS).is_file():
            unfinished = (folder / "unfinished" / "fit.json").is_file()
            why = "it is unfinished; `prototok fit --resume` goes on" if unfinished else (
                f"{_FITS} is missing"
            )  # fmt: skip
            if (folder / "00000000" / _FITS).is_file():
                why = f"it is a folder of shards; {folder / '00000000'} is the first of them"
            raise ValueError(f"folder: {folder} holds no fit ({why})")
        tokens = ProtoTokens.load(folder / _TOKENS)
        table = _read_table(folder / _FITS, tokens)
        try:
            recorded = parse_json((table.schema.metadata or {}).get(_SHA256, b"null"))
        except ValueError as error:
            raise ValueError(f"folder: {folder / _FITS} could not be read ({error})") from None
        if recorded is not None and recorded != _sha256_of(folder / _TOKENS):
            raise ValueError(
                f"folder: {folder} holds the vectors of one fit and the measurements of another; "
                "a save was cut short, or one of the files was replaced"
            )
        shape = (tokens.texts, tokens.seeds)
        measured = {
            name: torch.tensor(table[name].to_pylist(), dtype=dtype, device="cpu").view(shape)
            for name, dtype in _DTYPES.items()
        }
        rows = table["targets"].to_pylist()[:: tokens.seeds]
        targets = [torch.tensor(ids, dtype=torch.int64, device="cpu") for ids in rows]
        for ids, length in zip(targets, tokens.lengths.tolist(), strict=True):
            if len(ids) != length or not _are_tokens(ids, tokens.model.vocab_size):
                raise ValueError(f"folder: {folder} has targets that are not those of its vectors")
        if _SEEDS not in (table.schema.metadata or {}):
            measured["seed"] = seeds_of(tokens.provenance, tokens.seeds).expand(shape).clone()
        return cls(tokens=tokens, targets=targets, history=None, **measured)

    def _table(
        self, sha256: str | None = None, more: Mapping[str, Sequence | pa.Array] | None = None
    ) -> pa.Table:
        texts, seeds = self.accuracy.shape
        columns: dict[str, Sequence | pa.Array] = {
            "text": [t for t in range(texts) for _ in range(seeds)],
            "seed": self.seed.flatten().tolist(),
            "length": self.tokens.lengths.repeat_interleave(seeds).tolist(),
        }
        columns |= {name: getattr(self, name).flatten().tolist() for name in _MEASURED}
        columns["targets"] = [self.targets[t].tolist() for t in range(texts) for _ in range(seeds)]
        columns |= more or {}
        metadata = {b"prototok": json.dumps(self.tokens.provenance), _SEEDS: b"as given"}
        if sha256 is not None:
            metadata[_SHA256] = json.dumps(sha256)
        return pa.table(columns).replace_schema_metadata(metadata)


_DTYPES = dict.fromkeys(_MEASURED, torch.float32) | {
    "exact": torch.bool,
    "correct": torch.int64,
    "steps": torch.int64,
    "seed": torch.int64,
}


def join(parts: Sequence[FitResult]) -> FitResult:
    """Put fits of different texts, made alike and sharing nothing, one behind another."""
    first = parts[0].tokens
    for part in parts:
        tokens = part.tokens
        alike = all(
            getattr(tokens, name) == getattr(first, name)
            for name in ("arrangement", "model", "seeds", "share")
        )
        alike &= (tokens.prefix and tokens.prefix.key) == (first.prefix and first.prefix.key)
        if not alike or tokens.share is not None:
            raise ValueError("parts: these fits were not made alike, or share a vector")
    ms = [part.tokens.m for part in parts if part.tokens.m is not None]
    tokens = replace(
        first,
        e=torch.cat([part.tokens.e for part in parts]),
        m=torch.cat(ms) if ms else None,
        lengths=torch.cat([part.tokens.lengths for part in parts]),
    )
    return FitResult(
        tokens=tokens,
        targets=[ids for part in parts for ids in part.targets],
        history=None,
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in _MEASURED},
    )


def require_writable(folder: Path) -> None:
    """Raise ValueError unless a FitResult may be written there: nothing else is in the way."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: {folder} is a file")
    if not folder.exists():
        return
    # What an earlier fit left that was killed before it had kept anything, or between its files.
    temporary = [path.name for path in folder.iterdir() if is_temporary(path)]
    others = [path for path in folder.iterdir() if path.name not in temporary]
    if all(path.name == "unfinished" and is_left_over(path) for path in others):
        return
    cut_short = any(name.startswith(f".{_FITS}~") for name in temporary)
    signs = (_FITS, "unfinished/fit.json", *([_TOKENS] if cut_short else []))
    if not any((folder / name).exists() for name in signs):
        raise ValueError(f"folder: {folder} exists and holds something else than a fit")
    for name, ours in ((_FITS, _is_ours), (_TOKENS, is_tensor_file)):
        path = folder / name
        if (path.exists() or path.is_symlink()) and not ours(path):
            raise ValueError(f"folder: {path} was not written by prototok and is left as it is")


def _is_ours(path: Path) -> bool:
    try:
        return b"prototok" in (pq.read_schema(for_arrow(path)).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def _read_table(path: Path, tokens: ProtoTokens) -> pa.Table:
    """Read the rows of the fits, their number and sizes checked against the vectors."""
    try:
        with pq.ParquetFile(for_arrow(path), page_checksum_verification=True) as file:
            rows = file.metadata.num_rows
            if rows != len(tokens):
                raise ValueError(f"folder: {path.parent} has {rows} fits, {len(tokens)} vectors")
            schema = file.schema_arrow
            for name, kind in _COLUMNS.items():
                if name not in schema.names or not kind(schema.field(name).type):
                    raise ValueError(f"folder: {path} has no {name} as a fit has it")
            values = sum(
                file.metadata.row_group(g).column(c).num_values
                for g in range(file.metadata.num_row_groups)
                for c in range(file.metadata.num_columns)
                if file.metadata.row_group(g).column(c).path_in_schema.startswith("targets.")
            )
            if values > int(tokens.lengths.sum()) * tokens.seeds:
                raise ValueError(f"folder: {path} has more targets than there are tokens")
            table = file.read(columns=list(_COLUMNS))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"folder: {path} could not be read ({error})") from error
    if any(table[name].null_count for name in _COLUMNS):
        raise ValueError(f"folder: {path} lacks values")
    return table


def _are_tokens(ids: Tensor, vocabulary: int) -> bool:
    return bool(((ids >= 0) & (ids < vocabulary)).all())


def _sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_ids(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)


_COLUMNS: dict[str, Callable[[pa.DataType], bool]] = {
    **dict.fromkeys(_MEASURED, pa.types.is_floating),
    "exact": pa.types.is_boolean, "correct": pa.types.is_integer, "steps": pa.types.is_integer,
    "seed": pa.types.is_integer,
    "targets": _is_ids,
}  # fmt: skip


class FitInterrupted(KeyboardInterrupt):
    """Ctrl-C during a fit; `result` holds the texts whose fits had ended, None where none had.

    It is a MemFit from `autoregressive.fit`. `texts` are their places in the list that was being
    fitted.
    """

    def __init__(self, result: FitResult | MemFit | None, texts: list[int]) -> None:
        super().__init__(f"interrupted with {len(texts)} texts fitted")
        self.result, self.texts = result, texts

    def __reduce__(self) -> tuple:  # an exception by itself is made again of its message
        return FitInterrupted, (self.result, self.texts)
