"""Tell a model that is exactly what transformers builds from one that was changed since.

The own forwards know the stock modules and nothing else. A hook, an adapter, a replaced module or
a further weight changes what the model computes and leaves no trace in its config, so the modules
themselves are compared with those of a model freshly built from the config, on the meta device.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from prototok_kernels.activation import ACTIVATIONS

# Attributes that a forward in eval mode does not read, or that only remember something.
_SILENT = {"training", "gradient_checkpointing", "padding_idx", "p", "attention_dropout"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Where transformers' own hooks are from, to record hidden states and to let gradients through.
_HARMLESS = ("transformers.utils.output_capturing", "transformers.modeling_utils")
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Rope variants whose frequencies do not depend on the length of the input.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def why_changed(model: PreTrainedModel) -> str | None:
    """Return the first way in which a model differs from the stock one; None where it does not."""
    attention = model.config._attn_implementation
    if attention not in _ATTENTIONS:
        return f"its attention is {attention!r}, which is not one of transformers' own"
    try:
        with torch.device("meta"):
            stock = type(model)(copy.deepcopy(model.config))
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        return f"its config builds no {type(model).__name__} ({first_line(error)})"
    modules = dict(stock.named_modules())
    for name, module in model.named_modules():
        if name not in modules:
            return f"it has {name}, which the stock model lacks"
        why = _why_module(module, modules.pop(name))
        if why is not None:
            return f"{name or type(model).__name__} {why}"
    if modules:
        return f"it lacks {next(iter(modules))} of the stock model"
    return None


def _why_module(module: nn.Module, stock: nn.Module) -> str | None:
    if type(module) is not type(stock):
        return f"is {_name(module)} where the stock model has {_name(stock)}"
    if "forward" in vars(module):
        return "has a forward of its own"
    if has_hooks(module):
        return "has a hook"
    for kind in ("_parameters", "_buffers"):
        found, expected = (
            {key: tuple(t.shape) for key, t in getattr(m, kind).items() if t is not None}
            for m in (module, stock)
        )
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                seen = found.get(key, "missing")
                return f"has {key} {seen} where the stock model has {expected.get(key, 'none')}"
    for key, parameter in module._parameters.items():
        if parameter is not None and type(parameter) is not nn.Parameter:
            return f"has {key} in a {type(parameter).__name__}"
    if isinstance(module, PreTrainedModel):  # its numbers are names, sizes and token ids
        return None
    attributes: dict[str, Any] = vars(module)
    for key, value in vars(stock).items():
        plain = value is None or isinstance(value, bool | int | float | str)
        if key.startswith("_") or key in _SILENT or not plain:
            continue
        if attributes.get(key) != value:
            return f"has {key} = {attributes.get(key)!r} where the stock model has {value!r}"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Return True if something else than transformers runs before or behind the module."""
    hooks = (hook for kind in _HOOKS for hook in getattr(module, kind).values())
    return any(getattr(hook, "__module__", None) not in _HARMLESS for hook in hooks)


def _name(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__.split('.')[0]}'s {kind.__qualname__}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def activation_of(module: nn.Module) -> str | None:
    """Return the name in ACTIVATIONS of an activation module of transformers; None: no such one."""
    return next((name for name in ACTIVATIONS if type(ACT2FN[name]) is type(module)), None)


def why_not_static(rotary: Any) -> str | None:
    """Return None if one table of angles serves inputs of every length, else why not."""
    kind = rotary.rope_type
    return None if kind in _STATIC_ROPE else f"its rope is {kind!r}, which depends on the length"


def rope_changes(model: PreTrainedModel) -> bool:
    """Return True if a part of the model makes its angles anew by the length of each input."""
    kinds = (getattr(module, "rope_type", "default") for module in model.modules())
    found = (k for kind in kinds for k in (kind.values() if isinstance(kind, dict) else (kind,)))
    return any(kind not in _STATIC_ROPE for kind in found)
