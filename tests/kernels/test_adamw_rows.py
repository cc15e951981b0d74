"""Letters: R rows, D coordinates a row."""

from __future__ import annotations

import functools
import types

import pytest
import torch

from prototok_kernels import adamw_rows as module
from prototok_kernels.adamw_rows import AdamWSettings, AdamWState, adamw_rows_

SETTINGS = AdamWSettings(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
STEPS = 50


def make_run(rows, coordinates, device):
    generator = torch.Generator().manual_seed(rows * 101 + coordinates)
    start = torch.randn(rows, coordinates, generator=generator)
    # Gradients of very different sizes, so that eps and the bias corrections both matter.
    size = 10.0 ** torch.randint(-9, 2, (coordinates,), generator=generator)
    grads = torch.randn(STEPS, rows, coordinates, generator=generator) * size
    lr = torch.rand(rows, generator=generator) * 0.1
    return start.to(device), grads.to(device), lr.to(device)


def torch_adamw(start, grads, lr, dtype):
    """torch.optim.AdamW, one parameter a row because it has one learning rate a group."""
    rows = [row.clone().to(dtype).requires_grad_() for row in start]
    groups = [{"params": [row], "lr": float(rate)} for row, rate in zip(rows, lr, strict=True)]
    optimizer = torch.optim.AdamW(
        groups,
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
        foreach=False,
    )
    for grad in grads:
        for row, row_grad in zip(rows, grad, strict=True):
            row.grad = row_grad.to(dtype)
        optimizer.step()
    return torch.stack([row.detach() for row in rows])


@pytest.mark.parametrize("coordinates", [1, 1025])
def test_equals_torch_optim_adamw(backend, device, coordinates):
    start, grads, lr = make_run(3, coordinates, device)
    param, state = start.clone(), AdamWState.zeros(start)
    active = torch.ones(3, dtype=torch.bool, device=device)
    for grad in grads:
        adamw_rows_(param, grad, state, lr, active, SETTINGS, backend=backend)
    exact = torch_adamw(start, grads, lr, torch.float64)
    torchs_error = (torch_adamw(start, grads, lr, torch.float32) - exact).abs().amax()
    floor = torch.finfo(torch.float32).eps * exact.abs().amax()
    assert (param - exact).abs().amax() <= 3 * torchs_error + floor
    assert state.step.tolist() == [STEPS] * 3


def test_every_instruction_set(monkeypatch, instruction_set):
    adamw = functools.partial(module._cpu.adamw, instruction_set=instruction_set)
    monkeypatch.setattr(module, "_cpu", types.SimpleNamespace(adamw=adamw))
    for coordinates in (1, 17, 1025):
        test_equals_torch_optim_adamw("cpu", "cpu", coordinates)


def test_inactive_rows_keep_every_bit(backend, device):
    start, grads, lr = make_run(4, 33, device)
    param, state = start.clone(), AdamWState.zeros(start)
    active = torch.tensor([True, False, True, False], device=device)
    everyone = torch.ones_like(active)
    adamw_rows_(param, grads[0], state, lr, everyone, SETTINGS, backend=backend)
    param[1, 0], state.exp_avg[1, 1] = -0.0, float("nan")  # bits that arithmetic would not keep
    before = [x.clone() for x in (param, state.exp_avg, state.exp_avg_sq, state.step)]
    poisoned = grads[1].clone()
    poisoned[~active] = float("nan")
    adamw_rows_(param, poisoned, state, lr, active, SETTINGS, backend=backend)
    after = (param, state.exp_avg, state.exp_avg_sq, state.step)
    for old, new in zip(before, after, strict=True):
        old_bits, new_bits = (x[~active].cpu().numpy().tobytes() for x in (old, new))
        assert old_bits == new_bits
        assert (old[active] != new[active]).any() and new[active].isfinite().all()


def test_a_late_row_has_its_own_clock(backend, device):
    start, grads, lr = make_run(2, 20, device)
    param, state = start.clone(), AdamWState.zeros(start)
    for i, grad in enumerate(grads):
        active = torch.tensor([True, i >= 30], device=device)
        adamw_rows_(param, grad, state, lr, active, SETTINGS, backend=backend)
    assert state.step.tolist() == [STEPS, STEPS - 30]
    alone = torch_adamw(start[1:], grads[30:, 1:], lr[1:], torch.float32)
    torch.testing.assert_close(param[1:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_nothing_to_update(backend, device, shape):
    param = torch.zeros(shape, device=device)
    state = AdamWState.zeros(param)
    active = torch.ones(shape[0], dtype=torch.bool, device=device)
    lr = torch.ones(shape[0], device=device)
    adamw_rows_(param, torch.zeros_like(param), state, lr, active, SETTINGS, backend=backend)
    assert state.step.tolist() == [1] * shape[0]


def test_strided_gradient_and_many_rows(backend, device):
    rows = 12 if backend == "triton" else 300  # enough for the C++ to hand some to other threads
    start, grads, _ = make_run(rows, 130, device)
    lr = torch.full((2 * rows,), 0.01, device=device)[::2]
    active = torch.arange(rows, device=device) % 3 > 0
    results = []
    for name in ("torch", backend):
        param, state = start.clone(), AdamWState.zeros(start)
        grad = grads[0].T.contiguous().T
        adamw_rows_(param, grad, state, lr, active, SETTINGS, backend=name)
        results.append(param)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    assert torch.equal(results[1][~active], start[~active])


def test_rows_that_no_kernel_takes():
    wide = torch.randn(3, 8)
    state = AdamWState.zeros(wide[:, ::2].contiguous())
    lr, active = torch.full((3,), 0.1), torch.ones(3, dtype=torch.bool)
    before = wide.clone()
    adamw_rows_(wide[:, ::2], torch.ones(3, 4), state, lr, active, SETTINGS, backend="torch")
    assert (wide[:, ::2] != before[:, ::2]).all() and torch.equal(wide[:, 1::2], before[:, 1::2])
    if module._cpu is not None:
        with pytest.raises(ValueError, match="param: backend 'cpu' needs contiguous fp32 rows"):
            adamw_rows_(wide[:, ::2], torch.ones(3, 4), state, lr, active, SETTINGS, backend="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(3, 5)}, "grad: must be"),
        ({"lr": torch.zeros(())}, "lr: must be"),
        ({"active": torch.ones(3)}, "active: must be bool"),
        ({"active": torch.ones(2, dtype=torch.bool)}, "active: must be"),
        ({"param": torch.zeros(12)}, "param: must be"),
        ({"backend": "gpu"}, "backend: 'gpu' is not one of"),
    ],
)
def test_a_users_mistake_is_named(change, message):
    param = torch.zeros(3, 4)
    arguments = {
        "param": param,
        "grad": torch.zeros(3, 4),
        "state": AdamWState.zeros(param),
        "lr": torch.zeros(3),
        "active": torch.ones(3, dtype=torch.bool),
        "settings": SETTINGS,
        "backend": "torch",
    }
    with pytest.raises(ValueError, match=message):
        adamw_rows_(**{**arguments, **change})
