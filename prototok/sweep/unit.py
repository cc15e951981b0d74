"""The smallest thing a sweep fits and records, and the key it is recorded under."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prototok.common.arguments import is_count, is_integer
from prototok.common.json import parse_json

MODES = ("one-forward", "autoregressive")


@dataclass(frozen=True)
class Unit:
    """A unit of work: the rows (texts[i], seeds[i]) that share a vector, or a single row.

    Attributes:
        mode: "one-forward" fits e and m, "autoregressive" fits `vectors` [mem] vectors.
        model: a hub id, folder or built-in name; `@revision` may follow, `random:` may stand in
            front (see `prototok.sweep.models`).
        source: name of the source the texts are from.
        texts: ids of the texts in the run's texts.parquet; the target is the first `length` tokens.
        seeds: of the initial vectors, one beside each text.
        length: N.
        share: None, "m" or "e": what all rows of this unit have in common.
        group_size: texts a sharing group, as the experiment asked for it; None for all of them.
        arrangement: of the one-forward mode (`prototok.results.arrangement`).
        vectors: K of the autoregressive mode.
        prefix: what stands in front, text, token ids or None; "auto" leaves it to the recipe.
        recipe: name of a recipe; `changes` are the `Recipe` fields that differ from it.
        dtype: of the frozen weights, "auto" to let the device decide.
        alone: fit this unit with nothing beside it in the batch (the paper's Table 4).
        timed: time the decoding of each exact row at batch 1 (the paper's Figure 3).
    """

    mode: str
    model: str
    source: str
    texts: tuple[str, ...]
    seeds: tuple[int, ...]
    length: int
    share: str | None = None
    group_size: int | None = None
    arrangement: str = "e m*"
    vectors: int = 1
    prefix: str | tuple[int, ...] | None = "auto"
    recipe: str = "paper"
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    alone: bool = False
    timed: bool = False

    @property
    def key(self) -> str:
        """Hash the specification to 24 hexadecimal digits, the same everywhere."""
        return hashlib.sha256(self.spec().encode()).hexdigest()[:24]

    def spec(self) -> str:
        """Write the specification as canonical JSON: sorted names, no spaces.

        A prefix that is left to the recipe is not named, so that keys are those from before there
        were any.
        """
        named = dataclasses.asdict(self)
        if self.prefix == "auto":
            del named["prefix"]
        return json.dumps(named, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def parse(cls, spec: str) -> Unit:
        """Read the unit that `spec` gave; ValueError where it can be none."""
        found = parse_json(spec)
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(found, dict) or not set(found) <= known:
            raise ValueError("a unit is not made of the fields of one")
        try:
            lists = {name: tuple(found[name]) for name in ("texts", "seeds")}
            if isinstance(found.get("prefix"), list):
                lists["prefix"] = tuple(found["prefix"])
            unit = cls(**found | lists)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a unit lacks something ({error})") from None
        for name, fits in _FIELDS.items():
            if not fits(getattr(unit, name)):
                raise ValueError(f"a unit has {reprlib.repr(getattr(unit, name))} as its {name}")
        if len(unit.texts) != len(unit.seeds):
            raise ValueError("a unit has texts and seeds of different number")
        return unit

    def group(self) -> tuple:
        """Return what units that can be fitted in one batch have in common; N may differ."""
        return (
            self.model, self.dtype, self.mode, self.arrangement, self.vectors, self.prefix,
            self.recipe, json.dumps(self.changes, sort_keys=True), self.share, self.alone,
            self.timed,
        )  # fmt: skip

    @property
    def positions(self) -> int:
        """Return rows × N: what one step of this unit computes."""
        return len(self.texts) * self.length


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_truth(value: object) -> bool:
    return isinstance(value, bool)


def _are_ids(value: object) -> bool:
    return isinstance(value, tuple) and all(map(is_integer, value))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "mode": MODES.__contains__, "model": _is_text, "source": _is_text,
    "texts": lambda v: len(v) > 0 and all(map(_is_text, v)),
    "seeds": lambda v: all(map(is_integer, v)),
    "length": is_count, "share": (None, "m", "e").__contains__,
    "group_size": lambda v: v is None or is_count(v), "arrangement": _is_text, "vectors": is_count,
    "prefix": lambda v: v is None or _is_text(v) or _are_ids(v), "recipe": _is_text,
    "changes": lambda v: isinstance(v, dict), "dtype": _is_text, "alone": _is_truth,
    "timed": _is_truth,
}  # fmt: skip
