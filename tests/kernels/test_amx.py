"""Products of packed weights in AMX tiles: on the processor where it has them, and emulated.

The emulation runs the text of the real target on any processor, so layout and edges are tested
everywhere. Both are held to the bits that Intel's manual describes.

Letters: M rows, I inputs, O outputs.
"""

from __future__ import annotations

import copy
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, PreTrainedModel

import prototok
from against_fp64 import with_gradients
from kernels import test_attention as attention_tests
from kernels import test_decoder, test_decoder_blocks, test_first_layer, test_second_layer
from kernels import test_linear_cross_entropy as test_head
from prototok import Recipe
from prototok.model.families.body import DecoderBody
from prototok_kernels import backend
from prototok_kernels.backend import EMULATED, _cpu, this_machine
from prototok_kernels.views import views
from support import losses_by_step
from zoo import OWN, made

pytestmark = pytest.mark.skipif(_cpu is None, reason="installed without the C++ kernels")

PANEL = 64
EDGES = [  # (M, I, O): rows around tiles and blocks of two, depths and panels with ends
    (5, 32, 64), (15, 30, 2), (16, 34, 62), (17, 64, 66), (31, 2, 128), (32, 96, 130), (33, 62, 64),
    (64, 128, 192), (70, 190, 1),
]  # fmt: skip


