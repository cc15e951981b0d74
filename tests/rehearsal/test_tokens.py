"""A token of the KV-cached decoder, and one forward to decode, as CUDA would run them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from rehearse import GPUS
from rehearsed_tokens import token

from prototok.autoregressive.static_kv import StaticDecoder
from prototok.autoregressive.verify import _margins
from prototok.decoding import decode, replay
from prototok.results.arrangement import Arrangement
from prototok_kernels.plan import FEW_ROWS_ON_CUDA
from rehearsal import DEVICE, frozen, rehearsal
from zoo import OWN

NORM = "_residual_norm_kernel"


@pytest.mark.parametrize(
    ("shape", "launches", "a_layer", "milliseconds", "share"),
    [
        ("pythia-160m", 39, 3, 0.13, 0.5),
        ("llama-3.2-1b", 83, 5, 0.79, 0.8),
        ("llama-3.1-8b", 163, 5, 4.25, 0.9),
    ],
)
def test_a_token_stays_within_its_budget(shape, launches, a_layer, milliseconds, share):
    one, gpu = token(shape, 1), GPUS[0]
    assert len(one.launches) <= launches and one.a_layer <= a_layer <= 7
    assert 1e3 * sum(map(gpu.seconds, one.launches)) <= milliseconds
    assert one.of_roofline(gpu.seconds, gpu.bandwidth) >= share
    # It reads the weights once, and little else.
    assert one.least < one.bytes < 1.05 * one.least


@pytest.mark.parametrize("shape", ["pythia-160m", "llama-3.2-1b"])
def test_launches_are_early_where_the_device_can(shape):
    """All but the last norm's, which reads nothing that could be read before."""
    for capability, can in ((80, False), (90, True)):
        compiled = token(shape, 1, capability=capability).compilations
        early = {c.name for c in compiled if ("launch_pdl", True) in c.options}
        waits = {c.name for c in compiled if ("EARLY", True) in c.constants}
        assert early == waits == ({c.name for c in compiled} - {NORM} if can else set())


@pytest.mark.parametrize("rows", [1, FEW_ROWS_ON_CUDA, FEW_ROWS_ON_CUDA + 1])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_a_token_of_every_family_waits_for_nothing(name, prefix, rows):
    with rehearsal() as seen:
        lm = frozen(OWN[name], prefix)
        decoder = StaticDecoder(lm.body, lm, rows, 64, lm.plan(rows, 1))
        seen.launches.clear()
        seen.copied.clear()
        decoder._next()
    assert seen.copied == [] and seen.sent == 0
    blocks = len(lm.body.layers)
    launched = Counter(one.name for one in seen.launches)
    assert launched["_cached_attention_kernel"] == blocks and launched["_next_token_kernel"] == 1
    if rows <= FEW_ROWS_ON_CUDA:
        assert len(seen.launches) <= 5 * blocks + 3
        assert {one.kind for one in seen.launches} == {"triton"}
    else:
        assert "_normed_product_kernel" not in launched and launched["mm"] > 0


@pytest.mark.parametrize("name", ["llama, grouped, tied", "gpt-neox, parallel"])
@torch.no_grad()
def test_one_forward_to_decode_waits_for_nothing(name, monkeypatch):
    """Everything between the copies of what is given and of the results can be captured."""
    seen = []

    def run(lm, key, compute, fixed, given):
        inputs = [tensor.to(DEVICE) for tensor in (*fixed, *given)]
        now.launches.clear()
        now.copied.clear()
        results = compute(*inputs)
        assert now.copied == [] and all(result.device == DEVICE for result in results)
        seen.append((key, len(now.launches)))
        return results

    for module in (decode, replay):
        monkeypatch.setattr(module, "on_the_host", run)
    monkeypatch.setattr("prototok.autoregressive.verify.on_the_host", run)
    with rehearsal() as now:
        lm = frozen(OWN[name])
        vectors = torch.zeros(1, 2, lm.hidden_size, device="cpu")
        targets = torch.zeros(1, 9, dtype=torch.int64, device="cpu")
        arrangement = Arrangement.parse("e m*")
        decode.decode_vectors(lm, vectors, arrangement, 9, targets, "auto")
        decode.decode_vectors(lm, vectors, arrangement, 9, None, "auto")
        decode.decode_ids(lm, vectors, arrangement, 9, "auto")
        _margins(lm, targets[0], vectors[0], "auto")
    keys = [key for key, _ in seen]
    assert len(set(keys)) == 4 and all(launches > 10 for _, launches in seen)
