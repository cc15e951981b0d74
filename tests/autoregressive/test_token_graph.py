"""The KV-cached decoder through its graph, on stand-ins for torch.cuda, and by its own kernels."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from torch import Tensor

import prototok
from fake_cuda import FakeCuda, fake_cuda  # noqa: F401
from prototok import FrozenLM, Recipe, autoregressive
from prototok.autoregressive import generate, static_kv
from prototok.autoregressive.static_kv import StaticDecoder
from prototok.model.prefix import Prefix
from prototok_kernels import normed_products
from prototok_kernels.backend import unavailable
from support import small_llama
from zoo import OWN, made

MODULE = sys.modules["prototok.autoregressive.generate"]  # the package shows the function


def loaded(name: str = "llama, grouped, tied", dtype: str = "float32") -> FrozenLM:
    return prototok.load(made(OWN[name]), device="cpu", dtype=dtype)


def vectors(lm: FrozenLM, rows: int, k: int = 2, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, k, lm.hidden_size, generator=generator)


def decoder_of(lm: FrozenLM, rows: int, backend: str, capacity: int = 64) -> StaticDecoder:
    return StaticDecoder(lm.body, lm, rows, capacity, lm.plan(rows, 1, backend))


@pytest.mark.parametrize("name", ["llama, grouped, tied", "gpt-neox, parallel", "qwen3, tied"])
def test_replays_are_the_eager_decoder_bit_for_bit(name, fake_cuda, monkeypatch):  # noqa: F811
    lm = loaded(name, "bfloat16")
    calls = [
        {"mem": vectors(lm, 2), "length": 12},
        {"mem": vectors(lm, 2, seed=4), "length": 30},
        {"mem": vectors(lm, 2, k=1, seed=5), "length": 7, "first": torch.tensor([3, 8])},
        {"mem": vectors(lm, 2), "length": 1},
        {"mem": vectors(lm, 2), "length": 1, "first": torch.tensor([3, 8])},
    ]
    captured = decoder_of(lm, 2, "torch")
    replayed = [captured.generate(**call) for call in calls]
    (graph,) = fake_cuda.graphs
    assert graph.replays == 12 + 30 + 6 + 1 and graph.stream.priority == -1
    assert len(fake_cuda.current) == 1
    cache = captured.caches[0].keys[:, :, :16].clone()
    monkeypatch.setattr(static_kv, "on_cuda", lambda device: False)
    eager = decoder_of(lm, 2, "torch")
    for call, ids in zip(calls, replayed, strict=True):
        assert torch.equal(eager.generate(**call), ids)
    assert torch.equal(eager.caches[0].keys[:, :, :16], cache)  # nothing but what was decoded


def test_few_decoders_are_kept_and_one_model_does_not_outlive_itself(fake_cuda):  # noqa: F811
    lm = prototok.load(small_llama(max_position_embeddings=600), device="cpu", dtype="float64")

    def graphs_for(lm: FrozenLM, *lengths: int) -> int:
        before = len(fake_cuda.graphs)
        for length in lengths:
            generate(lm, vectors(lm, 1), length)
        return len(fake_cuda.graphs) - before

    assert graphs_for(lm, 3, 100, 5, 101, 60) == 2  # room for 64 and 128 positions
    assert graphs_for(lm, 3, 100, 150, 200) == 2
    # Four are kept: the largest takes the place of the first, which takes that of the second.
    assert graphs_for(lm, 300, 150, 200) == 1 and graphs_for(lm, 3, 300, 100) == 2
    tracked = [weakref.ref(graph) for graph in fake_cuda.graphs]
    fake_cuda.graphs.clear()
    gc.collect()
    assert sum(graph() is not None for graph in tracked) == MODULE._DECODERS
    del lm
    gc.collect()
    assert all(graph() is None for graph in tracked)


def test_large_caches_are_not_kept_beside_each_other(monkeypatch):
    lm = prototok.load(small_llama(), device="cpu", dtype="float64")
    monkeypatch.setattr(MODULE, "_CACHES", 1 << 16)
    for rows in (1, 2, 64):
        generate(lm, vectors(lm, rows), 3)
    (largest,) = MODULE._decoders.of[lm].values()
    assert largest.cache_bytes > 1 << 16 and len(largest.stream.x) == 64


def test_a_fit_of_mem_is_verified_by_graphs(fake_cuda, monkeypatch):  # noqa: F811
    lm = prototok.load(small_llama(), device="cpu", dtype="float32")
    ids = torch.randint(97, (5, 3), generator=torch.Generator().manual_seed(0))
    options = {
        "recipe": Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=30), "progress": False,
        "backend": "torch",
    }  # fmt: skip
    found = autoregressive.fit(lm, ids, **options)
    # One for tokens, one for the margins with the text given.
    assert len(fake_cuda.graphs) == 2 and all(graph.replays for graph in fake_cuda.graphs)
    monkeypatch.undo()
    wanted = autoregressive.fit(lm, ids, **options)
    for name in ("accuracy", "margin", "steps"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


KERNELS = pytest.mark.skipif(
    unavailable("triton", "cpu") is not None, reason="Triton's kernels are not interpreted here"
)


def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the interpreter is quick."""
    for name, value in (("_PROGRAMS", 1), ("_MOST_OUTPUTS", 128)):
        monkeypatch.setattr(normed_products, name, value)


@KERNELS
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("mistral, window shorter than the text", 2), ("gpt-neox, parallel", 1),
        ("gpt-neox, full rotary, tied, no attention bias", 5),
    ],
)  # fmt: skip
def test_the_kernels_decode_what_torch_does(name, rows, monkeypatch):
    """Few rows by few launches, and more of them by torch's products around the same attention."""
    few_programs(monkeypatch)
    lm = loaded(name)
    mem = vectors(lm, rows, k=5 if "window" in name else 1)
    decoder = decoder_of(lm, rows, "triton")
    assert decoder.fused == (rows <= 4)
    wanted = decoder_of(lm, rows, "torch")
    assert torch.equal(decoder.generate(mem, 3), wanted.generate(mem, 3))
    for ours, theirs in zip(decoder.caches, wanted.caches, strict=True):
        for part in ("keys", "values"):
            torch.testing.assert_close(getattr(ours, part), getattr(theirs, part))
    assert decoder.stream.position.tolist() == [mem.shape[1] + 3 - 1] * rows


@KERNELS
def test_the_kernels_decode_behind_a_prefix(monkeypatch):
    few_programs(monkeypatch)
    bare = loaded()
    lm = bare.behind(Prefix(bare.embed(torch.tensor([5, 6, 7]))))
    mem = vectors(lm, 1)
    found = decoder_of(lm, 1, "triton").generate(mem, 3)
    assert torch.equal(found, decoder_of(lm, 1, "torch").generate(mem, 3))
