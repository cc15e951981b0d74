"""A caller's default dtype and device change nothing: every tensor of ours names its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import prototok
from prototok import FitResult, FrozenLM, ProtoTokens, autoregressive
from prototok.fitting.recipe import Recipe
from prototok.geometry import BezierSettings, connect, noisy
from support import small_llama

ROOT = Path(__file__).resolve().parents[2]
SHORT = Recipe(
    name="short", lr=0.1, schedule="cosine", cycle=7, warmup=3, max_steps=20, accuracy=0.9,
    eigenbasis=True,
)  # fmt: skip
TEXTS = [[5, 9, 33, 44, 21], [7, 3, 1, 2, 88, 17, 4, 9]]


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def another_default(request: pytest.FixtureRequest) -> Iterator[None]:
    dtype = torch.get_default_dtype()
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


def model(dtype: str) -> FrozenLM:
    return prototok.load(small_llama(), device="cpu", dtype=dtype)


def everything(lm: FrozenLM, folder: Path) -> dict[str, Tensor]:
    """What a model's user calls, and what it gives."""
    fit = prototok.fast_fit(lm, TEXTS, seeds=2, recipe=SHORT, progress=False)
    fit.save(folder / "fit")
    read = FitResult.load(folder / "fit")
    fit.tokens.save(folder / "tokens.safetensors")
    tokens = ProtoTokens.load(folder / "tokens.safetensors")
    shared = prototok.fast_fit(lm, TEXTS, share="m", recipe=SHORT, progress=False).best()
    prior = prototok.learn_shared(lm, length=4, steps=5, progress=False)
    capacity = prototok.capacity(lm, TEXTS, lengths=(2, 4), recipe=SHORT, progress=False)
    mem = autoregressive.fit(lm, TEXTS, recipe=SHORT, progress=False)
    mem.save(folder / "mem")
    path = connect(lm, fit, [(0, 1)], 5, BezierSettings(max_steps=2))
    found = {
        "e": fit.tokens.e, "m": fit.tokens.m, "loss": fit.loss, "margin": fit.margin,
        "steps": fit.steps, "correct": fit.correct, "exact": fit.exact, "read e": tokens.e,
        "read loss": read.loss, "read target": read.targets[1], "shared": shared.tokens.m,
        "ids": prototok.decode(lm, tokens), "mean": prior.mean, "std": prior.std,
        "basis": prior.basis, "nats": prototok.information(lm, TEXTS).nats,
        "longest": capacity.exact, "capacity's steps": capacity.steps, "mem": mem.mem,
        "mem's margin": mem.margin, "mem's steps": mem.steps,
        "generated": autoregressive.generate(lm, mem.mem, 6),
        "noisy": noisy(tokens, 0.1).e, "along a path": path.accuracy,
    }  # fmt: skip
    assert all(isinstance(tensor, Tensor) for tensor in found.values())
    return found


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FrozenLM, dict[str, Tensor]]:
    lm = model(request.param)
    return lm, everything(lm, tmp_path_factory.mktemp("plain"))


def test_results_are_the_same(
    plain: tuple[FrozenLM, dict[str, Tensor]], another_default: None, tmp_path: Path
) -> None:
    lm, expected = plain
    found = everything(lm, tmp_path)
    for name, tensor in found.items():
        wanted = expected[name]
        assert tensor.dtype == wanted.dtype and tensor.device == wanted.device, name
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-neox"])
def test_a_model_loads_as_it_is(name: str, another_default: None) -> None:
    def fitted() -> Tensor:
        lm = prototok.load(name, device="cpu")
        recipe = replace(SHORT, eigenbasis=False)
        return prototok.fast_fit(lm, TEXTS, recipe=recipe, progress=False).tokens.e

    found = fitted()
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(found, fitted())


def test_every_tensor_is_made_with_its_dtype_and_device() -> None:
    """Of integers from `arange` and `randint`, and of given data, torch knows the dtype."""
    typed = {"zeros", "ones", "empty", "full", "tensor", "rand", "randn", "linspace", "eye"}
    unnamed = []
    for path in [*ROOT.glob("prototok/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            maker = node.func
            if not isinstance(maker.value, ast.Name) or maker.value.id != "torch":
                continue
            named = {keyword.arg for keyword in node.keywords}
            wanted = {"device"} | ({"dtype"} if maker.attr in typed else set())
            made = maker.attr in typed | {"arange", "randint", "randperm", "as_tensor"}
            if made and not wanted <= named:
                unnamed.append(f"{path.name}:{node.lineno}")
    assert unnamed == []
