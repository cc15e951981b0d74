"""Work on its way: what is being done, and each part of it that has ended, so that none is lost.

A folder of it holds

    FOLDER/fit.json       what is being done; without it the parts count for nothing
    FOLDER/00000012       part 12, a file or a folder; once it is there it is whole
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prototok.common.files import is_temporary, remove_orphans, try_folder, write_text
from prototok.common.json import parse_json
from prototok.model.prefix import Prefix

_PART = re.compile(r"\d{8}")
_PLAN = "fit.json"


@dataclass(frozen=True)
class Unfinished:
    """A folder of parts; `place` is where the whole will be, for messages.

    Attributes:
        folder: of the plan and the parts.
        place: what the user calls it by.
        form: name and version of the plan's format.
        remove: removes one part, and nothing that somebody else put there.
    """

    folder: Path
    place: Path
    form: tuple[str, int]
    remove: Callable[[Path], None]

    @contextlib.contextmanager
    def claimed(
        self, folder: Path, check: Callable[[], None], kept: Callable[[], Sequence[object]]
    ) -> Iterator[None]:
        """Keep every other process out of `folder`, and try to write there, before the work.

        A block that raises while nothing is `kept` clears what was begun.

        Raises:
            ValueError: of `check`, or the folder cannot be written or is taken.
        """
        with try_folder(folder, "out", alone=True, check=check):
            try:
                yield
            except BaseException:
                if not kept():
                    self.clear()
                raise

    def is_there(self) -> bool:
        """Return True if something was begun here and has not been cleared."""
        return self._plan_file.is_file()

    def plan(self) -> dict[str, Any]:
        """Return what is being done; ValueError where its file is damaged or of another kind."""
        try:
            found = parse_json(self._plan_file.read_bytes())
        except ValueError as error:
            raise ValueError(f"out: {self._plan_file} is damaged ({error})") from None
        if not isinstance(found, dict) or (found.get("format"), found.get("version")) != self.form:
            raise ValueError(f"out: {self._plan_file} is not of an unfinished fit of this prototok")
        return found

    def begin(self, plan: dict[str, Any]) -> None:
        """Go on with what is there, or begin anew where nothing is.

        Raises:
            ValueError: what is there is not what `plan` describes, or is damaged.
        """
        if self.is_there():
            require_same(self.plan(), plan, self.place)
        else:
            self.empty()  # of what was left when that was cut short
            self.folder.mkdir(exist_ok=True)
            whole = {"format": self.form[0], "version": self.form[1], **plan}
            write_text(self._plan_file, json.dumps(whole, indent=1) + "\n")
        remove_orphans(self.folder)

    def part(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def parts(self) -> list[Path]:
        """Return the parts that are there, in their order."""
        if not self.folder.is_dir() or self.folder.is_symlink():
            return []
        found = (p for p in self.folder.iterdir() if _PART.fullmatch(p.name))
        return sorted(path for path in found if not path.is_symlink())

    def empty(self) -> None:
        """Remove the plan and the parts, the plan first: without it they count for nothing."""
        if self.is_there():
            self.plan()
            self._plan_file.unlink()
        for path in self.parts():
            self.remove(path)
        if self.folder.is_dir():
            remove_orphans(self.folder)

    def clear(self) -> None:
        """Remove the plan, the parts, and the folder unless somebody else put something there."""
        self.empty()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    @property
    def _plan_file(self) -> Path:
        return self.folder / _PLAN


def remove_files(part: Path, names: Sequence[str]) -> None:
    """Remove a part that is a folder file by file, as a user may have put others there."""
    if not part.is_dir():
        return
    remove_orphans(part)
    for name in names:
        (part / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        part.rmdir()


def require_one_of(resume: bool, overwrite: bool) -> None:
    """Raise ValueError where both were asked for."""
    if resume and overwrite:
        raise ValueError("resume: give --resume to go on or --overwrite to start again")


def is_left_over(folder: Path) -> bool:
    """Return True if a folder holds only what an `Unfinished` that was cut short may have left."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    return all(_PART.fullmatch(path.name) or is_temporary(path) for path in folder.iterdir())


def require_same(stored: dict[str, Any], plan: dict[str, Any], place: Path) -> None:
    """Raise ValueError unless `stored` has all that `plan` has."""
    other = [name for name in plan if stored.get(name) != plan[name]]
    if other:
        raise ValueError(
            f"resume: {place} holds a fit of other {', '.join(other)}; give --overwrite to start "
            "again"
        )


def digest_of(targets: Sequence[Sequence[int]]) -> str:
    """Hash the token ids of texts."""
    return hashlib.sha256(json.dumps([list(ids) for ids in targets]).encode()).hexdigest()


def name_of(prefix: Prefix | None) -> str | None:
    """Return what tells one prefix from another in a plan."""
    return None if prefix is None else hashlib.sha256(prefix.key).hexdigest()
