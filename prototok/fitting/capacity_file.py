"""The file of `prototok capacity`: a line a text, and what is kept while it is made.

    out.csv                        a line for each text, or for those that had ended by Ctrl-C
    out.csv.unfinished/fit.json    what is being measured
    out.csv.unfinished/00000012    how far text 12 has come, written after each of its fits

Nothing else is ever touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prototok.common.arguments import is_integer
from prototok.common.command_line import cannot_go_on, say
from prototok.common.files import try_file, write_text
from prototok.fitting.capacity import GRID, Capacity, CapacityInterrupted, Growth, capacity
from prototok.fitting.front import front_of
from prototok.fitting.recipe import Recipe
from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity
from prototok.results.tensor_file import (
    Origin,
    Shapes,
    is_tensor_file,
    read_tensors,
    require_model,
    write_tensors,
)
from prototok.results.unfinished import (
    Unfinished,
    digest_of,
    is_left_over,
    name_of,
    require_one_of,
)

_COLUMNS = "text,exact,at_099,ended,steps,seconds"
_FORM = ("prototok.growth", 1)
_PLAN_FORM = ("prototok.unfinished_capacity", 1)
_COUNTS = ("text", "stage", "failed", "exact", "at_099", "steps")


@dataclass(frozen=True)
class CapacityFile:
    """One measurement on its way to a file; `resume` and `overwrite` are what the user allowed."""

    path: Path
    resume: bool = False
    overwrite: bool = False

    @contextlib.contextmanager
    def claimed(self) -> Iterator[CapacityFile]:
        """Try the place, before the work; a block that raises before a fit leaves it as it was.

        Raises:
            ValueError: it cannot be written, another process is at it, or what is there may not be
                replaced.
        """
        require_one_of(self.resume, self.overwrite)
        try_file(self.path, "out", lambda head: head.startswith(_COLUMNS.encode()))
        kept = self._unfinished
        with kept.claimed(kept.folder, self._require_free, kept.parts):
            yield self

    def _require_free(self) -> None:
        """Raise ValueError where something is that may not be replaced."""
        kept, folder = self._unfinished, self._unfinished.folder
        if not kept.is_there() and not is_left_over(folder):
            raise ValueError(f"out: {folder} exists and holds something else than unfinished fits")
        if kept.is_there() and not (self.resume or self.overwrite):
            raise ValueError(
                f"out: {self.path} is unfinished; give --resume to go on or --overwrite to start "
                "again"
            )
        if self.path.exists() and not self.overwrite and not kept.is_there():
            kept.clear()  # where that was cut short
            raise ValueError(
                f"out: {self.path} holds an earlier measurement of {self._lines()} texts, and none "
                "is unfinished; give --overwrite to replace it"
            )

    def begin(self, lm: FrozenLM, plan: dict[str, Any]) -> list[Growth]:
        """Return how far the texts have come; from here on the folder is of this measurement.

        Args:
            lm: the model behind its prefix.
            plan: everything that the result depends on, from `plan_of`.

        Raises:
            ValueError: what is to be resumed is another measurement, or is damaged.
        """
        if self.overwrite:
            self._unfinished.empty()  # the folder itself is claimed
        self._unfinished.begin(plan)
        return [_read(path, lm) for path in self._unfinished.parts()]

    def keep(self, growth: Growth, lm: FrozenLM) -> None:
        """Keep how far a text has come; when this returns it is on the disk."""
        counts = {name: getattr(growth, name) for name in (*_COUNTS, "seconds")}
        origin = Origin(lm.identity, {}, lm.prefix)
        path = self._unfinished.part(growth.text)
        write_tensors(path, _FORM, {"start": growth.start}, origin, **counts)

    def interrupt(self, text: str) -> None:
        """Write the lines of the texts that have ended; an earlier file with more of them stays."""
        lines = len(text.splitlines()) - 1
        if lines and (not self.path.exists() or self._lines() < lines):
            write_text(self.path, text)

    def finish(self, text: str) -> None:
        """Write the whole file, and clear what was kept on the way."""
        write_text(self.path, text)
        self._unfinished.clear()

    @property
    def _unfinished(self) -> Unfinished:
        folder = self.path.with_name(self.path.name + ".unfinished")
        return Unfinished(folder, self.path, _PLAN_FORM, _remove)

    def _lines(self) -> int:
        return len(self.path.read_bytes().splitlines()) - 1


def measure(
    lm: FrozenLM, texts: Sequence[Sequence[int]], recipe: Recipe, restarts: int,
    prefix: str | None, file: CapacityFile | None,
) -> tuple[str, int]:  # fmt: skip
    """Measure the capacity of texts, keep each fit as it ends, and tell what cannot be kept.

    Args:
        lm, recipe, restarts, prefix: as `capacity` takes them.
        texts: token ids.
        file: to write to, claimed; None keeps nothing.

    Returns:
        The table, of the texts that had ended where it was stopped, and the exit code for that.
    """
    behind, _ = front_of(lm, prefix, recipe)
    grown: list[Growth] = []
    if file is not None:
        plan = plan_of(behind, texts, GRID, restarts, json.dumps(dataclasses.asdict(recipe)))
        grown = file.begin(behind, plan)
    try:
        found = capacity(
            behind, texts, lengths=GRID, recipe=recipe, restarts=restarts, prefix=behind.prefix,
            progress=True, grown=grown,
            on_fit=None if file is None else lambda growth: file.keep(growth, behind),
        )  # fmt: skip
        whole = table(found, range(len(texts)))
        if file is not None:
            file.finish(whole)
        return whole, 0
    except CapacityInterrupted as stopped:
        ended = table(stopped.result, stopped.texts)
        if file is not None:
            file.interrupt(ended)
        kept = "nothing was kept" if file is None else "--resume goes on from there"
        say(f"interrupted; {len(stopped.texts)} of {len(texts)} texts have ended, and {kept}")
        return ended, 130
    except OSError as error:
        assert file is not None
        return "", cannot_go_on(file.path, error, "what was kept stays").exit_code


def table(found: Capacity, texts: Sequence[int]) -> str:
    """Return the lines of the file; `texts` are the places of the texts of `found`."""
    lines = [_COLUMNS]
    for row, text in enumerate(texts):
        lines.append(
            f"{text},{int(found.exact[row])},{int(found.at_099[row])},{int(found.ended[row])},"
            f"{int(found.steps[row])},{float(found.seconds[row]):.2f}"
        )
    return "\n".join(lines) + "\n"


def plan_of(
    lm: FrozenLM, targets: Sequence[Sequence[int]], lengths: Sequence[int], restarts: int,
    recipe: str,
) -> dict[str, Any]:  # fmt: skip
    """Describe a measurement by everything that its result depends on.

    `lm` is the model behind the prefix of the fits; `recipe` is their settings as JSON.
    """
    return {
        "texts": len(targets), "model": lm.identity.fingerprint,
        "dtype": str(lm.dtype).removeprefix("torch."), "lengths": list(lengths),
        "restarts": restarts, "recipe": recipe, "prefix": name_of(lm.prefix),
        "targets": digest_of(targets),
    }  # fmt: skip


def _read(path: Path, lm: FrozenLM) -> Growth:
    def check(header: dict, shapes: Shapes, model: ModelIdentity) -> None:
        for name in _COUNTS:
            if not is_integer(header[name]) or header[name] < 0:
                raise ValueError(f"it has {header[name]!r} as {name}")
        if header["text"] != int(path.name):
            raise ValueError(f"it is of text {header['text']}")
        if not isinstance(header["seconds"], int | float):
            raise ValueError(f"it has {header['seconds']!r} as seconds")
        if not set(shapes) <= {"start"} or any(kind != "F32" for kind, _ in shapes.values()):
            raise ValueError(f"it holds {sorted(shapes)}")

    header, tensors, origin = read_tensors(path, "how far a text has come", _FORM, check)
    require_model("resume", origin.model, lm)
    counts = {name: int(header[name]) for name in _COUNTS}
    return Growth(**counts, seconds=float(header["seconds"]), start=tensors.get("start"))


def _remove(part: Path) -> None:
    if part.is_file() and is_tensor_file(part):
        part.unlink()
