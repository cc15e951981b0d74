"""Which seed a row started from is kept: chosen, saved and read again."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import prototok
from prototok import FitResult, FrozenLM, Recipe
from prototok.results.mem_fit import MemFit

QUICK = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=40)


@pytest.fixture(scope="module")
def fit(small_lm: FrozenLM) -> FitResult:
    texts = [[5, 9], [7, 3, 11], [60, 2]]
    return prototok.fast_fit(small_lm, texts, seeds=[5, 7], recipe=QUICK, progress=False)


def test_seeds_are_those_that_were_given(fit: FitResult) -> None:
    assert fit.seed.tolist() == [[5, 7]] * 3
    assert fit.to_pandas()["seed"].tolist() == [5, 7] * 3


def test_the_best_row_says_which_seed_it_is(fit: FitResult) -> None:
    best = fit.best()
    for t in range(3):
        s = [5, 7].index(int(best.seed[t, 0]))
        assert torch.equal(best.tokens.e[t, 0], fit.tokens.e[t, s])
    assert set(best.to_pandas()["seed"]) == {5, 7}  # with these texts, one of each at least


def test_seeds_come_back_from_a_folder(fit: FitResult, tmp_path: Path) -> None:
    for name, one in (("all", fit), ("best", fit.best())):
        one.save(tmp_path / name)
        assert torch.equal(FitResult.load(tmp_path / name).seed, one.seed)


@pytest.mark.parametrize(("name", "seeds"), [("all", [[5, 7]] * 3), ("best", [[-1]] * 3)])
def test_folders_of_before_hold_places(
    name: str, seeds: list, fit: FitResult, tmp_path: Path
) -> None:
    """Their column `seed` is 0, 1, …: the seeds are in the header, unless the best was chosen."""
    (fit if name == "all" else fit.best()).save(tmp_path / "fit")
    table = pq.read_table(tmp_path / "fit" / "fits.parquet")
    places = [s for _ in range(3) for s in range(len(seeds[0]))]
    metadata = {"prototok": json.dumps(fit.tokens.provenance)}
    old = table.set_column(
        table.schema.names.index("seed"), "seed", [places]
    ).replace_schema_metadata(metadata)
    pq.write_table(old, tmp_path / "fit" / "fits.parquet")
    assert FitResult.load(tmp_path / "fit").seed.tolist() == seeds


def test_mem_fits_keep_their_seeds(small_lm: FrozenLM, tmp_path: Path) -> None:
    fit = prototok.autoregressive.fit(
        small_lm, [[5, 9], [7, 3]], seeds=[3, 8], recipe=Recipe(max_steps=2), progress=False
    )
    assert fit.seed.tolist() == [[3, 8]] * 2
    path = tmp_path / "mem.safetensors"
    fit.save(path)
    assert MemFit.load(path).seed.tolist() == [[3, 8]] * 2
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    del tensors["seed"]  # as files of before are
    save_file(tensors, path, metadata=metadata)
    assert MemFit.load(path).seed.tolist() == [[3, 8]] * 2
