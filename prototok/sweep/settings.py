"""Settings of an experiment, and the checks on them."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from prototok.common.arguments import hint, is_count, is_integer, is_unicode, nearest
from prototok.fitting.recipe import Recipe, recipe_of
from prototok.model.load import dtype_of
from prototok.results.arrangement import Arrangement
from prototok.texts.sources import Source

_MOST_BYTES = 1 << 20  # of a file of settings


@dataclass(frozen=True)
class Settings:
    """Settings of one experiment; a YAML file may override any of them.

    Attributes:
        models: as `prototok.sweep.models` names them.
        sources: of the texts.
        texts: a source.
        lengths: the N.
        seeds: initialisations, 0 … seeds − 1; in figures 4 and 5 those of the last continuation.
        arrangements: of the one-forward fits.
        share: which vector is shared; None fits each row alone.
        group_sizes: texts that share; None is all texts of a (model, source, N).
        seeds_share: the seeds of a text share the vector, too; else they are fits of their own.
        vectors: K of the autoregressive fits beside them; none where it is empty.
        prefix: what stands in front, text, token ids or None; "auto" leaves it to the recipe.
        contexts, continuations: of figures 4 and 5, where each context is continued so many times.
        recipe: its name; `changes` are fields of `Recipe` that differ from it.
        dtype: of the frozen weights.
        alone: fit every text on its own.
        timed: time the decoding.
        text_seed: draws chunks, words and continuations.
    """

    models: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    texts: int = 50
    lengths: tuple[int, ...] = (64,)
    seeds: int = 1
    arrangements: tuple[str, ...] = ("e m*",)
    share: tuple[str | None, ...] = (None,)
    group_sizes: tuple[int | None, ...] = (None,)
    seeds_share: bool = False
    vectors: tuple[int, ...] = ()
    prefix: str | tuple[int, ...] | None = "auto"
    contexts: int = 0
    continuations: int = 0
    recipe: str = "paper"
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    alone: bool = False
    timed: bool = False
    text_seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("model: none was given")
        if not self.sources:
            raise ValueError("source: none was given; such as PG-19=folder:BOOKS, see --help")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"source: two have one name, {names}; give NAME=KIND:PATH")
        for name in ("texts", "seeds"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name}: {shown(getattr(self, name))} is not a positive integer")
        for name in ("contexts", "continuations"):
            value = getattr(self, name)
            if value != 0 and not is_count(value):
                raise ValueError(f"{name}: {shown(value)} is not a positive integer")
        for name in ("lengths", "group_sizes", "vectors"):
            for value in getattr(self, name):
                if not is_count(value) and not (name == "group_sizes" and value is None):
                    raise ValueError(f"{name}: {shown(value)} is not a positive integer")
        for arrangement in self.arrangements:
            Arrangement.parse(arrangement)
        for share in self.share:
            if share not in (None, "m", "e"):
                raise ValueError(f"share: {shown(share)} is not none, m or e")
        of_sources = [text for source in self.sources for text in (source.name, source.path)]
        texts = {"prefix": [self.prefix], "model": self.models, "source": of_sources}
        for name, values in texts.items():
            for value in values:
                if isinstance(value, str) and not is_unicode(value):
                    raise ValueError(f"{name}: {value!r} is not valid Unicode")
        if isinstance(self.prefix, tuple) and not all(type(token) is int for token in self.prefix):
            raise ValueError(f"prefix: {shown(self.prefix)} is not text, token ids, none or auto")
        if self.recipe not in ("fast", "paper"):
            raise ValueError(
                f"recipe: {shown(self.recipe)} is not fast or paper"
                + hint(self.recipe, ("fast", "paper"))
            )
        dtype_of(self.dtype, torch.device("cpu"))
        if not is_integer(self.text_seed):
            raise ValueError(f"text_seed: {shown(self.text_seed)} is not a 64-bit integer")
        fields = [f.name for f in dataclasses.fields(Recipe)]
        require_known(self.changes, fields, "recipe")
        if recipe_of_unit(self.recipe, self.changes).learned:
            raise ValueError(f"recipe: {self.recipe!r} needs an optimiser, and a sweep takes none")

    def to_json(self) -> dict[str, Any]:
        """Return what run.json keeps."""
        return dataclasses.asdict(self)


def recipe_of_unit(name: str, changes: dict[str, Any]) -> Recipe:
    """Return the recipe of that name with the changes; ValueError where they cannot be."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    if "lr" in values:  # a rate that was asked for holds with a prior and at any width too
        values = {"prior_rate": None, "lr_width": None} | values
    return dataclasses.replace(recipe_of(name), **values)


