"""What C++ does with tensors that are not what it needs: an error that names them, each time.

Every function and every method that takes tensors is in CALLS, with tensors that it accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from prototok_kernels.backend import _cpu, this_machine
from prototok_kernels.views import views

pytestmark = pytest.mark.skipif(_cpu is None, reason="installed without the C++ kernels")

# Letters: R rows, N positions, d hidden size, I inner size, H heads, K key-value heads, c head
# size, V vocabulary.
R, N, D, INNER, H, K, C, V = 3, 4, 8, 12, 2, 1, 4, 10
L, F = 1, 2  # blocks, constant positions in front
MIXED, STACKED = H * C, (H + 2 * K) * C
LAYER = {"heads": H, "kv_heads": K, "head_size": C, "eps": 1e-5, "scaling": 0.5}


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def halves(*shape: int) -> Tensor:
    return floats(*shape).bfloat16()


def ids(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


def tables() -> dict[str, Tensor]:
    return {"cos": floats(64, C), "sin": floats(64, C)}


def block(make: Callable[..., Tensor]) -> dict[str, Tensor | None]:
    return {
        "norm": make(D), "norm_bias": None, "qkv": make(STACKED, D), "qkv_bias": make(STACKED),
        "q_norm": None, "k_norm": None, "out": make(D, MIXED), "out_bias": make(D),
        "mlp_norm": make(D), "mlp_norm_bias": None, "up": make(2 * INNER, D),
        "up_bias": make(2 * INNER), "down": make(D, INNER), "down_bias": make(D),
    }  # fmt: skip


def decoder_model(weights: dict[str, Any], ends: dict[str, Any]) -> Any:
    settings = {"rotated": C, "activation": "silu", "gated": True, "parallel": False}
    return _cpu.DecoderModel(blocks=[(views(**weights), 0)], **views(**ends), **LAYER, **settings)


def ends(make: Callable[..., Tensor]) -> dict[str, Tensor | None]:
    return {"norm": make(D), "norm_bias": None, "head": make(V, D), "embedding": make(V, D)}


def decoder(**tensors: Any) -> Any:
    room = {"rows": R, "positions": 64, "longest_pass": N}
    return _cpu.Decoder(model=decoder_model(block(floats), ends(floats)), **room, **tensors)


def passed() -> Any:
    found = decoder(**views(**tables()))
    found.pass_(**views(inputs=floats(R, N, D)), start=0, threads=1)
    return found


def blocks() -> Any:
    return _cpu.DecoderBlocks(model=decoder_model(block(halves), ends(halves)))


def first_layer_weights() -> dict[str, Tensor | None]:
    names = {"norm": "input_norm", "norm_bias": "input_norm_bias", "mlp_norm": "norm"}
    weights = block(halves)
    weights.pop("mlp_norm_bias")
    return {names.get(name, name): weight for name, weight in weights.items()}


def first_layer(**tensors: Any) -> Any:
    return _cpu.FirstLayer(weights=tensors, activation="silu", gated=True, **LAYER)


def head_tensors() -> dict[str, Tensor | None]:
    scores = {"loss": floats(R), "margin": floats(R), "predicted": ids(R)}
    return {"targets": ids(R), "token_weight": floats(R), **scores}


@dataclass(frozen=True)
class Call:
    """A function of C++, tensors that it takes, and which of them may be None."""

    run: Callable[..., object]  # of their views
    tensors: dict[str, Tensor | None]
    optional: tuple[str, ...] = ()
    needs_pairs: bool = False  # products of them


def calls() -> dict[str, Call]:
    row_norm = {"weight": floats(D), "statistics": floats(R, 2)}
    texts = {"e": floats(R, D), "m": floats(R, D), **tables()}
    stream = {"x": halves(R, N, D), "prefix": halves(L, 2, K, F, C), **tables()}
    of_first = {"first": 0, "tile": 1}
    saved_bytes = saved_floats = 0
    if this_machine().packed:
        saved_bytes = blocks().saved_bytes(texts=R, length=N, **of_first)
        saved_floats = first_layer(**views(**first_layer_weights())).saved_floats(length=N)
    one = {"threads": 1}
    state = torch.zeros(R, dtype=torch.int64)
    return {
        "head": Call(
            lambda **t: _cpu.head(**t, temperature=1.0, **one),
            {"logits": floats(R, V), "gradient": floats(R, V), **head_tensors()},
            ("gradient", "token_weight"),
        ),
        "adamw": Call(
            lambda **t: _cpu.adamw(**t, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0, **one),
            dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq"), floats(R, D).abs())
            | {"step": state, "lr": floats(R), "active": state == 0},
        ),
        "residual_norm": Call(
            lambda **t: _cpu.residual_norm(**t, eps=1e-5, **one),
            dict.fromkeys(("x", "delta", "sum", "normed"), floats(R, D))
            | row_norm | {"bias": floats(D)},
            ("bias",),
        ),
        "residual_norm_backward": Call(
            lambda **t: _cpu.residual_norm_backward(**t, centred=True, **one),
            dict.fromkeys(("grad_sum", "grad_normed", "sum", "grad"), floats(R, D)) | row_norm,
            ("grad_sum",),
        ),
        "activation": Call(
            lambda **t: _cpu.activation(**t, kind="silu", gated=True, **one),
            {"grad": None, "z": floats(R, 2 * INNER), "bias": floats(2 * INNER),
             "out": floats(R, INNER)},
            ("grad", "bias"),
        ),
        "activation backward": Call(
            lambda **t: _cpu.activation(**t, kind="silu", gated=True, **one),
            {"grad": floats(R, INNER), "z": floats(R, 2 * INNER), "bias": floats(2 * INNER),
             "out": floats(R, 2 * INNER)},
            ("bias",),
        ),
        "attention": Call(
            lambda **t: _cpu.attention(
                **t, heads=H, kv_heads=K, window=N, scaling=0.5, **one
            ),
            {"qkv": floats(R, N, STACKED), "grad_out": None, "out": floats(R, N, MIXED),
             "prefix": floats(2, K, F, C)} | tables(),
            ("grad_out", "prefix"),
        ),
        "attention backward": Call(
            lambda **t: _cpu.attention(
                **t, heads=H, kv_heads=K, window=N, scaling=0.5, **one
            ),
            {"qkv": floats(R, N, STACKED), "grad_out": floats(R, N, MIXED),
             "out": floats(R, N, STACKED), "prefix": floats(2, K, F, C)} | tables(),
            ("prefix",),
        ),
        "DecoderModel, its ends": Call(
            lambda **t: _cpu.DecoderModel(
                blocks=[(views(**block(floats)), 0)], **t, **LAYER, rotated=C, activation="silu",
                gated=True, parallel=False,
            ),
            ends(floats), ("norm_bias", "head", "embedding"),
        ),
        "DecoderModel, a block": Call(
            lambda **t: _cpu.DecoderModel(
                blocks=[(t, 0)], **views(**ends(floats)), **LAYER, rotated=C, activation="silu",
                gated=True, parallel=False,
            ),
            block(floats),
            ("norm_bias", "qkv_bias", "q_norm", "k_norm", "out_bias", "mlp_norm_bias", "up_bias",
             "down_bias"),
        ),
        "Decoder": Call(decoder, tables()),
        "Decoder.pass_": Call(
            lambda **t: decoder(**views(**tables())).pass_(**t, start=0, **one),
            {"inputs": floats(R, N, D)},
        ),
        "Decoder.logits": Call(
            lambda **t: passed().logits(**t, **one), {"out": floats(R, N, V)}
        ),
        "Decoder.predict": Call(lambda **t: passed().predict(**t, **one), {"ids": ids(R, N)}),
        "Decoder.predict, the last": Call(
            lambda **t: passed().predict(**t, **one), {"ids": ids(R)}
        ),
        "Decoder.generate": Call(
            lambda **t: passed().generate(**t, begin=1, start=N, **one), {"ids": ids(5, R)}
        ),
        "PackedHead": Call(_packed_head, {"weight": halves(V, D)}, needs_pairs=True),
        "PackedHead.run": Call(
            lambda **t: _packed_head(**views(weight=halves(V, D))).run(
                **t, temperature=1.0, tile=2, **one
            ),
            {"hidden": halves(R, D), "grad_hidden": halves(R, D), **head_tensors()},
            ("grad_hidden", "token_weight"), needs_pairs=True,
        ),
        "Packed": Call(lambda **t: _cpu.Packed(**t), {"weight": halves(V, D)}, needs_pairs=True),
        "Packed.product": Call(
            lambda **t: _cpu.Packed(**views(weight=halves(V, D))).product(
                **t, add=True, few=False
            ),
            {"inputs": halves(R, D), "bias": halves(V), "out": halves(R, V)},
            ("bias",), needs_pairs=True,
        ),
        "Packed.sum": Call(
            lambda **t: _cpu.Packed(**views(weight=halves(V, D))).sum(**t, begin=2, few=False),
            {"inputs": halves(R, D - 2), "scale": floats(R), "sum": floats(R, 64)},
            ("scale",), needs_pairs=True,
        ),
        "DecoderBlocks.forward": Call(
            lambda **t: blocks().forward(**t, **of_first, **one),
            stream | {"qkv": None, "z": None, "out": halves(R, N, D),
                      "saved": torch.zeros(saved_bytes, dtype=torch.uint8)},
            ("qkv", "z", "saved", "prefix"), needs_pairs=True,
        ),
        "DecoderBlocks.backward": Call(
            lambda **t: blocks().backward(**t, **of_first, **one),
            stream | {"qkv": None, "z": None, "grad": halves(R, N, D), "grad_x": halves(R, N, D),
                      "grad_qkv": None, "grad_z": None,
                      "saved": torch.zeros(saved_bytes, dtype=torch.uint8)},
            ("qkv", "z", "grad_qkv", "grad_z", "prefix"), needs_pairs=True,
        ),
        "FirstLayer": Call(
            first_layer, first_layer_weights(),
            ("input_norm_bias", "qkv_bias", "q_norm", "k_norm", "out_bias", "up_bias",
             "down_bias"), needs_pairs=True,
        ),
        "FirstLayer.behind": Call(
            lambda **t: first_layer(**views(**first_layer_weights())).behind(**t),
            {"prefix": halves(2, K, F, C), "shift": floats(D), "fixed": floats(H * (F - 1), D),
             "centred": floats(H * (F - 1), D), "projected": floats(H * (F - 1), 2 * INNER)},
            needs_pairs=True,
        ),
        "FirstLayer.forward": Call(
            lambda **t: first_layer(**views(**first_layer_weights())).forward(**t, **one),
            texts | {"saved": floats(R, saved_floats), "out": halves(R, N, D)}, needs_pairs=True,
        ),
        "FirstLayer.backward": Call(
            lambda **t: first_layer(**views(**first_layer_weights())).backward(**t, **one),
            texts | {"saved": torch.zeros(R, saved_floats), "grad": halves(R, N, D),
                     "grad_e": floats(R, D), "grad_m": floats(R, D)}, needs_pairs=True,
        ),
    }  # fmt: skip


def _packed_head(**tensors: Any) -> Any:
    return _cpu.PackedHead(**tensors)


CALLS = calls() if _cpu is not None else {}
FAULTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "another dtype": lambda t: t.to(torch.float64 if t.is_floating_point() else torch.int32),
    "another shape": lambda t: t[..., :-1].contiguous(),
    "another rank": lambda t: t[None, None],
    "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "elsewhere": lambda t: t.to("meta"),
    "None": lambda t: None,
}


def supported(name: str) -> Call:
    call = CALLS[name]
    if call.needs_pairs and not this_machine().packed:
        pytest.skip("no products of bf16 pairs here")
    return call


def fresh(call: Call) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.clone() for name, t in call.tensors.items()}


@pytest.mark.parametrize("name", CALLS)
def test_tensors_that_fit_are_taken(name: str) -> None:
    call = supported(name)
    call.run(**views(**fresh(call)))


@pytest.mark.parametrize(
    ("name", "argument", "fault"),
    [
        (name, argument, fault)
        for name, call in CALLS.items()
        for argument, tensor in call.tensors.items()
        for fault in FAULTS
        if tensor is not None
        and not (fault == "None" and argument in call.optional)
        # What a pass over rows calls a row may have any number of dimensions in front of it.
        and not (fault == "another rank" and name.startswith(("residual_norm", "activation")))
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name: str, argument: str, fault: str) -> None:
    call = supported(name)
    tensors = fresh(call)
    tensor = tensors[argument]
    assert tensor is not None
    tensors[argument] = FAULTS[fault](tensor)
    with pytest.raises(ValueError, match=r"^\w+: ") as found:
        call.run(**views(**tensors))
    named = str(found.value).split(":")[0]
    # A tensor that gives others their sizes makes one of those the odd one out, and so does one
    # whose absence asks for another result.
    assert named == argument or (fault in ("another shape", "None") and named in tensors)


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, c in CALLS.items() for argument in c.tensors]
)
def test_an_argument_that_is_missing_is_an_error(name: str, argument: str) -> None:
    call = supported(name)
    tensors = views(**fresh(call))
    del tensors[argument]
    with pytest.raises((TypeError, ValueError)):
        call.run(**tensors)


def test_arguments_have_names() -> None:
    call = CALLS["head"]
    with pytest.raises(TypeError):
        _cpu.head(*views(**fresh(call)).values(), 1.0, 1)
    with pytest.raises(TypeError):
        _cpu.head(**fresh(call), temperature=1.0, threads=1)  # tensors, not their views


@pytest.mark.parametrize("begin", [0, 6])
def test_generation_begins_inside_its_ids(begin: int) -> None:
    with pytest.raises(ValueError, match="begin: must be"):
        passed().generate(**views(ids=ids(5, R)), begin=begin, start=N, threads=1)


def test_generation_stays_inside_its_memory() -> None:
    with pytest.raises(ValueError, match="start: the cache has no room"):
        passed().generate(**views(ids=ids(5, R)), begin=1, start=61, threads=1)
    with pytest.raises(ValueError, match="ids: must be in the vocabulary"):
        passed().generate(**views(ids=V * ids(5, R)), begin=1, start=N, threads=1)
    with pytest.raises(ValueError, match="ids: there is no pass yet"):
        decoder(**views(**tables())).predict(**views(ids=ids(R)), threads=1)


FAR = 2**63 - 2  # what it is added to has no room for it


def test_numbers_that_lead_out_of_a_tensor_are_refused() -> None:
    with pytest.raises(IndexError, match="length: "):
        passed().pass_(**views(inputs=floats(R, N, D)), start=FAR, threads=1)
    with pytest.raises(ValueError, match="start: the cache has no room"):
        passed().generate(**views(ids=ids(5, R)), begin=1, start=FAR, threads=1)


def test_a_part_behind_its_weight_is_refused_and_a_tile_of_more_than_all_is_all() -> None:
    call = supported("DecoderBlocks.forward")
    with pytest.raises(ValueError, match="inputs: must be a part"):
        _cpu.Packed(**views(weight=halves(V, D))).sum(
            **views(inputs=halves(R, 2), scale=None, sum=floats(R, 64)), begin=FAR, few=False
        )
    found = []
    for tile in (R, 2**56):
        tensors = fresh(call)
        size = blocks().saved_bytes(texts=R, length=N, first=0, tile=tile)
        tensors["saved"] = torch.zeros(size, dtype=torch.uint8)
        blocks().forward(**views(**tensors), first=0, tile=tile, threads=1)
        found.append(tensors["out"])
    assert found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])


@pytest.mark.parametrize("threads", [0, -1])
def test_no_thread_is_too_few(threads: int) -> None:
    tensors = views(**fresh(CALLS["head"]))
    with pytest.raises(ValueError, match=f"threads: must be at least 1, saw {threads}"):
        _cpu.head(**tensors, temperature=1.0, threads=threads)
    with pytest.raises(ValueError, match="threads: "):
        passed().logits(**views(out=floats(R, N, V)), threads=threads)


def test_what_is_generated_is_the_last_pass() -> None:
    model = passed()
    kept = floats(R, N, V)
    model.generate(**views(ids=ids(1, R)), begin=1, start=N, threads=1)  # nothing is asked for
    model.logits(**views(out=kept), threads=1)
    model.generate(**views(ids=ids(2, R)), begin=1, start=N, threads=1)
    with pytest.raises(ValueError, match="out: must be"):
        model.logits(**views(out=kept), threads=1)
    model.logits(**views(out=floats(R, 1, V)), threads=1)


def test_a_view_keeps_its_tensor() -> None:
    """What a model was made from may be dropped, and what lies there is not written over."""
    model = decoder(**views(**tables()))
    kept = [floats(R, N, D) for _ in range(200)]  # takes the memory of whatever was let go
    model.pass_(**views(inputs=kept[0]), start=0, threads=1)
    out, again = floats(R, N, V), floats(R, N, V)
    model.logits(**views(out=out), threads=1)
    other = passed()
    other.logits(**views(out=again), threads=1)
    assert torch.equal(out, again)
