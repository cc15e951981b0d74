"""`fit_stream`: fit any number of texts, a shard at a time, and keep each shard as it ends.

A shard is fitted on its own, by `fast_fit`: so its result depends on its texts alone, bit for bit,
and a fit that was killed and goes on gives the files of one that nobody disturbed. Slots that took
the next shard's texts while a shard's last rows are under way would be fuller, but a row's last
bits depend on the rows it is computed with (docs/scaling.md has what either costs).

Letters: T texts of a shard that can be fitted, N targets of a text.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from prototok.common.arguments import batch_size_of, hint, is_count, seed_list
from prototok.common.memory import resident
from prototok.common.progress import Progress
from prototok.decoding.decode import require_length
from prototok.fitting.engine.run import FitEvent
from prototok.fitting.fast_fit import fast_fit, start_of
from prototok.fitting.front import front_of
from prototok.fitting.recipe import recipe_of
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.results.arrangement import Arrangement
from prototok.results.fit_result import FitResult
from prototok.results.provenance import arithmetic, as_json
from prototok.results.shards import ShardFolder, ShardRecord, StreamSummary
from prototok.results.unfinished import digest_of, name_of
from prototok.texts.rows import Unreadable
from prototok.texts.targets import target_of, text_id

# Of `fast_fit`; the others are of texts that share a vector, or of one call.
OPTIONS = (
    "seeds", "arrangement", "prefix", "recipe", "max_steps", "init", "backend", "batch_size",
)  # fmt: skip
SHARD = 4096


def fit_stream(
    lm: FrozenLM,
    texts: Iterable[Any],
    folder: str | Path,
    *,
    length: int | None = None,
    shard: int = SHARD,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    **options: Any,
) -> StreamSummary:
    """Fit texts as they come, a million or without end, and keep them in shards on the disk.

    One shard is in memory at a time. A text that cannot be fitted (empty, too short, too long, not
    a text) is recorded with why, and one whose fit fails is among the records; neither stops the
    others. `prototok.Shards(folder)` reads what was written; so does, for the records,
    `datasets.load_dataset("parquet", data_files="FOLDER/*/fits.parquet")`.

    Args:
        lm: the frozen model, from `prototok.load`.
        texts: an iterator of strings or token ids. To go on it has to give the same texts again
            from the first on; those that are done are tokenised and passed over.
        folder: for the shards; it is made where it is missing.
        length: cut every text to this many tokens; one that has fewer is refused.
        shard: texts a shard. A kill loses the work on one, and where a shard ends slots run empty:
            some thirty times the rows that are fitted at once is a good size.
        resume: go on with what the folder holds; nothing is there at first.
        overwrite: remove the shards that the folder holds.
        progress: None shows a bar on a terminal; True also prints lines elsewhere; False is quiet.
        options: seeds, arrangement, prefix, recipe, max_steps, init, backend and batch_size, of
            `fast_fit`.

    Raises:
        ValueError: an argument that cannot be met, a folder that holds something else, another
            process in it, or on going on other settings or texts.
        OSError: the folder cannot be written any more, as on a full disk. The shards that are in it
            stay, and `resume` goes on from there, as after Ctrl-C and whatever `texts` raises.
    """
    _require(lm, texts, length, shard, options)
    length, shard = None if length is None else int(length), int(shard)  # numpy's integers too
    place = ShardFolder(Path(folder), resume, overwrite)
    with place.claimed():
        return fit_to_shards(lm, texts, place, length, shard, progress, options)


def _require(
    lm: FrozenLM, texts: Iterable[Any], length: int | None, shard: int, options: dict[str, Any]
) -> None:
    """Raise ValueError for arguments that can be told before the first text."""
    require_frozen(lm)
    if isinstance(texts, str | bytes | dict) or not isinstance(texts, Iterable):
        raise ValueError(f"texts: {type(texts).__name__} is not an iterator of texts")
    if hasattr(texts, "columns"):  # it would give their names
        raise ValueError(f"texts: {type(texts).__name__} is a table; give one of its columns")
    for name, value in (("length", length), ("shard", shard)):
        if not (is_count(value) or (name == "length" and value is None)):
            raise ValueError(f"{name}: {value!r} is not a positive integer")
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"{name}: fit_stream has no such option" + hint(name, OPTIONS))
    start = start_of(options.get("init"))
    if start is not None:
        start.require_model(lm)
    batch_size_of(options.get("batch_size", "auto"))
    lm.plan(1, 1, options.get("backend", "auto"))  # refuses a backend that cannot be had


def fit_to_shards(
    lm: FrozenLM, texts: Iterable[Any], place: ShardFolder, length: int | None, shard: int,
    progress: bool | None, options: dict[str, Any],
) -> StreamSummary:  # fmt: skip
    """Fit texts into a folder that is claimed; see `fit_stream`."""
    recipe = recipe_of(options.get("recipe", "fast"), options.get("max_steps"))
    layout = Arrangement.parse(options.get("arrangement", "e m*"))
    init = options.get("init")
    behind, _ = front_of(lm, options.get("prefix", "auto"), recipe, start_of(init))
    place.begin(
        {
            "model": lm.identity.fingerprint, "dtype": arithmetic(lm)["dtype"],
            "arrangement": layout.name, "seeds": seed_list(options.get("seeds", 1)),
            "recipe": as_json(recipe), "init": _digest_of(init), "prefix": name_of(behind.prefix),
            "length": length, "shard": shard,
        }
    )  # fmt: skip
    prefix = behind.prefix
    front = list(prefix.ids) if prefix is not None and prefix.ids is not None else None
    total = len(texts) if isinstance(texts, Sized) else None
    under_way = _UnderWay()
    with Progress(total, "fit", progress) as bar:
        for number, lot in enumerate(_lots(behind, texts, layout, length, shard)):
            if not place.require_same(number, lot.size, lot.digest):
                result = None
                if lot.targets:
                    result = fast_fit(
                        lm, list(lot.targets.values()), progress=False, **options,
                        callback=lambda event: bar.update(under_way.texts, under_way.see(event)),
                    )  # fmt: skip
                place.commit(number, *_kept(lot, result, front))
                under_way.end(result)
            under_way.texts += lot.size
            bar.update(under_way.texts, under_way.note)
    return place.finish()


@dataclass(frozen=True)
class _Lot:
    """The texts of a shard, by their numbers from `first` on: the targets (N,) of those that can be
    fitted, and why the others cannot."""

    first: int
    targets: dict[int, Tensor]
    refused: dict[int, str]

    @property
    def size(self) -> int:
        return len(self.targets) + len(self.refused)

    @cached_property
    def digest(self) -> str:
        """Hash the token ids of the texts; none for one that is refused."""
        numbers = range(self.first, self.first + self.size)
        return digest_of([self.targets[n].tolist() if n in self.targets else [] for n in numbers])


def _lots(
    lm: FrozenLM, texts: Iterable[Any], arrangement: Arrangement, length: int | None, shard: int
) -> Iterator[_Lot]:
    """Tokenise texts, `shard` of them at a time."""
    source = iter(texts)
    for first in itertools.count(0, shard):
        targets: dict[int, Tensor] = {}
        refused: dict[int, str] = {}
        for number, text in enumerate(itertools.islice(source, shard), start=first):
            try:
                targets[number] = _target(lm, number, text, arrangement, length)
            except ValueError as error:
                refused[number] = str(error)
        if not targets and not refused:
            return
        yield _Lot(first, targets, refused)


def _target(
    lm: FrozenLM, number: int, text: Any, arrangement: Arrangement, length: int | None
) -> Tensor:
    """Return a text's targets (N,); ValueError where it cannot be fitted."""
    if isinstance(text, Unreadable):
        raise ValueError(f"texts: text {number} could not be read, {text.why}")
    text = text.as_py() if hasattr(text, "as_py") else text  # of an Arrow column
    ids = target_of(lm, number, text, length)
    try:
        require_length(len(ids), lm, arrangement)
    except ValueError as error:
        raise ValueError(f"texts: text {number} is too long; {error}") from None
    return ids