def read_config(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Read a YAML file's settings, lists as tuples and sources parsed; every mistake is named."""
    try:
        if path.stat().st_size > _MOST_BYTES or not path.is_file():
            raise ValueError(f"config: {path} is no file of settings")
        found = yaml.safe_load(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ValueError(f"config: {path} could not be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {path} is not UTF-8 ({error.reason})") from None
    except RecursionError:
        raise ValueError(f"config: {path} is not YAML (nested too deeply)") from None
    except yaml.YAMLError as error:
        first = str(error).replace("\n", " ")
        raise ValueError(f"config: {path} is not YAML ({first})") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"config: {path} is not a mapping of settings")
    require_known(found, known, "config")
    return {key: _value(key, value) for key, value in found.items()}


def _value(key: str, value: Any) -> Any:
    """Return a setting as YAML gives it, in its type."""
    kind = str(next(f.type for f in dataclasses.fields(Settings) if f.name == key))
    if kind.startswith("tuple"):
        listed = value if isinstance(value, list) else [value]
        if key == "sources":
            return tuple(_source(v) for v in listed)
        listed = [None if v in ("none", "all") else v for v in listed]
        if key in ("models", "arrangements") and not all(isinstance(v, str) for v in listed):
            raise ValueError(f"{key}: {shown(value)} is not a list of names")
        return tuple(listed)
    if key == "prefix":
        if not isinstance(value, str | list):
            raise ValueError(f"prefix: {value!r} is not text, a list of token ids, none or auto")
        return tuple(value) if isinstance(value, list) else value
    if key == "changes":
        if not isinstance(value, dict):
            raise ValueError(f"changes: {shown(value)} is not a mapping of fields of a recipe")
        return value
    wanted = {"bool": bool, "int": int, "str": str}[kind]
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ValueError(
            f"{key}: {shown(value)} is not {'a truth value' if kind == 'bool' else kind}"
        )
    return value


def _source(value: Any) -> Source:
    if isinstance(value, str):
        return Source.parse(value)
    if not isinstance(value, dict) or "source" not in value:
        raise ValueError(
            f"sources: {shown(value)} is neither [NAME=]KIND[:PATH] nor a mapping with it as "
            "`source`"
        )
    options = ("source", "words", "column", "context_tokens")
    require_known(value, options, "sources")
    changes = {k: v for k, v in value.items() if k != "source"}
    if changes.get("words") is not None:
        words = changes["words"]
        if not isinstance(words, list) or [type(w) for w in words] != [int, int]:
            raise ValueError(f"words: {shown(words)} is not a list of two integers")
        changes["words"] = tuple(words)
    if not isinstance(value["source"], str):
        raise ValueError(f"sources: {shown(value['source'])} is not [NAME=]KIND[:PATH]")
    return dataclasses.replace(Source.parse(value["source"]), **changes)


def require_known(found: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError for a key that is not known, with the nearest one that is."""
    known = list(known)
    for key in found:
        if key not in known:
            near = nearest(key, known)
            meant = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {shown(key)}; {meant}")


def shown(value: object) -> str:
    """Show a value in a few characters: aliases in YAML make some that would fill the memory."""
    return reprlib.repr(value)
