"""prototok: one-step text reconstruction from proto-tokens.

A frozen causal language model fed [e, m, m, …, m], two learned vectors, gives back a text of
hundreds of tokens in one forward pass. Nothing heavy is imported until a name below is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from prototok.common.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from prototok import autoregressive as autoregressive
    from prototok.decoding.decode import decode as decode
    from prototok.decoding.information import information as information
    from prototok.exporting.export import export as export
    from prototok.fitting.capacity import capacity as capacity
    from prototok.fitting.encode import encode as encode
    from prototok.fitting.fast_fit import fast_fit as fast_fit
    from prototok.fitting.learn_encoder import learn_encoder as learn_encoder
    from prototok.fitting.learn_optimizer import learn_optimizer as learn_optimizer
    from prototok.fitting.learn_shared import learn_shared as learn_shared
    from prototok.fitting.learned.encoder import Encoder as Encoder
    from prototok.fitting.learned.optimizer import LearnedOptimizer as LearnedOptimizer
    from prototok.fitting.prior import Prior as Prior
    from prototok.fitting.recipe import Recipe as Recipe
    from prototok.fitting.stream import fit_stream as fit_stream
    from prototok.geometry.paths import connect as connect
    from prototok.geometry.paths import interpolate as interpolate
    from prototok.model.frozen_lm import FrozenLM as FrozenLM
    from prototok.model.load import load as load
    from prototok.results.fit_result import FitInterrupted as FitInterrupted
    from prototok.results.fit_result import FitResult as FitResult
    from prototok.results.proto_tokens import ProtoTokens as ProtoTokens
    from prototok.results.shards import Shards as Shards

_HOME = {
    "autoregressive": "prototok.autoregressive",
    "Encoder": "prototok.fitting.learned.encoder",
    "FitInterrupted": "prototok.results.fit_result",
    "FitResult": "prototok.results.fit_result",
    "FrozenLM": "prototok.model.frozen_lm",
    "LearnedOptimizer": "prototok.fitting.learned.optimizer",
    "Prior": "prototok.fitting.prior",
    "ProtoTokens": "prototok.results.proto_tokens",
    "Recipe": "prototok.fitting.recipe",
    "Shards": "prototok.results.shards",
    "capacity": "prototok.fitting.capacity",
    "connect": "prototok.geometry.paths",
    "decode": "prototok.decoding.decode",
    "encode": "prototok.fitting.encode",
    "export": "prototok.exporting.export",
    "fast_fit": "prototok.fitting.fast_fit",
    "fit_stream": "prototok.fitting.stream",
    "information": "prototok.decoding.information",
    "interpolate": "prototok.geometry.paths",
    "learn_encoder": "prototok.fitting.learn_encoder",
    "learn_optimizer": "prototok.fitting.learn_optimizer",
    "learn_shared": "prototok.fitting.learn_shared",
    "load": "prototok.model.load",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'prototok' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    return module if _HOME[name] == f"prototok.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
