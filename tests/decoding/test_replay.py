"""Forwards that come again as CUDA graphs, with stand-ins for torch.cuda."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

import prototok
from fake_cuda import FakeCuda, fake_cuda  # noqa: F401
from prototok import FrozenLM, Recipe, decode
from prototok.common.recent import Recent
from prototok.common.urgent import _stream, urgent
from prototok.decoding.decode import decode_ids, decode_vectors
from prototok.decoding.replay import _EAGER, _SHAPES
from prototok.results.arrangement import Arrangement
from support import small_llama

PAIR = Arrangement.parse("e m*")


@pytest.fixture
def lm() -> FrozenLM:
    return prototok.load(small_llama(), device="cpu", dtype="float32")


def vectors(lm: FrozenLM, seed: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, 2, lm.hidden_size, generator=generator)


def eager(lm: FrozenLM, *args: int) -> torch.Tensor:
    """The ids that the model gives by its logits."""
    return lm.logits(vectors(lm, *args)[:, PAIR.layout(9)], "torch").argmax(-1)


def test_replays_are_the_eager_forward_bit_for_bit(lm, fake_cuda, monkeypatch):  # noqa: F811
    """With and without targets, of one row and of two, in turns."""

    def decoded() -> list[torch.Tensor]:
        found = []
        for seed in range(_EAGER + 3):
            for rows in (1, 2):
                generator = torch.Generator().manual_seed(seed)
                targets = torch.randint(97, (rows, 9), generator=generator)
                given = vectors(lm, seed, rows)
                for wanted in (targets, None):
                    found += vars(decode_vectors(lm, given, PAIR, 9, wanted, "torch")).values()
                found.append(decode_ids(lm, given, PAIR, 9, "torch"))
        return found

    found = decoded()
    assert [graph.replays for graph in fake_cuda.graphs] == [3] * 6
    # In front of the steps that are queued, and all in one memory.
    assert all(graph.stream.priority == -1 for graph in fake_cuda.graphs)
    assert len({id(graph.memory) for graph in fake_cuda.graphs}) == 1
    assert len(fake_cuda.current) == 1
    monkeypatch.setattr("prototok.decoding.replay.on_cuda", lambda device: False)
    wanted = decoded()
    assert len(fake_cuda.graphs) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(wanted[6], eager(lm, 0)) and not torch.equal(wanted[6], wanted[20])


def test_results_of_one_call_outlive_the_next(lm, fake_cuda):  # noqa: F811
    for _ in range(_EAGER + 1):
        first = decode_ids(lm, vectors(lm, 0), PAIR, 9, "torch")
    kept = first.clone()
    assert not torch.equal(decode_ids(lm, vectors(lm, 5), PAIR, 9, "torch"), kept)
    assert fake_cuda.graphs[0].replays == 2 and torch.equal(first, kept)


def test_few_graphs_are_kept(lm, fake_cuda):  # noqa: F811
    tracked = []
    for length in range(1, _SHAPES + 3):
        for _ in range(_EAGER + 1):
            decode_ids(lm, vectors(lm, 0), PAIR, length, "torch")
        tracked.append(weakref.ref(fake_cuda.graphs.pop()))
    gc.collect()
    alive = [graph() is not None for graph in tracked]
    assert alive == [False] * 2 + [True] * _SHAPES
    # More shapes in turns than are remembered: none of them comes often enough.
    for _ in range(2 * _EAGER):
        for length in range(20, 21 + _SHAPES):
            decode_ids(lm, vectors(lm, 0), PAIR, length, "torch")
    assert not fake_cuda.graphs


def test_a_model_is_let_go_with_its_graphs(fake_cuda):  # noqa: F811
    lm = prototok.load(small_llama(), device="cpu", dtype="float32")
    for _ in range(_EAGER + 1):
        decode_ids(lm, vectors(lm, 0), PAIR, 9, "torch")
    gone, graph = weakref.ref(lm), weakref.ref(fake_cuda.graphs.pop())
    del lm
    gc.collect()
    assert gone() is None and graph() is None


def test_a_capture_that_fails_is_said_once_and_not_tried_again(lm, fake_cuda):  # noqa: F811
    for _ in range(_EAGER + 1):
        decode_ids(lm, vectors(lm, 0), PAIR, 4, "torch")
    lost = weakref.ref(fake_cuda.graphs.pop())
    wanted = eager(lm, 1)
    fake_cuda.refuses = torch.OutOfMemoryError("CUDA out of memory.\nand so on")
    for _ in range(_EAGER):
        decode_ids(lm, vectors(lm, 1), PAIR, 9, "torch")
    with pytest.warns(UserWarning, match=r"without a CUDA graph, slower \(CUDA out of memory\.\)"):
        assert torch.equal(decode_ids(lm, vectors(lm, 1), PAIR, 9, "torch"), wanted)
    gc.collect()
    assert lost() is None  # its memory is free
    fake_cuda.refuses = None
    for _ in range(_EAGER + 1):
        assert torch.equal(decode_ids(lm, vectors(lm, 1), PAIR, 9, "torch"), wanted)
    assert not fake_cuda.graphs


def test_rotary_tables_stay_while_a_graph_reads_them(lm, fake_cuda):  # noqa: F811
    for _ in range(_EAGER + 1):
        wanted = decode_ids(lm, vectors(lm, 0), PAIR, 9, "torch")
    table = weakref.ref(lm.body.rotary(0)[0].untyped_storage())
    lm.body.rotary(1000)
    gc.collect()
    assert table() is not None
    assert torch.equal(decode_ids(lm, vectors(lm, 0), PAIR, 9, "torch"), wanted)


def test_a_fit_is_verified_by_graphs(lm, fake_cuda, monkeypatch):  # noqa: F811
    ids = torch.randint(97, (6, 2), generator=torch.Generator().manual_seed(0))
    options = {
        "recipe": Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=60), "backend": "torch",
        "progress": False,
    }  # fmt: skip
    found = prototok.fast_fit(lm, ids, **options)
    assert fake_cuda.graphs and fake_cuda.graphs[0].replays >= 2
    monkeypatch.undo()
    wanted = prototok.fast_fit(lm, ids, **options)
    for name in ("accuracy", "margin", "loss", "steps"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    assert torch.equal(decode(lm, found, backend="torch"), decode(lm, wanted, backend="torch"))


def test_a_model_of_transformers_is_not_captured(fake_cuda):  # noqa: F811
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2)
    lm = prototok.load(GPT2LMHeadModel(config).eval(), device="cpu", dtype="float32")
    for _ in range(_EAGER + 2):
        decode_ids(lm, vectors(lm, 0), PAIR, 5, "torch")
    assert not fake_cuda.graphs


def test_urgent_work_has_a_stream_for_each_thread_and_no_second_inside(fake_cuda):  # noqa: F811
    device = torch.device("cuda")
    with urgent(device):
        outer = fake_cuda.current[-1]
        with urgent(device):
            assert fake_cuda.current[-1] is outer and len(fake_cuda.current) == 2
        assert outer.priority == -1 and outer.waited == fake_cuda.current[:1]
    others: list[object] = []
    thread = threading.Thread(target=lambda: others.append(_stream(device)))
    thread.start()
    thread.join()
    assert others[0] is not outer and _stream(device) is outer


def test_recent_lets_go_of_the_least_recently_used():
    kept: Recent[list[int]] = Recent(3, bytes=10, size_of=len)
    made: list[int] = []

    def get(key: int, size: int = 1) -> None:
        def make() -> list[int]:
            made.append(key)
            return [0] * size

        kept.get(key, make)

    for key in (1, 2, 3, 1, 4, 1, 2):
        get(key)
    assert made == [1, 2, 3, 4, 2]  # 2 was let go for 4, and 3 for 2
    get(5, size=9)  # leaves room for one beside it
    assert [len(value) for value in kept.values()] == [1, 9]
    get(6, size=50)
    assert [len(value) for value in kept.values()] == [50]
    get(6)
    assert made[-1] == 6 and len(kept.values()) == 1
