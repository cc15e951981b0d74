"""Robustness of solutions: to noise, to rounding, and to another way of decoding.

Letters: T texts, S seeds, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prototok.common.arguments import hint, is_number, require_seed
from prototok.common.shown import shapes
from prototok.decoding.decode import decode
from prototok.model.families.general import GeneralBody
from prototok.model.frozen_lm import FrozenLM
from prototok.results.arrangement import Arrangement
from prototok.results.fit_result import FitResult
from prototok.results.proto_tokens import ProtoTokens

# Formats with fewer than 16 bits are scaled vector by vector, its largest coordinate to the
# format's greatest number, as weights are when they are quantised.
FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int4")
NOISE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True, eq=False)
class Withstood:
    """A fit decoded under one condition.

    what      "noise", "rounding" or "decoding"; setting: which
    accuracy  (T, S) fp32, token accuracy
    exact     (T, S) bool
    """

    what: str
    setting: str
    accuracy: Tensor
    exact: Tensor

    __repr__ = shapes


def score(
    lm: FrozenLM, fit: FitResult, tokens: ProtoTokens | None = None, batch_size: int = 1
) -> Tensor:
    """Return (T, S) token accuracy of `tokens`, or of the fit's own, against the fit's targets."""
    tokens = tokens or fit.tokens
    rows = decode(lm, tokens, batch_size=batch_size)
    found = [
        float((ids[: len(target)] == target).double().mean())
        for ids, target in zip(
            rows, (t for t in fit.targets for _ in range(tokens.seeds)), strict=True
        )
    ]
    return torch.tensor(found, dtype=torch.float32, device="cpu").view(
        len(fit.targets), tokens.seeds
    )


def noisy(tokens: ProtoTokens, level: float, seed: int = 0, vectors: str = "e") -> ProtoTokens:
    """Add N(0, σ²) to every coordinate, σ = `level` × the root mean square of its vector.

    `vectors` is "e", "m" or "both", here and in `rounded`.
    """
    if not (is_number(level) and level >= 0):
        raise ValueError(f"level: {level!r} is negative or not a number")
    require_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    def shaken(x: Tensor) -> Tensor:
        size = x.square().mean(-1, keepdim=True).sqrt()
        return x + level * size * torch.randn(
            x.shape, generator=generator, dtype=torch.float32, device="cpu"
        )

    return _changed(tokens, shaken, vectors)


def rounded(tokens: ProtoTokens, format: str, vectors: str = "e") -> ProtoTokens:
    """Round every vector to a format of `FORMATS` and back to fp32."""
    if format not in FORMATS:
        raise ValueError(
            f"format: {format!r} is not one of {', '.join(FORMATS)}" + hint(format, FORMATS)
        )
    return _changed(tokens, lambda x: _round(x, format), vectors)


def perturbations(
    lm: FrozenLM,
    fit: FitResult,
    noise: Sequence[float] = NOISE,
    formats: Sequence[str] = FORMATS,
    vectors: str = "e",
    batch_size: int = 1,
) -> list[Withstood]:
    """Measure the accuracy of a fit under noise and rounding of its vectors."""
    found = [("unchanged", "fp32", fit.tokens)]
    found += [("noise", f"{level:g}", noisy(fit.tokens, level, 0, vectors)) for level in noise]
    found += [("rounding", name, rounded(fit.tokens, name, vectors)) for name in formats]
    return [
        _withstood(what, setting, score(lm, fit, tokens, batch_size))
        for what, setting, tokens in found
    ]


def decodings(
    lm: FrozenLM, fit: FitResult, batch_sizes: Sequence[int] = (1, 8, 64), longer: int = 1
) -> list[Withstood]:
    """Measure the accuracy of a fit under other dtypes, batch sizes, lengths and kernels.

    The same arithmetic throughout, rounded in another order: what changes between the conditions
    is which tokens with a margin near zero flip. `longer` positions more behind the text change
    nothing but the shapes, by causality; they are left out where the context has no room.
    """
    found = []
    for dtype in dict.fromkeys((lm.dtype, torch.float32, torch.bfloat16, torch.float16)):
        twin = lm.cast(dtype)
        name = str(dtype).removeprefix("torch.")
        sizes = batch_sizes if dtype == lm.dtype else batch_sizes[:1]
        found += [
            _withstood("decoding", f"{name}, batch {size}", score(twin, fit, batch_size=size))
            for size in sizes
        ]
    longest = int(fit.tokens.lengths.max()) + longer
    arrangement = Arrangement.parse(fit.tokens.arrangement)
    steady = arrangement.name not in ("e* m*",)  # its layout depends on the length
    context = lm.behind(fit.tokens.prefix).context
    if steady and (context is None or arrangement.input_length(longest) <= context):
        stretched = replace(fit.tokens, lengths=fit.tokens.lengths + longer)
        found.append(_withstood("decoding", f"{longer} position more", score(lm, fit, stretched)))
    if lm.body.family != "general":
        body = GeneralBody.from_model(lm.source, lm.device, lm.dtype)
        plain = replace(lm, body=body, _twins={}, _behind={})
        found.append(_withstood("decoding", "transformers' forward", score(plain, fit)))
    return found


def _withstood(what: str, setting: str, accuracy: Tensor) -> Withstood:
    return Withstood(what, setting, accuracy, accuracy == 1.0)


def _round(x: Tensor, format: str) -> Tensor:
    if format.startswith("int"):
        top = 2.0 ** (int(format[3:]) - 1) - 1
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / top
        return (x / scale).round() * scale
    dtype = getattr(torch, format)
    if dtype.itemsize > 1:
        return x.to(dtype).float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / torch.finfo(dtype).max
    return (x / scale).to(dtype).float() * scale


def _changed(tokens: ProtoTokens, change: Callable[[Tensor], Tensor], vectors: str) -> ProtoTokens:
    if vectors not in ("e", "m", "both"):
        raise ValueError(f"vectors: {vectors!r} is not 'e', 'm' or 'both'")
    if vectors == "m" and tokens.m is None:
        raise ValueError(f"vectors: 'm', and arrangement {tokens.arrangement!r} has none")
    e = change(tokens.e) if vectors in ("e", "both") else tokens.e
    m = change(tokens.m) if vectors in ("m", "both") and tokens.m is not None else tokens.m
    return replace(tokens, e=e, m=m)
