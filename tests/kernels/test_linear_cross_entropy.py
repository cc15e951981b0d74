"""Letters: R rows, d hidden size, V vocabulary."""

from __future__ import annotations

import functools
import re
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prototok_kernels import linear_cross_entropy as module
from prototok_kernels import packed
from prototok_kernels.backend import this_machine, unavailable
from prototok_kernels.linear_cross_entropy import (
    HeadOutput,
    linear_cross_entropy,
    linear_cross_entropy_ref,
)
from prototok_kernels.views import views

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [  # (R, d, V): empty, single, around vectors of 16 and blocks of 2048 and 4096
    (0, 8, 9),
    (1, 1, 1),
    (2, 8, 2),
    (3, 16, 15),
    (3, 16, 16),
    (7, 24, 2065),
    (9, 16, 257),
    (2, 8, 4099),
    (150, 24, 2066),  # tiles of 128 rows and chunks of 1024 of the packed head
]


def make_inputs(rows, d, vocabulary, dtype, device):
    generator = torch.Generator().manual_seed(rows * 1000003 + d * 1009 + vocabulary)
    hidden = torch.randn(rows, d, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, d, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    token_weight = torch.rand(rows, generator=generator)
    token_weight[::3] = 0.0
    return tuple(x.to(device) for x in (hidden, weight, targets, token_weight))


HAS_PACKED = this_machine().packed is not None


def ways(backend, weight):
    """`backend`, and beside the C++ pass the C++ head on a packed weight, where it takes that."""
    fits = HAS_PACKED and packed.why_unpacked([weight]) is None
    return ["cpu", "packed"] if backend == "cpu" and fits else [backend]


def on_cpu(out: HeadOutput) -> HeadOutput:
    fields = (out.loss, out.predicted, out.margin, out.grad_hidden)
    return HeadOutput(*(None if x is None else x.cpu() for x in fields))


def reference(hidden, weight, targets, token_weight, temperature):
    wide = [None if x is None else x.cpu().double() for x in (hidden, weight, token_weight)]
    return linear_cross_entropy_ref(wide[0], wide[1], targets.cpu(), wide[2], temperature)


def error(found, expected) -> float:
    same = found.double() == expected  # of infinities too: the margin of a vocabulary of one
    gap = (found.double() - expected).abs().masked_fill(same, 0.0)
    return gap.amax().item() if gap.numel() else 0.0


def assert_close_as_torch(out, plain, exact, dtype):
    """Errors at most three times those of plain torch, or of one rounding of the result."""
    for name, unit in (
        ("loss", torch.finfo(torch.float32).eps),
        ("margin", torch.finfo(torch.float32).eps),
        ("grad_hidden", torch.finfo(dtype).eps),
    ):
        found, torchs, wanted = (getattr(x, name) for x in (out, plain, exact))
        assert found.shape == torchs.shape and found.dtype == torchs.dtype
        finite = wanted[wanted.isfinite()].abs()
        floor = unit * max(1.0 if name != "grad_hidden" else 0.0, *finite.flatten().tolist(), 0.0)
        assert error(found, wanted) <= 3 * error(torchs, wanted) + floor, name


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_close_to_fp64_as_torch(backend, device, shape, dtype, temperature):
    inputs = make_inputs(*shape, dtype, device)
    exact = reference(*inputs, temperature)
    run = functools.partial(linear_cross_entropy, *inputs, temperature=temperature)
    plain = on_cpu(run(backend="torch"))
    logits = inputs[0].cpu().double() @ inputs[1].cpu().double().T
    for way in ways(backend, inputs[1]):
        # A workspace of four fp32 rows (eight of bf16) also takes the larger cases through chunks.
        out = on_cpu(run(backend=way, workspace_bytes=16 * shape[2]))
        assert_close_as_torch(out, plain, exact, dtype)
        chosen = logits.gather(1, out.predicted[:, None])[:, 0]
        if shape[0]:
            slack = 2 * torch.finfo(dtype).eps * logits.abs().amax()
            assert (logits.amax(dim=-1) - chosen <= slack).all()


def special_logits(dtype):
    """(rows, V) logits and targets where kernels go wrong: edges of rows, vectors and blocks."""
    vocabulary = 8211
    generator = torch.Generator().manual_seed(3)
    edges = [0, 1, 15, 16, 17, 63, 64, 2047, 2048, 2049, 4095, 4096, 8191, 8192, 8210]
    logits = torch.randn(2 * len(edges), vocabulary, generator=generator)
    targets = torch.tensor(edges + edges)
    # First half: the target wins by a lot. Second half: it loses to the next edge along.
    first, second = torch.arange(len(edges)), torch.arange(len(edges), 2 * len(edges))
    logits[first, targets[first]] = 20.0
    logits[second, targets[second]] = -3.0
    logits[second, torch.tensor(edges).roll(1)] = 9.0
    return logits.to(dtype), targets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_given_edges_of_rows_vectors_and_blocks(backend, device, dtype):
    logits, targets = special_logits(dtype)
    token_weight = torch.linspace(0.5, 2.0, len(targets))
    inputs = (logits.to(device), None, targets.to(device), token_weight.to(device))
    exact = reference(*inputs, 0.7)
    plain = on_cpu(linear_cross_entropy(*inputs, temperature=0.7, backend="torch"))
    out = on_cpu(linear_cross_entropy(*inputs, temperature=0.7, backend=backend))
    assert_close_as_torch(out, plain, exact, dtype)
    assert torch.equal(out.predicted, exact.predicted)
    assert torch.equal(out.margin, exact.margin.float())
    assert torch.equal(inputs[0].cpu(), logits), "the caller's logits were overwritten"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(monkeypatch, instruction_set, dtype):
    head = functools.partial(module._cpu.head, instruction_set=instruction_set)
    monkeypatch.setattr(module, "_cpu", types.SimpleNamespace(head=head))
    monkeypatch.setattr(sys.modules[__name__], "HAS_PACKED", False)  # of this pass alone
    test_logits_given_edges_of_rows_vectors_and_blocks("cpu", "cpu", dtype)
    for shape in SHAPES:
        test_is_as_close_to_fp64_as_torch("cpu", "cpu", shape, dtype, 0.5)


def test_no_exponential_is_a_denormal_number(monkeypatch, instruction_set):
    """An Intel processor takes some 150 cycles for a vector with one, and a mask hides many."""
    head = functools.partial(module._cpu.head, instruction_set=instruction_set)
    monkeypatch.setattr(module, "_cpu", types.SimpleNamespace(head=head))
    logits = torch.cat([torch.zeros(2), torch.linspace(-80.0, -120.0, 4001)])[None]
    out = linear_cross_entropy(logits, None, torch.zeros(1, dtype=torch.int64), backend="cpu")
    powers = 2 * out.grad_hidden[0, 2:].abs()  # two logits of 0 share the weight
    assert float(powers.max()) > 1e-36
    assert float(powers[powers > 0].min()) >= torch.finfo(torch.float32).tiny
    assert bool((powers[1000:] == 0).all())  # e⁻⁹⁰ is below 2⁻¹²⁶


def test_unknown_instruction_set_raises():
    if module._cpu is None:
        pytest.skip("the C++ kernels are not built")
    scores = dict.fromkeys(("loss", "margin"), torch.zeros(3))
    ids = dict.fromkeys(("targets", "predicted"), torch.zeros(3, dtype=torch.int64))
    tensors = views(logits=torch.zeros(3, 5), gradient=None, token_weight=None, **scores, **ids)
    with pytest.raises(ValueError, match="instruction_set: this processor does not have 'mmx'"):
        module._cpu.head(**tensors, temperature=1.0, threads=1, instruction_set="mmx")


def test_ties_go_to_the_lowest_id_and_have_margin_zero(backend, device):
    logits = torch.zeros(5, 40)
    logits[3, [7, 30]] = 2.0  # a pair above the rest; the target is the first, then the second
    logits[4, [7, 30]] = 2.0
    targets = torch.tensor([0, 20, 39, 7, 30])
    out = on_cpu(linear_cross_entropy(logits.to(device), None, targets.to(device), backend=backend))
    assert out.predicted.tolist() == [0, 0, 0, 7, 7]
    assert out.margin.tolist() == [0.0] * 5


def test_rows_of_weight_zero_have_no_gradient_but_a_loss(backend, device):
    hidden, weight, targets, token_weight = make_inputs(9, 8, 50, torch.float32, device)
    out = linear_cross_entropy(hidden, weight, targets, token_weight, backend=backend)
    zero = token_weight == 0
    assert zero.any() and (out.grad_hidden[zero] == 0).all()
    assert (out.grad_hidden[~zero].abs().amax(dim=1) > 0).all()
    ones = linear_cross_entropy(hidden, weight, targets, backend=backend)
    assert torch.equal(out.loss, ones.loss)
    torch.testing.assert_close(out.grad_hidden, ones.grad_hidden * token_weight[:, None])


def test_infinite_and_huge_logits(backend, device):
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    logits[0, 50:] = float("-inf")  # a vocabulary padded past its end
    logits[1] = float("-inf")
    logits[1, 99] = 4.0  # nothing but the target
    logits[2] *= 1e4
    logits[3] = -1e5
    targets = torch.tensor([3, 99, 10, 42])
    inputs = (logits.to(device), None, targets.to(device))
    exact = reference(*inputs, torch.ones(4), 1.0)
    out = on_cpu(linear_cross_entropy(*inputs, backend=backend))
    # Plain torch subtracts a logit of -1e5 from a log-sum-exp rounded to multiples of 2^-7.
    slack = 2.0**-7 if backend == "torch" else 1e-5
    torch.testing.assert_close(out.loss, exact.loss.float(), rtol=1e-6, atol=slack)
    torch.testing.assert_close(out.grad_hidden, exact.grad_hidden.float(), rtol=10 * slack, atol=0)
    torch.testing.assert_close(out.margin, exact.margin.float())
    assert torch.equal(out.predicted, exact.predicted)


def test_a_nan_among_the_logits_reaches_loss_and_gradient(backend, device):
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    logits[0, :2500] = float("nan")
    out = linear_cross_entropy(
        logits.to(device), None, torch.tensor([4000, 4000], device=device), backend=backend
    )
    assert out.loss.isnan().tolist() == [True, False]
    assert out.grad_hidden[0].isnan().any() and out.grad_hidden[1].isfinite().all()


def test_a_sure_target_keeps_its_digits(backend, device):
    if backend == "torch":
        pytest.skip("plain torch takes logsumexp minus logit and loses them")
    lead = torch.tensor([12.0, 20.0, 40.0], dtype=torch.float64)
    logits = torch.zeros(3, 1000)
    logits[:, 5] = lead
    targets = torch.full((3,), 5)
    out = on_cpu(linear_cross_entropy(logits.to(device), None, targets.to(device), backend=backend))
    others = 999 * torch.exp(-lead)  # over the target, in probability
    torch.testing.assert_close(out.loss.double(), torch.log1p(others), rtol=1e-5, atol=0.0)
    slope = -others / (1 + others)
    torch.testing.assert_close(out.grad_hidden[:, 5].double(), slope, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_do_not_change_the_result(backend, device, dtype):
    inputs = make_inputs(11, 32, 130, dtype, device)
    unit = 3 * torch.finfo(dtype).eps
    close = functools.partial(torch.testing.assert_close, rtol=unit, atol=8 * unit)
    for way in ways(backend, inputs[1]):
        whole = linear_cross_entropy(*inputs, backend=way)
        for workspace_bytes in (1, 130 * 4 * 4):
            parts = linear_cross_entropy(*inputs, backend=way, workspace_bytes=workspace_bytes)
            # Products of another height may be summed in another order, nothing else may differ.
            close(parts.loss, whole.loss)
            close(parts.grad_hidden, whole.grad_hidden)


needs_packed_head = pytest.mark.skipif(not HAS_PACKED, reason="no products of bf16 pairs here")


@needs_packed_head
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_packed_head_where_a_later_chunk_leads_or_equals(temperature):
    """The same logits by a product with the unit matrix, so that every special one is met there."""
    logits, targets = special_logits(torch.bfloat16)
    logits, targets = logits[:, :-1], targets.clamp(max=logits.shape[1] - 2)
    logits[0, [3000, 8000]] = 20.0  # as the target at 0, which is the first of three
    logits[20, [3000, 8000]] = 9.0
    logits[21] = -300.0 * torch.arange(logits.shape[1]).flip(0).bfloat16() / 8192  # ever larger
    hidden, weight = torch.eye(len(logits), dtype=torch.bfloat16), logits.T.contiguous()
    token_weight = torch.linspace(0.0, 2.0, len(targets))
    inputs = (hidden, weight, targets, token_weight)
    run = functools.partial(linear_cross_entropy, *inputs, temperature=temperature)
    out, exact = run(backend="packed"), reference(*inputs, temperature)
    assert_close_as_torch(out, run(backend="torch"), exact, torch.bfloat16)
    first_of_the_largest = logits.double().argmax(-1)
    assert torch.equal(out.predicted, first_of_the_largest)
    assert torch.equal(out.predicted, run(backend="packed", need_grad=False).predicted)


@needs_packed_head
def test_a_row_of_the_packed_head_is_its_own_and_follows_its_weight():
    hidden, weight, targets, _ = make_inputs(70, 32, 130, torch.bfloat16, "cpu")
    held = len(packed._packed)
    run = functools.partial(linear_cross_entropy, backend="packed")
    whole = run(hidden, weight, targets)
    assert len(packed._packed) == held + 1
    for part in (slice(0, 1), slice(5, 13)):
        alone = run(hidden[part], weight, targets[part])
        for name in ("loss", "predicted", "margin", "grad_hidden"):
            assert torch.equal(getattr(alone, name), getattr(whole, name)[part])
    weight.mul_(2)
    doubled = run(hidden, weight, targets)
    fresh = run(hidden, weight.clone(), targets)
    assert torch.equal(doubled.loss, fresh.loss) and not torch.equal(doubled.loss, whole.loss)
    assert torch.equal(doubled.grad_hidden, fresh.grad_hidden)
    del weight
    assert len(packed._packed) == held


def test_same_bits_again_and_with_another_number_of_threads(backend, device):
    logits, targets = special_logits(torch.float32)
    inputs = (logits.to(device), None, targets.to(device))
    first = linear_cross_entropy(*inputs, backend=backend)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if backend == "torch" else threads + 2)
    try:
        again = linear_cross_entropy(*inputs, backend=backend)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.grad_hidden, again.grad_hidden)


