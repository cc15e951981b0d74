"""What is taken on machines of every kind, and why."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from prototok_kernels.backend import Machine, _cpu, require, unavailable
from prototok_kernels.plan import (
    FEW_ON_CPU,
    FEW_POSITIONS,
    FEW_POSITIONS_FP32,
    FEW_ROWS_ON_CUDA,
    TILES_FROM,
    Choice,
    Plan,
    Shape,
    plan_of,
)

CPU = Machine(
    cpp=True, instruction_sets=("avx512bf16", "avx512", "avx2", "baseline"), triton=False,
    interpreted=False, threads=2,
)  # fmt: skip
AMX_CPU = dataclasses.replace(CPU, instruction_sets=("amx", *CPU.instruction_sets))
AVX2_CPU = dataclasses.replace(CPU, instruction_sets=("avx2", "baseline"))
OLD_CPU = dataclasses.replace(CPU, instruction_sets=("baseline",))
BARE = Machine(cpp=False, instruction_sets=(), triton=False, interpreted=False, threads=2)
GPU = dataclasses.replace(BARE, triton=True)

LLAMA = Shape(
    blocks=4, hidden_size=64, heads=4, head_size=16, parallel=(False, False), head_unpacked=None
)
NEOX = dataclasses.replace(LLAMA, parallel=(True, True))


def planned(shape: Shape = LLAMA, machine: Machine = CPU, **changes: object) -> Plan:
    settings = {
        "rows": 8, "length": 64, "dtype": torch.bfloat16, "device": "cpu", "backend": "auto",
        "pair": True,
    } | changes  # fmt: skip
    return plan_of(shape, machine=machine, **settings)  # type: ignore[arg-type]


def taken(plan: Plan) -> dict[str, str]:
    return {name: choice.taken for name, choice in plan.choices().items()}


def test_a_processor_with_the_instructions_takes_cpp_throughout() -> None:
    assert taken(planned()) == {
        "passes": "cpu", "attention": "cpu", "first_layer": "cpu", "first_mlp": "span",
        "second_layer": "in full", "blocks": "cpu", "decoder": "blocks", "token": "cpu",
        "head": "packed", "update": "cpu", "products": "avx512bf16",
    }  # fmt: skip


def test_avx2_multiplies_pairs_as_well() -> None:
    for sets in (AVX2_CPU.instruction_sets, ("avx512", *AVX2_CPU.instruction_sets)):
        plan = planned(machine=dataclasses.replace(CPU, instruction_sets=sets))
        assert taken(plan) == taken(planned()) | {"products": "avx2"}
        assert plan.instruction_set == sets[0]


@pytest.mark.usefixtures("closed_form")
def test_a_processor_without_them_takes_torchs_products() -> None:
    found = taken(planned(machine=OLD_CPU))
    assert found["first_layer"] == "torch" and found["blocks"] == "one by one"
    assert found["head"] == found["passes"] == found["update"] == "cpu"
    assert found["products"] == "torch"


def test_tiles_are_taken_where_there_are_any_and_else_the_plan_says_why_not() -> None:
    plan = planned(machine=AMX_CPU)
    assert taken(plan) == taken(planned()) | {"products": "amx"}
    assert plan.instruction_set == "amx" and "products amx" in plan.summary()
    why = "the system does not let this process use tiles: Operation not permitted"
    refused = planned(machine=dataclasses.replace(CPU, missing=(("amx", why),)))
    assert refused.products.taken == "avx512bf16" and refused.instruction_set == "avx512bf16"
    assert ("amx", why) in refused.products.others and why in str(refused)
    single = planned(
        dataclasses.replace(LLAMA, unpacked="a weight is float32", head_unpacked="as well"),
        AMX_CPU, dtype=torch.float32,
    )  # fmt: skip
    assert single.products.taken == "torch"
    assert dict(single.products.others)["amx"] == "no part has packed weights"


@pytest.mark.usefixtures("closed_form")
def test_torch_is_taken_where_there_are_no_kernels_or_it_is_asked_for() -> None:
    for plan in (planned(machine=BARE), planned(backend="torch")):
        found = taken(plan)
        assert set(found.values()) == {"torch", "span", "in full", "one by one", "blocks"}
        assert plan.instruction_set == "none"
    assert taken(planned(device="mps"))["passes"] == "torch"


def test_cuda_takes_triton() -> None:
    found = taken(planned(NEOX, GPU, device="cuda", rows=1024, length=128))
    assert {found[part] for part in ("passes", "first_layer", "head", "update")} == {"triton"}
    assert found["second_layer"] == "combined" and found["blocks"] == "one by one"
    # Few positions: the closed form's launches cost more than it saves.
    few = planned(NEOX, GPU, device="cuda", rows=8, length=128)
    assert few.first_layer.taken == few.second_layer.taken == "in full"
    assert "small operations" in str(few.first_layer)
    flash = dataclasses.replace(NEOX, flash=True)
    assert taken(planned(flash, GPU, device="cuda"))["attention"] == "flash"


def test_short_texts_take_one_launch_of_attention_on_cuda() -> None:
    large = dataclasses.replace(NEOX, head_size=64, shared_keys=True)

    def attention(shape: Shape = large, **changes: object) -> Choice:
        return planned(shape, GPU, device="cuda", **{"length": 64, **changes}).attention

    assert attention().taken == "tile"
    assert attention(length=65).taken == "triton"
    assert ("tile", "a tile has 64 keys here, not 65") in attention(length=65).others
    assert attention(dtype=torch.float32).taken == "triton"
    assert attention(dataclasses.replace(large, prefix=1)).taken == "triton"
    assert attention(dataclasses.replace(large, prefix=1), length=63).taken == "tile"
    assert attention(dataclasses.replace(large, flash=True)).taken == "flash"
    for size in (16, 80):
        assert attention(dataclasses.replace(large, head_size=size), length=8).taken == "triton"


def test_few_rows_of_one_token_are_fused_on_cuda() -> None:
    for rows, expected in ((1, "fused"), (FEW_ROWS_ON_CUDA, "fused"), (5, "one by one")):
        plan = planned(machine=GPU, device="cuda", rows=rows, length=1)
        assert taken(plan)["token"] == expected
    assert "more than 4 rows" in str(plan.token)
    for changes in ({"backend": "torch"}, {"shape": dataclasses.replace(LLAMA, blocks=0)}):
        options = {"machine": GPU, "device": "cuda", "rows": 1} | changes
        assert taken(planned(**options))["token"] == "one by one"
    assert taken(planned(rows=FEW_POSITIONS + 1, length=1))["token"] == "one by one"


def test_an_explicit_request_is_met_or_refused() -> None:
    assert taken(planned(backend="cpu"))["passes"] == "cpu"
    for changes, machine, message in (
        ({"backend": "cuda"}, CPU, "^backend: 'cuda' is not one of auto, torch, triton, cpu"),
        ({"backend": "cpu", "device": "cuda"}, CPU, "^backend: 'cpu' needs tensors on the CPU"),
        ({"backend": "cpu"}, BARE, "^backend: 'cpu' needs the C.. kernels; this installation"),
        ({"backend": "triton"}, GPU, "^backend: 'triton' needs tensors on a CUDA device"),
        ({"backend": "triton", "device": "cuda"}, BARE, "^backend: 'triton' needs the triton"),
        ({"backend": "cpu", "dtype": torch.float64}, CPU, "does not take tensors of torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            planned(machine=machine, **changes)


def test_auto_leaves_dtypes_that_no_kernel_takes_to_torch() -> None:
    plan = planned(dtype=torch.float64)
    assert taken(plan)["passes"] == "torch"
    assert "torch.float64" in str(plan)
    assert taken(plan)["update"] == "cpu"  # e and m are fp32 whatever the model is


def test_the_closed_form_is_for_pairs_within_the_window() -> None:
    assert taken(planned(pair=False))["first_layer"] == "in full"
    windowed = dataclasses.replace(LLAMA, window=63)
    assert taken(planned(windowed))["first_layer"] == "in full"
    assert taken(planned(windowed, length=63))["first_layer"] == "cpu"
    assert taken(planned(Shape()))["first_layer"] == "in full"


@pytest.mark.usefixtures("closed_form")
def test_behind_a_prefix_the_first_layer_collapses_where_its_wider_span_is_cheaper() -> None:
    behind = dataclasses.replace(LLAMA, prefix=1)  # S = 10
    found = taken(planned(behind))
    assert found["first_layer"] == found["blocks"] == "cpu" and found["first_mlp"] == "span"
    assert taken(planned(behind, OLD_CPU))["first_layer"] == "torch"
    assert taken(planned(behind, GPU, device="cuda", rows=1024))["first_layer"] == "triton"
    # 10 (64 + N) < 64 N; so few positions go through one more block in C++, where there is one.
    assert taken(planned(behind, length=12))["first_layer"] == "cpu"
    assert taken(planned(behind, length=11))["first_layer"] == "in full"
    assert taken(planned(behind, OLD_CPU, length=11))["first_layer"] == "torch"
    assert taken(planned(behind, OLD_CPU, length=11))["first_mlp"] == "positions"


def test_constants_of_a_prefix_cost_their_part_of_each_position_and_no_product() -> None:
    # 10 (64 + 64) + 4 · 4 (P − 1) 64 < 64 · 64
    assert taken(planned(dataclasses.replace(LLAMA, prefix=3)))["first_layer"] == "cpu"
    assert taken(planned(dataclasses.replace(LLAMA, prefix=4)))["first_layer"] == "in full"
    assert taken(planned(dataclasses.replace(LLAMA, prefix=4), OLD_CPU))["first_mlp"] == "positions"
    # With many positions the products that are spared pay for 48 operations of 64, not for all.
    assert taken(planned(dataclasses.replace(LLAMA, prefix=4), length=640))["first_layer"] == "cpu"
    wide = dataclasses.replace(LLAMA, prefix=5)
    assert taken(planned(wide, length=640))["first_layer"] == "in full"


@pytest.mark.usefixtures("closed_form")
def test_a_prefix_longer_than_the_text_or_beyond_the_window_is_run_in_full() -> None:
    for prefix, expected in ((64, "torch"), (65, "in full")):
        long = dataclasses.replace(LLAMA, prefix=prefix)
        assert taken(planned(long, OLD_CPU))["first_layer"] == expected
    for prefix, expected in ((64, "triton"), (65, "in full")):
        long = dataclasses.replace(NEOX, prefix=prefix)
        assert taken(planned(long, GPU, device="cuda", rows=1024))["first_layer"] == expected
    windowed = dataclasses.replace(LLAMA, prefix=1, window=64)
    assert taken(planned(windowed))["first_layer"] == "in full"
    assert taken(planned(windowed, length=63))["first_layer"] == "cpu"
    wider = dataclasses.replace(NEOX, prefix=3)
    assert taken(planned(NEOX))["second_layer"] == "span"
    assert taken(planned(wider, length=54))["second_layer"] == "in full"
    assert taken(planned(wider, length=55))["second_layer"] == "span"


def test_a_closed_form_in_torch_must_beat_one_more_block() -> None:
    for machine, blocks in ((CPU, "cpu"), (OLD_CPU, "one by one"), (BARE, "one by one")):
        enough = FEW_ON_CPU[blocks] // (64 * NEOX.hidden_size**2)  # rows of 64 positions
        assert taken(planned(NEOX, machine, rows=enough))["first_layer"] == "torch"
        fewer = planned(NEOX, machine, rows=enough - 1)
        assert taken(fewer)["first_layer"] == taken(fewer)["second_layer"] == "in full"
        assert taken(fewer)["blocks"] == blocks
        assert "one more block costs less" in str(fewer.first_layer)
    # The form in C++ is cheap, but not for fewer positions than its vectors are worth.
    assert taken(planned(rows=1))["first_layer"] == "cpu"
    for few_positions in (planned(rows=1, length=2), planned(rows=1 << 20, length=2)):
        assert taken(few_positions)["first_layer"] == "in full"


@pytest.mark.usefixtures("closed_form")
def test_what_the_packed_products_cannot_take_is_said() -> None:
    odd = dataclasses.replace(LLAMA, unpacked="a weight of (3, 64) has an odd size")
    plan = planned(odd)
    assert taken(plan)["blocks"] == "one by one" and taken(plan)["first_layer"] == "torch"
    assert ("cpu", "a weight of (3, 64) has an odd size") in plan.blocks.others
    normed = dataclasses.replace(LLAMA, normed_heads=True)
    assert taken(planned(normed))["blocks"] == "one by one"
    assert taken(planned(normed))["first_layer"] == "cpu"


def test_few_positions_go_through_the_decoder() -> None:
    single = dataclasses.replace(LLAMA, unpacked="a weight is float32")
    for machine, most in (
        (CPU, FEW_POSITIONS_FP32), (AMX_CPU, FEW_POSITIONS_FP32), (OLD_CPU, FEW_POSITIONS),
    ):  # fmt: skip
        for length, expected in ((most, "cpu"), (most + 1, "blocks")):
            plan = planned(single, machine=machine, rows=1, length=length, dtype=torch.float32)
            assert taken(plan)["decoder"] == expected
        # Packed products are the faster ones; what is generated one by one has no use for them.
        packed = machine is not OLD_CPU
        forward = planned(machine=machine, rows=2, length=3)
        assert taken(forward)["decoder"] == ("blocks" if packed else "cpu")
        tokens = planned(machine=machine, rows=FEW_POSITIONS, length=1)
        assert taken(tokens)["decoder"] == "cpu"
    odd = dataclasses.replace(LLAMA, unpacked="a weight of (3, 64) has an odd size")
    assert taken(planned(odd, rows=1, length=3))["decoder"] == "cpu"


@pytest.mark.skipif(_cpu is None, reason="installed without the C++ kernels")
def test_tiles_are_taken_from_one_length_on() -> None:
    assert TILES_FROM == _cpu.TILES_FROM


def test_few_positions_of_fewer_rows_than_threads_go_through_the_decoder() -> None:
    one, four = (dataclasses.replace(CPU, threads=threads) for threads in (1, 4))
    for machine, rows, length, expected in (
        (CPU, 1, 12, "cpu"), (CPU, 1, 13, "blocks"), (CPU, 2, 6, "blocks"), (one, 1, 8, "blocks"),
        (four, 3, 8, "cpu"), (four, 3, 9, "blocks"),
        (AMX_CPU, 1, TILES_FROM - 1, "cpu"), (AMX_CPU, 1, TILES_FROM, "blocks"),
    ):  # fmt: skip
        plan = planned(machine=machine, rows=rows, length=length)
        assert taken(plan)["decoder"] == expected
    assert taken(planned(rows=1, length=1, backend="torch"))["decoder"] == "blocks"


def test_a_plan_prints_a_line_and_a_reason_for_every_part() -> None:
    for plan in (planned(), planned(Shape()), planned(NEOX, GPU, device="cuda")):
        lines = str(plan).splitlines()
        assert len(lines) == 1 + len(plan.choices()) == 12
        for line, (name, choice) in zip(lines[1:], plan.choices().items(), strict=True):
            assert line.startswith(name) and choice.reason
            assert all(why for _, why in choice.others)
            assert choice.taken not in dict(choice.others)
        assert plan.summary().count(",") == 10


def test_an_op_takes_a_decision_and_no_request() -> None:
    x = torch.zeros(2)
    require("torch", x)
    with pytest.raises(ValueError, match="^backend: 'auto' is not one of torch, triton, cpu"):
        require("auto", x)
    refused = unavailable("cpu", "cpu") or "does not take tensors of torch.float16"
    with pytest.raises(ValueError, match=re.escape(refused)):
        require("cpu", x.half())
