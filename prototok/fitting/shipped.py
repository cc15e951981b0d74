"""What comes in the package with a built-in model: its prior and its networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

from prototok.model.frozen_lm import FrozenLM
from prototok.model.load import BUILT_IN, path_of
from prototok.results.hub import OnHub

K = TypeVar("K", bound=OnHub)


def shipped(kind: type[K], lm: FrozenLM) -> K | None:
    """Return the one of its kind for the model that `lm` holds; None where there is none."""
    return cast(K | None, _read(kind._file, kind.load, lm.identity.name))


@cache  # some megabytes, and as long to read as to make three updates of a small model
def _read(file: str, load: Callable[[Path], OnHub], model: str) -> OnHub | None:
    path = Path(path_of(model)) / file if model in BUILT_IN else None
    return None if path is None or not path.exists() else load(path)