@contextmanager
def running_on(name: str) -> Iterator[str]:
    """Run on an instruction set, on one thread: emulated tiles keep it busy long enough."""
    missing = None if name == EMULATED else this_machine().lacks_instructions(name)
    if missing:
        pytest.skip(f"no {name} here: {missing}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with backend.instruction_set(name):
        yield name
    torch.set_num_threads(before)


@pytest.fixture(params=[EMULATED, "amx"])
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    with running_on(request.param) as name:
        yield name


@pytest.fixture(params=[EMULATED, "amx", "avx2"])
def pairs(request: pytest.FixtureRequest) -> Iterator[str]:
    """Beside tiles the set that multiplies pairs without an instruction for them."""
    with running_on(request.param) as name:
        yield name


def by_the_manual(inputs: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
    """sums + inputs weightᵀ as TDPBF16PS adds it up: firsts and seconds of 16 pairs apart."""
    end = -inputs.shape[1] % 32
    a, b = (pad(x, (0, end)).float() for x in (inputs, weight))
    for begin in range(0, a.shape[1], 32):
        apart = torch.zeros(2, *sums.shape)
        for k in range(begin, begin + 32, 2):
            for which in range(2):  # a product of two bf16 is exact in fp32
                apart[which] += a[:, k + which, None] * b[None, :, k + which]
        sums = sums + (apart[0] + apart[1])
    return sums


def operands(rows: int, depth: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 10007 + depth * 101 + outputs)
    return tuple(
        torch.randn(count, depth, generator=generator).bfloat16() for count in (rows, outputs)
    )  # type: ignore[return-value]


def product(
    weight: Tensor, inputs: Tensor, bias: Tensor | None = None, onto: Tensor | None = None,
    few: bool = False,
) -> Tensor:  # fmt: skip
    out = inputs.new_full((len(inputs), len(weight)), torch.nan) if onto is None else onto.clone()
    _cpu.Packed(**views(weight=weight)).product(
        **views(inputs=inputs, bias=bias, out=out), add=onto is not None, few=few
    )
    return out


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_products_are_those_of_the_manual(tiles: str, shape: tuple[int, int, int]) -> None:
    inputs, weight = operands(*shape)
    sums = by_the_manual(inputs, weight, torch.zeros(shape[0], shape[2]))
    assert torch.equal(product(weight, inputs), sums.bfloat16())
    bias, onto = torch.randn(shape[2]).bfloat16(), torch.randn(shape[0], shape[2]).bfloat16()
    assert torch.equal(product(weight, inputs, bias), (sums + bias).bfloat16())
    assert torch.equal(product(weight, inputs, bias, onto), (sums + bias + onto).bfloat16())


def test_any_number_of_rows_gives_each_row_its_own_bits(tiles: str) -> None:
    inputs, weight = operands(70, 46, 130)
    whole = product(weight, inputs)
    for rows in range(1, 41):
        assert torch.equal(product(weight, inputs[:rows]), whole[:rows]), rows
        assert torch.equal(product(weight, inputs[-rows:]), whole[-rows:]), rows


@pytest.mark.parametrize(("begin", "part"), [(0, 32), (6, 50), (32, 64), (98, 2)])
def test_sums_go_on_from_scaled_ones(tiles: str, begin: int, part: int) -> None:
    inputs, weight = operands(37, 100, 70)
    packed = _cpu.Packed(**views(weight=weight))
    inputs = inputs[:, begin : begin + part].contiguous()
    sums = torch.randn(37, 2 * PANEL)
    scale = torch.rand(37)
    scale[::2] = 1.0
    ones = pad(weight[:, begin : begin + part], (0, 0, 0, 2 * PANEL - 70))
    for given in (None, scale):
        start = torch.zeros_like(sums) if given is None else sums * given[:, None]
        found = sums.clone()
        packed.sum(**views(inputs=inputs, scale=given, sum=found), begin=begin, few=False)
        assert torch.equal(found, by_the_manual(inputs, ones, start))


def test_denormal_numbers_count_as_zero(tiles: str) -> None:
    tiny = 2.0**-130  # a denormal number of bf16
    weight, inputs = torch.full((64, 32), 1.0).bfloat16(), torch.full((5, 32), tiny).bfloat16()
    assert float(inputs[0, 0]) == tiny
    assert torch.equal(product(weight, inputs), torch.zeros(5, 64).bfloat16())
    half = torch.full((5, 32), 2.0**-64).bfloat16()  # whose products with themselves are denormal
    assert torch.equal(product(half, half), torch.zeros(5, 5).bfloat16())
    larger = torch.full((5, 32), 2.0**-120).bfloat16()
    assert torch.equal(product(weight, larger), torch.full((5, 64), 2.0**-115).bfloat16())


def test_what_is_not_finite_stays_in_its_row_and_output(tiles: str) -> None:
    inputs, weight = operands(20, 34, 66)
    clean = product(weight, inputs)
    inputs[3, 33], weight[65, 0] = torch.nan, torch.inf
    found = product(weight, inputs)
    assert found[3].isnan().all() and not found[:, 65].isfinite().any()
    others = [row for row in range(20) if row != 3]
    assert torch.equal(found[others, :65], clean[others, :65])


def test_few_rows_take_vectors_on_the_same_panels(tiles: str) -> None:
    """The sums of one order are not those of another, but as close to the exact ones."""
    inputs, weight = operands(4, 254, 190)
    exact = inputs.double() @ weight.double().T
    plain = (inputs @ weight.T).double() - exact
    for few in (True, False):
        found = product(weight, inputs, few=few).double() - exact
        assert float(found.abs().max()) <= 2 * float(plain.abs().max())
    packed = _cpu.Packed(**views(weight=weight))
    sums = torch.empty(2, 4, 3 * PANEL)
    for few in range(2):
        packed.sum(**views(inputs=inputs, scale=None, sum=sums[few]), begin=0, few=bool(few))
    assert not torch.equal(sums[0], sums[1])
    torch.testing.assert_close(sums[0], sums[1])


# ---- what is made of them: the tests of each op, on tiles ----


@pytest.mark.parametrize("shape", [s for s in test_head.SHAPES if s[1] % 2 == 0], ids=str)
def test_the_head(pairs: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_head, "HAS_PACKED", True)
    test_head.test_is_as_close_to_fp64_as_torch("cpu", "cpu", shape, torch.bfloat16, 0.5)


def test_the_head_where_chunks_lead_and_rows_come_alone(pairs: str) -> None:
    test_head.test_packed_head_where_a_later_chunk_leads_or_equals(0.25)
    test_head.test_a_row_of_the_packed_head_is_its_own_and_follows_its_weight()


def test_the_head_gives_the_same_in_any_tiles() -> None:
    inputs = test_head.make_inputs(300, 34, 70, torch.bfloat16, "cpu")  # two tiles of a thread
    with backend.instruction_set(EMULATED):
        whole = test_head.linear_cross_entropy(*inputs, backend="packed")
        few = test_head.linear_cross_entropy(*inputs, backend="packed", workspace_bytes=1)
    assert torch.equal(whole.loss, few.loss) and torch.equal(whole.grad_hidden, few.grad_hidden)


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_threads_that_share_the_heads_outputs_change_no_bit(tiles: str, rows: int) -> None:
    inputs = test_head.make_inputs(rows, 134, 2114, torch.bfloat16, "cpu")  # panels with ends
    alone = test_head.linear_cross_entropy(*inputs, backend="packed")
    for count in (2, 3):
        torch.set_num_threads(count)
        for need_grad in (True, False):
            found = test_head.linear_cross_entropy(*inputs, backend="packed", need_grad=need_grad)
            assert torch.equal(found.predicted, alone.predicted)
            assert torch.equal(found.margin, alone.margin)
            if need_grad:
                assert torch.equal(found.loss, alone.loss)
                assert torch.equal(found.grad_hidden, alone.grad_hidden)


@pytest.mark.parametrize("window", [None, 9], ids=str)
@pytest.mark.parametrize("shape", attention_tests.SHAPES, ids=str)
def test_attention_in_tiles(pairs: str, shape: tuple[int, ...], window: int | None) -> None:
    attention_tests.test_is_as_close_to_fp64_as_torch("cpu", "cpu", shape, torch.bfloat16, window)


@pytest.mark.parametrize("window", [None, 9], ids=str)
@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("shape", attention_tests.SHAPES[2::4], ids=str)
def test_attention_in_tiles_behind_a_prefix(
    pairs: str, shape: tuple[int, ...], count: int, window: int | None
) -> None:
    attention_tests.test_behind_a_prefix_it_is_as_close(
        "cpu", "cpu", shape, torch.bfloat16, count, window
    )


@pytest.mark.parametrize(("texts", "length"), [(1, 70), (1, 7), (1, 3), (2, 31)])
@pytest.mark.parametrize("name", ["llama, grouped, tied", "gpt-neox, parallel"])
def test_threads_that_share_outputs_change_no_bit(
    pairs: str, name: str, texts: int, length: int
) -> None:
    """Blocks of 2 MiB and more are shared by outputs."""
    body = prototok.load(wide(name), device="cpu", dtype=torch.bfloat16).body
    assert isinstance(body, DecoderBody)
    blocks, tables = test_decoder_blocks.blocks_of(body), body.rotary(length)
    x = test_decoder_blocks.stream(texts, length, body.norm.numel())
    run = lambda x: test_decoder_blocks.through(blocks, x, tables)  # noqa: E731
    alone = with_gradients(run, [x], torch.bfloat16)
    for count in (2, 3):
        torch.set_num_threads(count)
        for found, expected in zip(with_gradients(run, [x], torch.bfloat16), alone, strict=True):
            assert torch.equal(found, expected)
        with torch.no_grad():
            assert torch.equal(run(x), alone[0])


def wide(name: str) -> PreTrainedModel:
    """A model of a covered family with more than 2 MiB of weights a block, off every panel."""
    config = copy.deepcopy(made(OWN[name]).config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 288, 1250, 2
    config.num_attention_heads, config.num_key_value_heads = 6, 2
    if hasattr(config, "head_dim"):
        config.head_dim = 48
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.mark.parametrize(("texts", "length"), [(3, 19), (1, 70), (5, 3)])
@pytest.mark.parametrize("name", ["llama, grouped, tied", "gpt-neox, parallel", "qwen2"])
def test_the_blocks(pairs: str, name: str, texts: int, length: int) -> None:
    test_decoder_blocks.test_errors_are_no_larger_than_those_of_the_loop(name, texts, length, 1)


@pytest.mark.parametrize(("texts", "length"), [(9, 3), (5, 5), (3, 13)])
def test_a_text_is_the_same_beside_any_others(pairs: str, texts: int, length: int) -> None:
    """Short texts share a call: whether they take tiles is settled by their own length.

    Another order of sums is lost in bf16 but once in some ten thousand numbers, so the model is not
    one of the smallest.
    """
    body = prototok.load("tiny-llama", device="cpu", dtype="bfloat16").body
    assert isinstance(body, DecoderBody)
    blocks, tables = test_decoder_blocks.blocks_of(body), body.rotary(length)
    x = test_decoder_blocks.stream(texts, length, body.norm.numel())
    probe = test_decoder_blocks.stream(texts, length, body.norm.numel()).flip(0)

    def both_ways(part: slice) -> tuple[Tensor, Tensor]:
        leaf = x[part].clone().requires_grad_()
        out = test_decoder_blocks.through(blocks, leaf, tables)
        return out.detach(), torch.autograd.grad(out, leaf, probe[part])[0]

    whole = both_ways(slice(None))
    for part in (slice(0, 1), slice(1, 3)):
        for found, expected in zip(both_ways(part), whole, strict=True):
            assert torch.equal(found, expected[part])


def test_a_row_of_the_head_is_the_same_beside_any_others(pairs: str) -> None:
    inputs = test_head.make_inputs(24, 254, 8194, torch.bfloat16, "cpu")
    whole = test_head.linear_cross_entropy(*inputs, backend="packed")
    for part in (slice(0, 1), slice(5, 22), *(slice(row, row + 4) for row in range(0, 24, 4))):
        rows = [inputs[0][part], inputs[1], inputs[2][part], inputs[3][part]]
        found = test_head.linear_cross_entropy(*rows, backend="packed")
        assert torch.equal(found.loss, whole.loss[part])
        assert torch.equal(found.grad_hidden, whole.grad_hidden[part])


@pytest.mark.parametrize("length", [9, 33])
@pytest.mark.parametrize("case", ["llama-gqa-biases", "neox-sequential-gelu-tanh"])
def test_the_first_layer(pairs: str, case: str, length: int) -> None:
    test_first_layer.test_cpp_errs_no_more_than_general_layer(case, length, 2)


def test_a_first_layer_off_every_vector(pairs: str) -> None:
    test_first_layer.test_cpp_of_many_heads_and_sizes_off_every_vector()


def test_the_second_layer(pairs: str) -> None:
    test_second_layer.errors_are_no_larger("gpt-neox, parallel", 60, 2, torch.bfloat16, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoder(pairs: str, dtype: torch.dtype) -> None:
    test_decoder.test_error_is_no_larger_than_that_of_torch("qwen3, tied", dtype, pairs)


def test_a_fit_runs_on_tiles_throughout_and_says_so(tiles: str) -> None:
    texts = ["A king lived in a house by the sea.", "The moon was white."]

    def fit(**options: object) -> tuple[dict, str]:
        lm = prototok.load("tiny-llama", device="cpu", dtype="bfloat16")
        found = losses_by_step(lm, texts, recipe=Recipe(max_steps=3), **options)
        return found, lm.plan(2, 16, pair=True).summary()

    ours, plan = fit()
    assert f"products {tiles}" in plan
    for part in ("first_layer cpu", "blocks cpu", "head packed"):
        assert part in plan
    lm = prototok.load("tiny-llama", device="cpu", dtype="bfloat16")
    assert lm.plan(1, 20, pair=False).decoder.taken == "blocks"  # one forward, too
    plain, _ = fit(backend="torch")
    for row in plain:
        for step, loss in plain[row].items():
            assert ours[row][step] == pytest.approx(loss, rel=0.02)


# ---- what is not computed ----


@pytest.mark.parametrize("rows", range(1, 33))
def test_configurations_are_those_of_palette_1(rows: int) -> None:
    config = _cpu.tile_config(rows=rows)
    palette, start_row, reserved, *rest = struct.unpack("<BB14s16H16B", config)
    row_bytes, counts = rest[:16], rest[16:]
    assert (palette, start_row, reserved) == (1, 0, bytes(14))
    assert row_bytes == [64] * 8 + [0] * 8 and counts[8:] == [0] * 8
    last = rows - 16 if rows > 16 else rows
    # Sums 0 … 3, inputs behind them, weights last: two rows of tiles, or one.
    expected = [16, 16, last, last, 16, last, 16, 16] if rows > 16 else [last] * 5 + [16] * 3
    assert counts[:8] == expected


def test_a_set_that_is_not_there_is_refused_and_changes_nothing() -> None:
    before = this_machine()
    with (
        pytest.raises(ValueError, match="instruction_set: this processor does not have 'mmx'"),
        backend.instruction_set("mmx"),
    ):
        pass
    assert this_machine() == before and EMULATED not in before.instruction_sets
    with backend.instruction_set("baseline"):
        assert this_machine().instruction_sets == ("baseline",)
        assert this_machine().packed is None
    assert this_machine() == before


AMX = re.compile(r"\t(ldtilecfg|sttilecfg|tile\w+|tdp\w+)\s*(.*)$")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")


@pytest.fixture(scope="module")
def code() -> dict[str, list[str]]:
    """The instructions of every function of the extension, as objdump prints them."""
    if shutil.which("objdump") is None:
        pytest.skip("there is no objdump")
    if "built without" in dict(this_machine().missing).get("amx", ""):
        pytest.skip("the compiler has no AMX")
    command = ["objdump", "-d", "--no-show-raw-insn", _cpu.__file__]
    found: dict[str, list[str]] = {}
    body: list[str] = []
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in printed.splitlines():
        start = FUNCTION.match(line)
        if start:
            body = found.setdefault(start[1], [])
        elif line:
            body.append(line)
    if any("__asan" in name for name in found):
        pytest.skip("a build with sanitizers has code of theirs in every loop")
    return found


def test_tiles_are_in_the_code_of_their_target_alone(code: dict[str, list[str]]) -> None:
    seen = set[str]()
    for name, lines in code.items():
        used = {match[1] for match in map(AMX.search, lines) if match}
        assert not used or "prototok3amx" in name, name  # its namespace, as names are mangled
        seen |= used
    assert seen == {
        "ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tdpbf16ps", "tilestored"
    }  # fmt: skip


def test_sums_stay_in_tiles_through_the_loop(code: dict[str, list[str]]) -> None:
    """The loop over the depth reads each tile once, multiplies all pairs of them and no more."""
    shapes = set[tuple[int, int]]()  # rows of tiles by columns
    for lines in code.values():
        for loop in innermost_loops(lines):
            used = [match for match in map(AMX.search, loop) if match]
            dots = [match[2] for match in used if match[1] == "tdpbf16ps"]
            if not dots:
                continue
            rows = len({dot.split(",")[1] for dot in dots})
            sums = {dot.split(",")[2] for dot in dots}
            columns = len(sums) // rows
            assert len(sums) == len(dots) == rows * columns
            assert sums <= {f"%tmm{i}" for i in range(4)}
            shapes.add((rows, columns))
            loads = [match for match in used if match[1] == "tileloadd"]
            assert len(loads) == rows + columns and len(used) == len(dots) + len(loads)
            moves = [line for line in loop if re.search(r"\tv?mov\w* ", line)]
            assert all("(" not in line for line in moves), moves  # nothing goes through memory
    # Those of packed weights, and with the ends of small factors.
    assert shapes == {(2, 2), (1, 4), (2, 1), (1, 2), (1, 1)}


def innermost_loops(lines: list[str]) -> list[list[str]]:
    """From the target of a jump backward to the jump, where no other such jump lies between."""
    at = {line.split(":")[0].strip(): index for index, line in enumerate(lines)}
    found, last = [], -1
    for index, line in enumerate(lines):
        jump = re.search(r"\tj\w+\s+([0-9a-f]+) ", line)
        begin = at.get(jump[1]) if jump else None
        if begin is not None and last < begin <= index:
            found.append(lines[begin : index + 1])
        if begin is not None and begin <= index:
            last = index
    return found
