"""A model of the user's in memory: what is inside its wrappers, and its frozen twin."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from prototok.model.families.general import twin_of_model
from prototok.model.families.stock import first_line, has_hooks

# What passes on to the model inside it, by class and package: where that is.
_WRAPPERS = {
    ("torch", "OptimizedModule"): "_orig_mod",
    ("torch", "DataParallel"): "module",
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "AveragedModel"): "module",
    ("deepspeed", "DeepSpeedEngine"): "module",
    ("peft", "PeftMixedModel"): "base_model.model",
}


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside what `torch.compile`, `DataParallel` or peft made of it.

    Raises:
        ValueError: there is none, or what is around it computes something of its own.
    """
    found: Any = model
    while not isinstance(found, PreTrainedModel):
        if has_hooks(found):
            raise ValueError(
                f"model: this {type(found).__name__} has a hook, and what is inside it is frozen "
                "alone; put the hook on the model inside, or take it off"
            )
        found = _inside(found)
    return found


def _inside(wrapper: Any) -> Any:
    adapters = getattr(wrapper, "peft_config", None)
    if isinstance(adapters, dict):
        if any(getattr(a, "is_prompt_learning", False) for a in adapters.values()):
            raise ValueError(
                f"model: the adapter of this {type(wrapper).__name__} is a learned prompt, which "
                "stands outside the model; load the model without it"
            )
        if hasattr(wrapper, "get_base_model"):
            return wrapper.get_base_model()
    kind = type(wrapper)
    place = _WRAPPERS.get((kind.__module__.split(".")[0], kind.__name__))
    if place is None:
        raise ValueError(
            f"model: {kind.__name__} is not a transformers model, nor what torch, peft or "
            "deepspeed make of one; pass a PreTrainedModel, a folder or a hub id"
        )
    return functools.reduce(getattr, place.split("."), wrapper)


def frozen_twin(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return a model of its own modules over the same weights, which optimisers may not change.

    Raises:
        ValueError: something in it cannot be copied.
    """
    for key, module in model.named_modules():
        patch = vars(module).get("forward")
        if any(isinstance(held, nn.Module) for held in _held_by(patch)):
            raise ValueError(
                f"model: {name} has a function as the forward of {key or type(module).__name__} "
                "that keeps hold of a module, so it cannot be frozen; use a forward hook, or a "
                "method bound by types.MethodType"
            )
    try:
        twin = twin_of_model(model)
    except Exception as error:  # whatever a user's own attributes and hooks raise when copied
        raise ValueError(
            f"model: {name} holds something that cannot be copied ({first_line(error)})"
        ) from error
    count_steps(model)
    return twin


def _held_by(function: object, seen: tuple[object, ...] = ()) -> Iterator[object]:
    """Yield what a function still refers to when it is copied, which a plain function never is.

    That is its closure, its defaults and the globals that it names. A bound method and a partial
    are copied with what they are of, so these are not among it.
    """
    if any(function is one for one in seen):  # one that calls itself
        return
    seen = (*seen, function)
    if isinstance(function, functools.partial):
        yield from _held_by(function.func, seen)
    elif isinstance(function, types.MethodType):
        yield from _held_by(function.__func__, seen)
    elif isinstance(function, types.FunctionType):
        try:
            of = inspect.getclosurevars(function)
        except ValueError:  # a name of its closure has no value yet
            return
        for held in (*of.nonlocals.values(), *(function.__defaults__ or ())):
            yield from (held, *_within(held))
            yield from _held_by(held, seen)
        for held in of.globals.values():
            yield from (held, *_within(held))


def _within(held: object) -> Iterator[object]:
    if isinstance(held, types.MethodType):
        yield held.__self__
    elif isinstance(held, functools.partial):
        yield from (*held.args, *_within(held.func))


def count_steps(model: nn.Module) -> None:
    """Let torch count the steps of its optimisers as changes of these weights, as they are.

    Fused ones change weights and count nothing, so that who shares them could not tell. Weights of
    others are left alone: fused steps may stand between their forward and its backward.
    """
    for weight in model.parameters():
        _counted[weight] = None
    _begin_to_count()


_counted: WeakIdKeyDictionary = WeakIdKeyDictionary()


@functools.cache
def _begin_to_count() -> None:
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    groups: Iterable[dict[str, Any]] = optimizer.param_groups
    for group in groups:
        for weight in group["params"]:
            if weight in _counted and not weight.is_inference():
                increment_version(weight)
