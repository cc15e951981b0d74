"""Units of a sweep that have a prefix: planned, fitted behind it, kept, verified from the files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest

import prototok
from prototok.cli import main
from prototok.sweep import schema
from prototok.sweep.experiments import expand, settings_of
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.unit import Unit
from prototok.sweep.verify import verify
from prototok.sweep.work import Worker
from prototok.texts.targets import text_id

IDS = (5, 17)


def test_units_without_one_keep_the_keys_that_they_had() -> None:
    unit = Unit("one-forward", "tiny-llama", "s", ("a",), (0,), 3)
    assert '"prefix"' not in unit.spec() and Unit.parse(unit.spec()) == unit
    for prefix in (None, " the", IDS):
        other = dataclasses.replace(unit, prefix=prefix)
        assert other.key != unit.key and other.group() != unit.group()
        assert Unit.parse(other.spec()) == other
    with pytest.raises(ValueError, match="a unit has 7 as its prefix"):
        Unit.parse(other.spec().replace("[5,17]", "7"))


def test_settings_hand_it_to_every_unit(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    for text, prefix in (
        ("prefix: none", None), ("prefix: ' the'", " the"), ("prefix: [5, 17]", IDS),
        ("texts: 4", "auto"),
    ):  # fmt: skip
        config.write_text(text)
        for name in ("table3", "figure2"):
            settings = settings_of(name, "small", config)
            units = list(expand("tiny-llama", "s", ["a", "b"], settings))
            assert {unit.prefix for unit in units} == {prefix}
            assert {unit.mode for unit in units} >= {"one-forward"}
    assert settings_of("table1", "small", prefix="none").prefix is None
    config.write_text("prefix: 7")
    with pytest.raises(ValueError, match="prefix: 7 is not text, a list of token ids, none"):
        settings_of("table1", "small", config)


def test_the_command_plans_everything_with_each(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["sweep", "plan", "table1", "-o", str(run), "--preset", "small"]
    with pytest.raises(SystemExit, match="^0$"):
        main([*command, "--model", "tiny-llama", "--prefix", "none", "--prefix", " the"])
    units = RunFolder.open(run).units().values()
    asked = {prefix: {(u.arrangement, u.length, u.texts) for u in units if u.prefix == prefix}
             for prefix in (None, " the")}  # fmt: skip
    assert asked[None] == asked[" the"] and len(units) == 2 * len(asked[None]) == 200


def test_a_worker_fits_behind_it_and_verify_decodes_behind_it(tmp_path: Path) -> None:
    lm = prototok.load("tiny-llama", "cpu", "float32")
    ids = lm.encode("Call me Ishmael, said he")[:3]
    row = {"text_id": text_id(ids), "source": "s", "number": 0, "ids": ids, "text": "Call me"}
    base = Unit(
        "one-forward", "tiny-llama", "s", (text_id(ids),), (0,), 2, dtype="float32",
        recipe="fast", changes={"max_steps": 150}, prefix=IDS,
    )  # fmt: skip
    units = [base, dataclasses.replace(base, mode="autoregressive")]
    run = RunFolder.create(tmp_path / "run")
    run.add("table1", {}, units, pa.Table.from_pylist([row], schema=schema.TEXTS))
    worker = Worker(run, "cpu")
    for unit in units:
        assert dict(worker.do([unit])) == {unit.key: True}
        stored = run.tensors(unit.key)
        assert stored.prefix is not None and stored.prefix.ids == IDS
        assert "as asked" in stored.provenance["prefix"]
    bare = prototok.information(lm, [ids[:2]])
    assert run.fits("table1").to_pylist()[0]["h_lm"] == pytest.approx(float(bare.nats), rel=1e-4)
    assert verify(run, 2, "cpu") == (2, 2, [])
