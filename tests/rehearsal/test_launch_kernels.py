"""What ncu and compute-sanitizer see: every kernel of ours, and few enough launches to profile."""

from __future__ import annotations

from collections import Counter

import launch_kernels
import pytest
import torch

from prototok_kernels.plan import plan_of
from rehearsal import DEVICE, rehearsal


@pytest.mark.parametrize("size", launch_kernels.SIZES)
def test_every_kernel_is_launched(size, monkeypatch):
    def plan(*args, **options):
        return plan_of(*args, **options | {"device": "cuda"})

    monkeypatch.setattr(launch_kernels, "plan_of", plan)
    with rehearsal() as seen:
        for launch in dict.fromkeys(launch_kernels.KERNELS.values()):
            launch(launch_kernels.SIZES[size], DEVICE, torch.bfloat16)
    launched = Counter(one.name for one in seen.launches if one.kind == "triton")
    assert set(launched) == set(launch_kernels.KERNELS)
    assert size != "real" or launched.total() <= 60, launched
