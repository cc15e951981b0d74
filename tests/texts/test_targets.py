"""Texts and counts as users have them: columns of pandas, numpy and Arrow, numbers of numpy."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

import prototok
from prototok import FrozenLM, Recipe
from prototok.texts.targets import targets_of


def columns() -> list:
    pandas = pytest.importorskip("pandas")
    return [
        pandas.Series(["a b", "c d"]), pandas.Series(["a b", "c d"], index=[7, 3]),
        pa.array(["a b", "c d"]), pa.chunked_array([["a b"], ["c d"]]),
        np.array(["a b", "c d"]), np.array(["a b", "c d"], dtype=object), ("a b", "c d"),
    ]  # fmt: skip


@pytest.mark.parametrize("at", range(7))
def test_columns_of_strings(at: int, tiny_lm: FrozenLM) -> None:
    found = targets_of(tiny_lm, columns()[at])
    assert [ids.tolist() for ids in found] == [tiny_lm.encode("a b"), tiny_lm.encode("c d")]


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16, np.int8])
def test_arrays_of_ids(kind: type, tiny_lm: FrozenLM) -> None:
    for ids in (np.array([[1, 2], [3, 4]], dtype=kind), list(np.array([[1, 2], [3, 4]], kind))):
        assert [row.tolist() for row in targets_of(tiny_lm, ids)] == [[1, 2], [3, 4]]


def test_columns_of_ids(tiny_lm: FrozenLM) -> None:
    for ids in (pa.array([[1, 2], [3]]), columns()[0].map({"a b": [1, 2], "c d": [3]})):
        assert [row.tolist() for row in targets_of(tiny_lm, ids)] == [[1, 2], [3]]


@pytest.mark.parametrize(
    "texts",
    [
        np.array([[0.5, 1.0]]), np.array(3), np.zeros((2, 2, 2), int), pa.array(["a", None]),
        pa.table({"text": ["a"]}), {"a": 1}, 7, None, b"text", np.array([True, False]),
        torch.tensor(3), iter(["a"]), [b"text"], [None],
    ],
)  # fmt: skip
def test_what_is_no_list_of_texts(texts: object, tiny_lm: FrozenLM) -> None:
    with pytest.raises(ValueError, match="^texts: "):
        targets_of(tiny_lm, texts)


def test_a_table_is_no_column(tiny_lm: FrozenLM) -> None:
    with pytest.raises(ValueError, match="DataFrame is not a list, a column or a tensor"):
        targets_of(tiny_lm, columns()[0].to_frame())


def test_numbers_of_numpy_count(small_lm: FrozenLM) -> None:
    recipe = Recipe(max_steps=np.int64(2), warmup=np.int32(1))
    one = np.int64(1)
    fit = prototok.fast_fit(
        small_lm, [[3, 4], [5, 6]], length=one, seeds=np.int64(2), batch_size=np.int64(3),
        share="m", group_size=np.int64(1), recipe=recipe,
    )  # fmt: skip
    assert fit.tokens.e.shape[:2] == (2, 2)
    assert prototok.decode(small_lm, fit.tokens, length=one, batch_size=one).shape == (4, 1)
    seeds = np.array([3, 5])
    mem = prototok.autoregressive.fit(small_lm, [[3]], one, length=one, seeds=seeds, recipe=recipe)
    assert prototok.autoregressive.generate(small_lm, mem.mem, one).shape == (2, 1)
    prototok.capacity(
        small_lm, [[3, 4]], lengths=np.array([1, 2]), restarts=np.int64(0), recipe=recipe
    )


@pytest.mark.parametrize("value", [True, np.bool_(True), 1.0, np.float64(2), "2", np.int64(0)])
@pytest.mark.parametrize("name", ["length", "seeds", "batch_size"])
def test_other_numbers_do_not(name: str, value: object, small_lm: FrozenLM) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        prototok.fast_fit(small_lm, [[3, 4]], **{name: value})
