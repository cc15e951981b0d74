"""The paper's settings, expanded; and every way a setting can be wrong."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from prototok.cli import main
from prototok.fitting.capacity import GRID
from prototok.sweep import experiments
from prototok.sweep.experiments import (
    ARRANGEMENTS,
    EXPERIMENTS,
    expand,
    plan,
    settings_of,
)
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.unit import Unit
from prototok.texts.sources import Source

BOOKS = (Source.parse("PG-19=folder:books"),)


def expanded(name: str, **given: object) -> list[Unit]:
    """Every unit of an experiment of the paper on one model and source, over made-up texts."""
    s = settings_of(name, "paper", sources=BOOKS, **given)
    count = s.contexts * s.continuations or s.texts
    return list(expand(s.models[0], "PG-19", [f"t{i}" for i in range(count)], s))


@pytest.mark.parametrize(
    ("name", "units", "rows"),
    [
        ("table1", 5 * 11 * 50, 5 * 11 * 50),
        # S_g groups of 256 texts, for e and for m, by ten seeds.
        ("table2", 2 * 10 * (256 + 64 + 16 + 4 + 1), 2 * 10 * 5 * 256),
        ("table3", 18 * (50 + 1), 18 * 2 * 50),
        ("table4", 5 * 10, 5 * 10),
        ("figure2", 18 * (50 + 1) + 2 * 18 * 50, 18 * 4 * 50),
        ("figure3", 18 * 2 * 50, 18 * 2 * 50),
        # 50 contexts, nine continuations once and the tenth with ten seeds, all with one m.
        ("figure4", 1, 50 * 19),
        ("figure5", 1, 50 * 19),
        ("figure6", 1, 5 * 10),
    ],
)
def test_paper_presets_have_the_papers_sizes(name: str, units: int, rows: int) -> None:
    found = expanded(name)
    assert len({unit.key for unit in found}) == len(found) == units
    assert sum(len(unit.texts) for unit in found) == rows
    assert {unit.recipe for unit in found} == {"paper"}
    assert all(not unit.changes for unit in found)


def test_what_the_paper_says_of_each_experiment() -> None:
    assert {u.arrangement for u in expanded("table1")} == set(ARRANGEMENTS)
    assert {u.length for u in expanded("table1")} == {2**i for i in range(11)}
    assert {(u.share, u.group_size) for u in expanded("table2")} == {
        (share, size) for share in "em" for size in (1, 4, 16, 64, 256)
    }
    assert {u.length for u in expanded("table2")} == {256}
    assert tuple(sorted({u.length for u in expanded("table3")})) == GRID
    assert {u.share for u in expanded("table3")} == {None, "m"}
    assert {(u.length, u.alone) for u in expanded("table4")} == {
        (n, True) for n in (32, 64, 128, 256, 512)
    }
    modes = {(u.mode, u.vectors, u.share) for u in expanded("figure2")}
    assert modes == {
        ("one-forward", 1, None), ("one-forward", 1, "m"), ("autoregressive", 1, None),
        ("autoregressive", 2, None),
    }  # fmt: skip
    assert all(u.timed for u in expanded("figure3"))
    (unit,) = expanded("figure6")
    assert unit.share == "m" and sorted(set(unit.seeds)) == list(range(10))
    assert len(settings_of("table3", sources=BOOKS).models) == 6


def test_seeds_of_a_shared_vector_are_fits_of_their_own_in_table_2() -> None:
    units = [u for u in expanded("table2") if u.group_size == 16]
    assert all(len(set(u.seeds)) == 1 and len(u.texts) == 16 for u in units)


def test_figures_2_and_3_ask_for_table_3s_units_again() -> None:
    table3 = {u.key for u in expanded("table3")}
    assert table3 < {u.key for u in expanded("figure2")}
    assert {u.key for u in expanded("figure4")} == {u.key for u in expanded("figure5")}


def test_small_presets_plan_from_what_is_in_the_package(tmp_path: Path) -> None:
    assert plan(tmp_path / "run", "table3", settings_of("table3", "small")) == (210, 16)
    plan(tmp_path / "run", "table1", settings_of("table1", "small"))
    run = RunFolder.open(tmp_path / "run")
    assert list(run.settings()) == ["table3", "table1"]
    texts = {row["text_id"]: row for row in run.texts().to_pylist()}
    for unit in run.units().values():
        for text in unit.texts:
            assert len(texts[text]["ids"]) >= unit.length
            assert texts[text]["source"] == unit.source
    again = {row["text_id"] for row in run.texts().to_pylist()}
    plan(tmp_path / "run", "table3", settings_of("table3", "small"))
    assert {row["text_id"] for row in run.texts().to_pylist()} == again


def test_settings_beside_the_first_are_of_the_same_texts(tmp_path: Path) -> None:
    """Behind a prefix N = 4 and 8, without one 4 alone: a text is one in both, and so is a unit."""
    behind = settings_of("table3", "small", models=("tiny-llama",), texts=2, lengths=(4, 8))
    bare = dataclasses.replace(behind, prefix=None, lengths=(4,), share=(None,))
    again = dataclasses.replace(behind, lengths=(4,))
    sources, shares = 3, 3  # a text's own m twice, and one m for both
    most = sources * shares * 2
    assert plan(tmp_path / "run", "table3", behind, also=(bare, again)) == (most + sources * 2, 6)
    run = RunFolder.open(tmp_path / "run")
    of: dict[str | tuple | None, set[str]] = {}
    for unit in run.units().values():
        of.setdefault(unit.prefix, set()).update(unit.texts)
    assert of["auto"] == of[None] and {len(t["ids"]) for t in run.texts().to_pylist()} == {8}
    assert (
        run.settings()["table3"]["also"][0] | {"prefix": None, "lengths": [4]}
        == (run.settings()["table3"]["also"][0])
    )
    plan(tmp_path / "run", "table3", behind)
    assert "also" not in RunFolder.open(tmp_path / "run").settings()["table3"]


def test_planned_again_with_longer_texts_what_is_done_stays_done(tmp_path: Path) -> None:
    settings = settings_of("table3", "small", models=("tiny-llama", "tiny-neox"), texts=2)
    short = dataclasses.replace(settings, lengths=(4, 8))
    plan(tmp_path / "run", "table3", short)
    plan(tmp_path / "run", "figure2", short)
    run = RunFolder.open(tmp_path / "run")
    before, texts = set(run.units()), run.texts().to_pylist()
    plan(tmp_path / "run", "table3", dataclasses.replace(settings, lengths=(8, 12)))
    grown = {row["text_id"]: row for row in run.texts().to_pylist()}
    assert list(grown) == [row["text_id"] for row in texts]
    for row in texts:
        new = grown[row["text_id"]]
        assert len(new["ids"]) == 12 and new["ids"][:8] == row["ids"]
        assert new["text"].startswith(row["text"])
    of_table_3 = run.plan("table3")
    eight = of_table_3.filter(pc.equal(of_table_3["length"], 8))["key"].to_pylist()
    assert eight and set(eight) <= before
    plan(tmp_path / "run", "figure2", dataclasses.replace(settings, lengths=(12,)))  # theirs, grown
    plan(tmp_path / "run", "table1", dataclasses.replace(settings, lengths=(12,)))  # the same ones
    plan(tmp_path / "run", "table3", short)
    assert set(run.units()) >= before
    assert {row["text_id"] for row in run.texts().to_pylist()} == set(grown)


def test_continuations_are_generated_once_for_all_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Source] = []
    generate = experiments.continuations

    def counted(source: Source, *rest: Any) -> Any:
        made.append(source)
        return generate(source, *rest)

    monkeypatch.setattr(experiments, "continuations", counted)
    auto = settings_of(
        "figure4", "small", models=("tiny-llama",), sources=(Source.parse("generated:held-out"),),
        contexts=2, continuations=1, lengths=(4,), seeds=1,
    )  # fmt: skip
    bare = dataclasses.replace(auto, prefix=None)
    other = dataclasses.replace(auto, prefix=None, contexts=1)
    units, texts = plan(tmp_path / "run", "figure4", auto, also=(bare,))
    assert len(made) == 1 and texts == 2 and units % 2 == 0
    plan(tmp_path / "other", "figure4", auto, also=(other,))  # other texts are made
    assert len(made) == 3


def test_a_config_file_overrides_the_preset_and_options_override_it(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "models: [a, b]\nlengths: 7\nshare: [none, e]\nchanges: {lr: 0.5, betas: [0.9, 0.99]}\n"
        "sources:\n  - random\n  - {source: 'X=folder:books', words: [20, 30]}\n"
    )
    s = settings_of("table3", "paper", config, models=("c",))
    assert s.models == ("c",) and s.lengths == (7,) and s.share == (None, "e")
    assert s.sources[1].name == "X" and s.sources[1].words == (20, 30)
    assert s.texts == 50 and s.changes["lr"] == 0.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lenghts: [4]", "config: unknown key 'lenghts'; did you mean 'lengths'?"),
        ("contexts: 3", "config: unknown key 'contexts'"),  # of figure 4, not of table 3
        ("xyz: 3", "known are models, sources"),
        ("changes: {max_step: 5}", "recipe: unknown key 'max_step'; did you mean 'max_steps'?"),
        ("changes: {lr: -1}", "lr: -1 is not a positive number"),
        ("changes: 3", "changes: 3 is not a mapping"),
        ("lengths: [0]", "lengths: 0 is not a positive integer"),
        ("lengths: [four]", "lengths: 'four' is not"),
        ("texts: 1.5", "texts: 1.5 is not int"),
        ("texts: true", "texts: True is not int"),
        ("share: [x]", "share: 'x' is not none, m or e"),
        ("changes: {learned: 5}", "recipe: 'fast' needs an optimiser, and a sweep takes none"),
        ("recipe: quick", "recipe: 'quick' is not fast or paper"),
        ("models: []", "model: none was given"),
        ("models: [3]", "models: [3] is not a list of names"),
        ("sources: [web]", "source: kind 'web' is not one of"),
        ("sources: [folder]", "source: folder needs a path"),
        ("sources: [generated]", "source: generated needs the source it continues"),
        ("sources: [random, random]", "source: two have one name"),
        ("sources: [{source: random, wrods: [1, 2]}]", "did you mean 'words'?"),
        ("sources: [{source: random, words: 3}]", "words: 3 is not a list of two"),
        ("sources: [{words: [1, 2]}]", "is neither [NAME=]KIND[:PATH] nor"),
        ("- a", "is not a mapping of settings"),
        ("a: [", "is not YAML"),
    ],
)
def test_every_mistake_in_a_config_is_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        settings_of("table3", "small", tmp_path / "c.yaml")
    assert says in str(caught.value)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="experiment: 'table9' is not one of table1"):
        settings_of("table9")
    with pytest.raises(ValueError, match="preset: 'huge' is not one of paper, small"):
        settings_of("table1", "huge")
    with pytest.raises(ValueError, match="source: none was given"):
        settings_of("table1")


def test_no_experiment_has_a_key_that_is_no_setting() -> None:
    for name, experiment in EXPERIMENTS.items():
        s = settings_of(name, "small")
        assert all(hasattr(s, key) for key in experiment.keys)


def test_the_place_is_tried_before_anything_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prototok.common.files.flush", full)
    monkeypatch.setattr("prototok.sweep.experiments.plan", None)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "plan", "table3", "--preset", "small", "-o", "run"])
    assert ended.value.code == 2
    assert "out: run cannot be written (No space left on device)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
