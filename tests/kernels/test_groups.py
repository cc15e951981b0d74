"""Sums of the rows of each group. Letters: R rows, G groups."""

from __future__ import annotations

import pytest
import torch

from prototok_kernels.groups import _OfGroup, of_group, sum_by_group

GROUP = torch.tensor([0, 0, 1, 1, 1, 3, 3, 0])  # the last as a free place of the slots is


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_is_index_add(dtype, shape):
    rows = torch.randn(len(GROUP), *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = torch.zeros(4, *shape, dtype=torch.float64).index_add(0, GROUP, rows.double())
    found = sum_by_group(rows, GROUP, 4)
    assert found.dtype == dtype and found[2].eq(0).all()
    # Rounded once: in bfloat16 no sum of several roundings.
    torch.testing.assert_close(found.double(), wanted.to(dtype).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_group(wrong):
    rows = torch.ones(len(GROUP), 3)
    rows[3, 1] = wrong
    found = sum_by_group(rows, GROUP, 4)
    assert found.isfinite().sum() == 11 and not found[1, 1].isfinite()
    assert found[0].tolist() == [3, 3, 3] and found[3].tolist() == [2, 2, 2]


def test_gradient():
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _OfGroup.apply(x, GROUP), x)
    assert torch.equal(of_group(x, GROUP), x[GROUP])
