"""The folder of `prototok fit`: a fit that is kept text by text, so that an end loses none of them.

    F/unfinished/fit.json            what is being fitted
    F/unfinished/00000012/           text 12, a FitResult of its own; once whole it is the record
    F/proto_tokens.safetensors, F/fits.parquet    all texts, or those that had ended by Ctrl-C

Nothing else in F is ever touched.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prototok.common.files import remove_orphans
from prototok.common.json import parse_json
from prototok.model.frozen_lm import FrozenLM
from prototok.results.fit_result import FitResult, join, require_writable
from prototok.results.unfinished import (
    Unfinished,
    digest_of,
    name_of,
    remove_files,
    require_one_of,
    require_same,
)

_FORM = ("prototok.unfinished_fit", 1)


@dataclass(frozen=True)
class FitFolder:
    """One fit on its way to a folder; `resume` and `overwrite` are what the user allowed."""

    path: Path
    resume: bool = False
    overwrite: bool = False

    @contextlib.contextmanager
    def claimed(self) -> Iterator[FitFolder]:
        """Make the folder and try to write there, before the work.

        A block that raises before a text was kept leaves the folder as it was.

        Raises:
            ValueError: the folder cannot be written, or holds what may not be replaced.
        """
        require_one_of(self.resume, self.overwrite)
        if not self.path.is_dir():
            require_writable(self.path)
        with self._unfinished.claimed(self.path, self._require_free, self.done):
            remove_orphans(self.path)
            yield self

    def _require_free(self) -> None:
        """Raise ValueError where something is that may not be replaced."""
        require_writable(self.path)
        if self.resume or self.overwrite:
            return
        if self._unfinished.is_there():
            raise ValueError(
                f"out: {self.path} holds an unfinished fit of {len(self.done())} texts; give "
                "--resume to go on or --overwrite to start again"
            )
        earlier = self.earlier()
        if earlier is not None:
            raise ValueError(
                f"out: {self.path} holds an earlier fit of {earlier.tokens.texts} texts; give "
                "--overwrite to replace it"
            )

    def begin(self, plan: dict[str, Any], need: int) -> list[int]:
        """Return the texts that are done already; from here on the folder is of this fit.

        Args:
            plan: what is fitted, from `plan_of`.
            need: bytes that the fit will take on the disk, about.

        Raises:
            ValueError: the disk is too small, or what is to be resumed is another fit.
        """
        free = shutil.disk_usage(self.path).free
        if free < need:
            raise ValueError(
                f"out: {self.path} has room for {free / 1e6:.1f} MB, and this fit takes about "
                f"{need / 1e6:.1f} MB"
            )
        if self.overwrite:
            self._unfinished.clear()
        if self.resume and not self._unfinished.is_there():
            earlier = self.earlier()
            if earlier is not None:
                require_same(plan_of_result(earlier), plan, self.path)
                self._unfinished.clear()  # where that was cut short
                return list(range(plan["texts"]))
        self._unfinished.begin(plan)
        kept = self.done()
        for text in self._unfinished.parts():
            if int(text.name) in kept:
                remove_orphans(text)
            else:
                _remove(text)  # a process died between its two files
        return kept

    def commit(self, text: int, result: FitResult) -> None:
        """Keep a text that has ended; when this returns it is on the disk."""
        result.save(self._unfinished.part(text))

    def done(self) -> list[int]:
        """Return the texts that are kept, in their order."""
        if not self._unfinished.is_there():
            return []
        found = self._unfinished.parts()
        return [int(path.name) for path in found if (path / "fits.parquet").is_file()]

    def finish(self, whole: FitResult | None = None) -> FitResult:
        """Write the whole fit, clear what was kept on the way, and return it.

        Args:
            whole: the result where no text was kept on its own, as with a shared vector.
        """
        if whole is None and not self._unfinished.is_there():
            earlier = self.earlier()  # resumed, and it was whole already
            assert earlier is not None
            return earlier
        result = whole if whole is not None else self._joined(self.done())
        result.save(self.path, overwrite=True)
        self._unfinished.clear()
        return result

    def interrupt(self) -> int:
        """Write the texts that are kept as a fit that can be decoded; return how many these are.

        An earlier fit of more texts stays in its place. What was kept stays, too, to be resumed.
        """
        done = self.done()
        earlier = self._readable()
        if done and (earlier is None or earlier.tokens.texts < len(done)):
            self._joined(done).save(self.path, overwrite=True)
        return len(done)

    def earlier(self) -> FitResult | None:
        """Return the fit that the folder holds, unfinished texts aside."""
        return FitResult.load(self.path) if (self.path / "fits.parquet").is_file() else None

    def _readable(self) -> FitResult | None:
        """The fit that the folder holds; None where a save was cut short."""
        try:
            return self.earlier()
        except ValueError:
            return None

    @property
    def _unfinished(self) -> Unfinished:
        return _unfinished_of(self.path)

    def _joined(self, texts: Sequence[int]) -> FitResult:
        return join([FitResult.load(self._unfinished.part(text)) for text in texts])


def _unfinished_of(path: Path) -> Unfinished:
    return Unfinished(path / "unfinished", path, _FORM, _remove)


def missing_of(path: Path, fit: FitResult) -> int:
    """Return how many texts the fit that `path` holds still lacks, since it was interrupted."""
    unfinished = _unfinished_of(path)
    planned = unfinished.plan().get("texts") if unfinished.is_there() else None
    return max(0, planned - fit.tokens.texts) if isinstance(planned, int) else 0


def _remove(text: Path) -> None:
    remove_files(text, ("fits.parquet", "proto_tokens.safetensors"))


def plan_of(
    lm: FrozenLM, targets: Sequence[Sequence[int]], arrangement: str, share: str | None,
    seeds: Sequence[int], recipe: str,
) -> dict[str, Any]:  # fmt: skip
    """Describe a fit by everything that its result depends on.

    `lm` is the model behind the prefix of the fit; `recipe` is its settings as JSON.
    """
    return _plan(
        texts=len(targets), targets=targets, model=lm.identity.fingerprint,
        dtype=str(lm.dtype).removeprefix("torch."), arrangement=arrangement, share=share,
        seeds=list(seeds), recipe=recipe, prefix=name_of(lm.prefix),
    )  # fmt: skip


def plan_of_result(result: FitResult) -> dict[str, Any]:
    """Describe the fit that a result came from, as `plan_of` does."""
    tokens = result.tokens
    return _plan(
        texts=tokens.texts, targets=[ids.tolist() for ids in result.targets],
        model=tokens.model.fingerprint, dtype=tokens.provenance.get("dtype"),
        arrangement=tokens.arrangement, share=tokens.share,
        seeds=parse_json(tokens.provenance.get("seeds", "null")),
        recipe=tokens.provenance.get("recipe"), prefix=name_of(tokens.prefix),
    )  # fmt: skip


def _plan(targets: Sequence[Sequence[int]], **rest: Any) -> dict[str, Any]:
    return {**rest, "targets": digest_of(targets)}
