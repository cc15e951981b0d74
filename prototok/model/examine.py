"""What a model must be before it is frozen: whole, causal, and equal to what computes it here.

Letters: N positions, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prototok.model.families import Body
from prototok.model.families.general import GeneralBody
from prototok.model.families.stock import first_line
from prototok_kernels.layers import decoder_layer
from prototok_kernels.residual_norm import residual_norm

_POSITIONS, _MOST = 16, 64
# Of the largest logit: far above rounding, far below what a missing bias or norm makes.
_SAME = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def require_plain_weights(model: PreTrainedModel, name: str) -> None:
    """ValueError unless every weight is there, finite, and in a dtype that computes."""
    if getattr(model, "is_quantized", False):
        raise ValueError(f"model: {name} is quantised; load the unquantised weights")
    for key, module in model.named_modules():
        if ".quantized." in type(module).__module__:
            raise ValueError(f"model: {name} is quantised, in {key}; load the unquantised weights")
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(
                f"model: {name} has max_norm = {module.max_norm} in {key}, which changes weights "
                "as they are read; set it to None"
            )
    for key, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"model: {name} has no weights yet, {key} is on the meta device")
        if parameter.dtype not in _SAME:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"model: {name} is quantised, {key} is {kind}; load the unquantised weights"
            )
        extremes = parameter.detach().aminmax() if parameter.numel() else ()
        if not all(bool(torch.isfinite(value)) for value in extremes):
            raise ValueError(f"model: {name} has weights that are not finite, in {key}")


@torch.no_grad()
def require_forward(
    source: PreTrainedModel, body: Body, family: ModuleType | None, name: str, context: int | None
) -> tuple[int, int]:
    """Run a few positions; return (d, V), the width of the vectors and of the vocabulary.

    A model that transformers runs is run as it is. One with a forward of its own is compared in
    fp32 with its source: no setting and no patch can make the two differ without a word.

    Raises:
        ValueError: it takes no vectors, is not causal, or its own forward gives something else.
    """
    # Some positions past a sliding window, or nothing would tell whether it is there.
    length = min(max(_POSITIONS, min(_window(source) + 4, _MOST)), context or _MOST)
    before = _switches(body)
    with torch.autocast(body_device(body).type, enabled=False):
        if isinstance(body, GeneralBody):
            inputs, logits = _run(body.model, length, name)
        else:
            with _in_float32(source):
                inputs, logits = _run(source, length, name)
        _require_causal(logits, name)
        if family is not None:
            _require_same(_own_logits(family, source, inputs[:1]), logits[:1], name)
    for (key, switch), value in _switches(body).items():
        if before.get((key, switch)) != value:
            raise ValueError(
                f"model: {name} sets {switch} of {key or 'itself'} to {value!r} as it runs, so "
                "what it computes depends on what it computed before"
            )
    return inputs.shape[-1], min(logits.shape[-1], len(_table(source)))


def _window(model: PreTrainedModel) -> int:
    """Return the sliding window that a config names, whether or not the model has it; 0: none."""
    found = getattr(model.config.get_text_config(), "sliding_window", None)
    return found if isinstance(found, int) else 0


def _switches(body: Body) -> dict[tuple[str, str], object]:
    """Return the attributes of a general body's modules that name a way to compute."""
    if not isinstance(body, GeneralBody):
        return {}
    return {
        (name, key): value
        for name, module in body.model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, str)
    }


def body_device(body: Body) -> torch.device:
    """Return where a body's weights are."""
    return body.model.device if isinstance(body, GeneralBody) else body.norm.device


def _table(model: PreTrainedModel) -> Tensor:
    module: Any = model.get_input_embeddings()
    return module.weight


def _run(model: PreTrainedModel, length: int, name: str) -> tuple[Tensor, Tensor]:
    """Vectors (2, N, d), the two rows alike in their first half, and their logits.

    They are near the embeddings of random ids, and are none: fitted vectors will be none either.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        table = _table(model)
        ids = torch.randint(len(table), (2, length), generator=generator, device="cpu")
        module: Any = model.get_input_embeddings()
        rows = module(ids.to(table.device))
        noise = torch.randn(rows.shape, generator=generator, dtype=torch.float32, device="cpu")
        inputs = rows + 0.1 * rows.std() * noise.to(rows)
        inputs[1, : (length + 1) // 2] = inputs[0, : (length + 1) // 2]
        made: Any = model(inputs_embeds=inputs.clone(), use_cache=False)
        logits = made.logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"model: {name} does not run on vectors in place of token ids ({first_line(error)})"
        ) from error
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(f"model: {name} gives no logits for each position, {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"model: {name} gives logits that are not finite")
    return inputs, logits


def _require_causal(logits: Tensor, name: str) -> None:
    """ValueError where the rows, alike in their first half, differ there."""
    half = logits[:, : (logits.shape[1] + 1) // 2].double()
    if float((half[0] - half[1]).abs().max()) > _SAME[logits.dtype] * float(half.abs().max()):
        raise ValueError(
            f"model: {name} is not causal, what stands at later positions changes earlier logits"
        )


def _require_same(ours: Tensor, theirs: Tensor, name: str) -> None:
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    # On CUDA torch may be set to multiply fp32 in TF32.
    if not error <= (1e-3 if theirs.device.type == "cpu" else 1e-2):
        raise ValueError(
            f"model: {name} computes something else in transformers than its weights say "
            f"(logits differ by {error:.2g} of the largest); its classes may be patched"
        )


def _own_logits(family: ModuleType, source: PreTrainedModel, x: Tensor) -> Tensor:
    """The family's logits in fp32 by torch, one block at a time, so that no copy of it is made."""
    ends = family.ends(source, x.device, torch.float32)
    cos, sin = ends.rotary(x.shape[1])
    eps = 0.0
    for layer in family.layers(source, x.device, torch.float32):
        x, eps = decoder_layer(x, layer, cos, sin, "torch"), layer.eps
    _, normed = residual_norm(x, None, ends.norm, ends.norm_bias, eps, "torch")
    return normed @ ends.head.T


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let each module see its weights in fp32 while it runs, and only then."""
    kept: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def widen(module: nn.Module, args: tuple) -> None:
        kept[module] = dict(module._parameters)
        for key, p in kept[module].items():
            if p is not None:
                module._parameters[key] = nn.Parameter(p.float(), requires_grad=False)

    def restore(module: nn.Module, args: tuple, output: object) -> None:
        module._parameters.update(kept.pop(module))

    handles = []
    for module in model.modules():
        if any(p is not None and p.dtype != torch.float32 for p in module._parameters.values()):
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
