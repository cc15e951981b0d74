"""prototok: one-step text reconstruction from proto-tokens.

A frozen causal language model fed [e, m, m, …, m], two learned vectors, gives back a text of
hundreds of tokens in one forward pass. Nothing heavy is imported until a name below is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prototok import autoregressive as autoregressive
    from prototok.capacity import capacity as capacity
    from prototok.decode import decode as decode
    from prototok.engine.recipe import Recipe as Recipe
    from prototok.fast_fit import fast_fit as fast_fit
    from prototok.fit_result import FitInterrupted as FitInterrupted
    from prototok.fit_result import FitResult as FitResult
    from prototok.frozen_lm import FrozenLM as FrozenLM
    from prototok.frozen_lm import load as load
    from prototok.geometry.paths import connect as connect
    from prototok.geometry.paths import interpolate as interpolate
    from prototok.learn_shared import learn_shared as learn_shared
    from prototok.metrics import information as information
    from prototok.prior import Prior as Prior
    from prototok.proto_tokens import ProtoTokens as ProtoTokens

_HOME = {
    "FitInterrupted": "prototok.fit_result",
    "FitResult": "prototok.fit_result",
    "FrozenLM": "prototok.frozen_lm",
    "Prior": "prototok.prior",
    "ProtoTokens": "prototok.proto_tokens",
    "Recipe": "prototok.engine.recipe",
    "autoregressive": "prototok.autoregressive",
    "capacity": "prototok.capacity",
    "connect": "prototok.geometry.paths",
    "decode": "prototok.decode",
    "fast_fit": "prototok.fast_fit",
    "information": "prototok.metrics",
    "learn_shared": "prototok.learn_shared",
    "interpolate": "prototok.geometry.paths",
    "load": "prototok.frozen_lm",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'prototok' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    # `decode` and `fast_fit` are modules of that name which can be called, so that
    # `import prototok.fast_fit` and `from prototok import fast_fit` give the same thing.
    return module if _HOME[name] == f"prototok.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