def _kept(
    lot: _Lot, result: FitResult | None, front: list[int] | None
) -> tuple[ShardRecord, FitResult | None, dict[str, pa.Array]]:
    """Return what is kept of a shard: its record, its fits, and columns that fits do not have."""
    record = ShardRecord(
        first=lot.first,
        texts=lot.size,
        exact=0 if result is None else int(result.exact.any(dim=1).sum()),
        failed=0 if result is None else int(result.failed.sum()),
        steps=0 if result is None else int(result.steps.sum()),
        input=lot.digest,
        refused=tuple(lot.refused.items()),
    )
    seeds = 1 if result is None else result.tokens.seeds
    names = [(number, text_id(ids.tolist())) for number, ids in lot.targets.items()]
    rows = [name for name in names for _ in range(seeds)]
    columns = {
        "number": pa.array([number for number, _ in rows], pa.int64()),
        "text_id": pa.array([identity for _, identity in rows], pa.string()),
        "prefix": pa.array([front] * len(rows), pa.list_(pa.int32())),
    }
    return record, result, columns


def _digest_of(init: Any) -> str | None:
    """Hash what fits start from, as its file would be."""
    if init is None:
        return None
    if isinstance(init, tuple | list):  # an encoder and an optimiser
        return "-".join(str(_digest_of(part)) for part in init)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "init.safetensors"
        init.save(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()


class _UnderWay:
    """How far the texts have come, in one line: what came back, the rate, the shard under way."""

    def __init__(self) -> None:
        self.texts = self.fitted = self.exact = 0
        self.started = time.monotonic()
        self.event: FitEvent | None = None

    def see(self, event: FitEvent) -> Any:
        """Take the last look at the device, and return what makes the line."""
        self.event = event
        return self.note

    def end(self, result: FitResult | None) -> None:
        """Take a shard that ended."""
        self.event = None
        if result is not None:
            self.fitted += result.tokens.texts
            self.exact += int(result.exact.any(dim=1).sum())

    def note(self) -> str:
        """Return the line."""
        said = [f"{self.exact} of {self.fitted} exact"] if self.fitted else []
        if self.fitted:
            rate = 3600 * self.fitted / (time.monotonic() - self.started)
            said.append(f"{rate:,.0f} texts/h")
        if self.event is not None:
            rows, steps = len(self.event.rows), int(self.event.steps.max())
            said.append(f"{rows} rows under way, step {steps}")
        return ", ".join([*said, f"{resident() / 1e9:.1f} GB"])