class Allocations(TorchDispatchMode):
    """The bytes of every tensor that an operation made, rather than got."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.sizes.append(x.untyped_storage().nbytes())
        return result


def test_frozen_weight_gets_no_gradient_and_the_workspace_is_bounded(backend, device):
    hidden, weight, targets, _ = make_inputs(12, 48, 400, torch.float32, device)
    hidden.requires_grad_()
    weight.requires_grad_()
    workspace_bytes = 5 * 400 * 4
    with Allocations() as made:
        out = linear_cross_entropy(
            hidden, weight, targets, workspace_bytes=workspace_bytes, backend=backend
        )
    assert weight.grad is None and hidden.grad is None and not out.grad_hidden.requires_grad
    assert max(made.sizes) <= workspace_bytes < weight.numel() * 4


@pytest.mark.parametrize("given", [True, False], ids=["logits", "hidden"])
def test_without_gradient(backend, device, given):
    hidden, weight, targets, _ = make_inputs(6, 40, 40, torch.float32, device)
    before = hidden.clone()
    weight = None if given else weight
    with_grad = linear_cross_entropy(hidden, weight, targets, backend=backend)
    without = linear_cross_entropy(hidden, weight, targets, need_grad=False, backend=backend)
    assert without.grad_hidden is None
    assert torch.equal(without.loss, with_grad.loss)
    assert torch.equal(without.margin, with_grad.margin)
    assert torch.equal(hidden, before)


def test_strided_inputs(backend, device):
    hidden, weight, targets, token_weight = make_inputs(12, 16, 30, torch.float32, device)
    expected = linear_cross_entropy(hidden, weight, targets, token_weight, backend=backend)

    def spread(x):  # the same values, every second element of a wider tensor
        return torch.stack([x, x], dim=-1)[..., 0]

    out = linear_cross_entropy(
        spread(hidden), spread(weight), spread(targets), spread(token_weight), backend=backend
    )
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.grad_hidden, expected.grad_hidden)


@pytest.mark.parametrize("target", [-1, -100, 30, 1 << 40])
def test_a_target_outside_the_vocabulary(backend, device, target):
    hidden, weight, targets, _ = make_inputs(3, 8, 30, torch.float32, device)
    targets[1] = target
    if backend == "triton":
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend).loss
        assert loss.isnan().tolist() == [False, True, False]
    elif device == "cuda":
        pytest.skip("ends its process: tests/cuda has it in one of its own")
    else:
        with pytest.raises((ValueError, RuntimeError)):
            linear_cross_entropy(hidden, weight, targets, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature: must be positive, saw 0.0"),
        ({"temperature": float("nan")}, "temperature: must be positive"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "hidden: must be"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets: must be int64"),
        ({"weight": torch.zeros(30, 9)}, "weight: must be"),
        ({"weight": torch.zeros(30, 8, dtype=torch.bfloat16)}, "weight: must have hidden's dtype"),
        ({"token_weight": torch.zeros(1)}, "token_weight: must be"),
        ({"backend": "cuda"}, "backend: 'cuda' is not one of"),
        ({"backend": "packed"}, "weight: backend 'packed' cannot take it, a weight is float32"),
        ({"backend": "packed", "weight": None}, "'packed' cannot take it, hidden holds logits"),
    ],
)
def test_a_users_mistake_is_named(change, message):
    names = ("hidden", "weight", "targets", "token_weight")
    arguments = dict(zip(names, make_inputs(3, 8, 30, torch.float32, "cpu"), strict=True))
    if change.get("backend") == "packed":
        message = re.escape(unavailable("cpu", "cpu") or message)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, "backend": "torch", **change})


def test_a_dtype_without_a_kernel():
    hidden, weight, targets, _ = make_inputs(3, 8, 30, torch.float64, "cpu")
    out = linear_cross_entropy(hidden, weight, targets, backend="torch")
    assert out.grad_hidden.dtype == torch.float64
    if module._cpu is not None:
        with pytest.raises(ValueError, match="backend: 'cpu' does not take tensors of"):
            linear_cross_entropy(hidden, weight, targets, backend="cpu")


def test_the_definition_has_the_gradient_of_its_loss():
    hidden, weight, targets, token_weight = make_inputs(4, 6, 11, torch.float64, "cpu")
    token_weight = token_weight.double()
    grad = linear_cross_entropy_ref(hidden, weight, targets, token_weight, 0.6).grad_hidden
    step = 1e-6
    for row, column in ((0, 0), (1, 5), (2, 3), (3, 2)):
        moved = hidden.clone()
        moved[row, column] += step
        up = linear_cross_entropy_ref(moved, weight, targets, token_weight, 0.6).loss
        moved[row, column] -= 2 * step
        down = linear_cross_entropy_ref(moved, weight, targets, token_weight, 0.6).loss
        slope = ((up - down) * token_weight).sum() / (2 * step)
        torch.testing.assert_close(grad[row, column], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("rows", "size", "vocabulary", "chunk"),
    [
        (32768, 768, 50304, 5504),  # Pythia-160M, 256 × 128: 129 tiles, one wave of 132
        (16384, 2048, 128256, 2048),  # Llama-3.2-1B, 64 × 256: 128 tiles
        (4096, 4096, 128256, 1024),  # Llama-3.1-8B, 16 × 256: 128 tiles
        (8192, 576, 49152, 4864),  # SmolLM2-135M, 512 × 16: 190 and 130 half tiles, three waves
        (100, 768, 50304, 100),
        (1, 768, 50304, 1),
    ],
)
def test_chunks_on_a_gpu_fill_its_processors(rows, size, vocabulary, chunk):
    pytest.importorskip("triton")
    from prototok_kernels.head_triton import whole_waves

    largest = (1 << 30) // (2 * vocabulary)
    assert whole_waves(rows, size, largest, 132) == chunk
    # At most the room there is, and never nothing.
    assert whole_waves(rows, size, 7, 132) <= 7
    assert whole_waves(rows, size, 1, 132) == 1
