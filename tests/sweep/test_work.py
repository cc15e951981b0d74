"""What a worker records of a unit is true, and can be checked from the folder alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest
import torch

import prototok
from prototok.autoregressive import MemFit
from prototok.sweep import schema
from prototok.sweep.lots import Lots, shard_of, to_do
from prototok.sweep.models import load_model, split
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.settings import recipe_of_unit
from prototok.sweep.unit import Unit
from prototok.sweep.verify import verify
from prototok.sweep.work import Worker
from prototok.texts.targets import text_id

TEXTS = ("It was a dark and stormy night", "Call me Ishmael, said he", "The very idea of it")
QUICK = {"recipe": "fast", "changes": {"max_steps": 150}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """One unit of each kind, done by one worker."""
    lm = prototok.load("tiny-llama", "cpu", "float32")
    ids = [lm.encode(text)[:5] for text in TEXTS]
    names = tuple(text_id(row) for row in ids)
    rows = [
        {"text_id": name, "source": "s", "number": i, "ids": row, "text": text}
        for i, (name, row, text) in enumerate(zip(names, ids, TEXTS, strict=True))
    ]
    base = Unit("one-forward", "tiny-llama", "s", names[:1], (0,), 3, dtype="float32", **QUICK)
    units = [
        dataclasses.replace(base, timed=True),
        dataclasses.replace(base, seeds=(7,)),
        # The second text has two seeds, as the last continuation of a context does in Figure 4.
        dataclasses.replace(base, share="m", texts=(*names[:2], names[1]), seeds=(0, 0, 1)),
        dataclasses.replace(base, share="e", texts=names, seeds=(0, 0, 0), length=1),
        dataclasses.replace(base, arrangement="e*", length=1, alone=True),
        dataclasses.replace(base, mode="autoregressive", vectors=2, timed=True),
        dataclasses.replace(base, length=10_000),  # more than the model has positions
        dataclasses.replace(base, model="./nowhere"),
    ]
    made = RunFolder.create(tmp_path_factory.mktemp("work") / "run")
    table = pa.Table.from_pylist(rows, schema=schema.TEXTS)
    made.add("table1", {}, units, table)
    worker = Worker(made, "cpu")
    lots = Lots(made, units, 1, 4096, 3)
    told = {}
    while lot := lots.take():
        told |= dict(worker.do(lot))
    assert {key for key, ok in told.items() if ok} == made.done()
    assert len(made.done()) == 6
    return made


def test_a_worker_sees_a_text_that_grew_while_it_ran(tmp_path: Path) -> None:
    lm = prototok.load("tiny-llama", "cpu", "float32")
    ids = lm.encode(TEXTS[0])
    run = RunFolder.create(tmp_path / "run")
    name = text_id(ids[:2])
    unit = Unit("one-forward", "tiny-llama", "s", (name,), (0,), 1, dtype="float32", **QUICK)
    worker = Worker(run, "cpu")
    for length in (1, 3):
        row = {"text_id": name, "source": "s", "number": 0, "ids": ids[: length + 1], "text": ""}
        table = pa.Table.from_pylist([row], schema=schema.TEXTS)
        run.add("table1", {}, [dataclasses.replace(unit, length=length)], table)
        lots = Lots(run, list(run.units().values()), 1, 4096, 3)
        while lot := lots.take():
            assert all(ok for _, ok in worker.do(lot))
        found = run.fits("table1").to_pylist()
        assert [row["target_ids"] for row in found] == [ids[:length]]


def test_rows_are_what_decoding_their_vectors_gives(run: RunFolder) -> None:
    lm = prototok.load("tiny-llama", "cpu", "float32")
    units = run.units()
    for row in run.fits("table1").to_pylist():
        unit, stored = units[row["key"]], run.tensors(row["key"])
        text = unit.texts[row["row"]]
        assert (row["text_id"], row["seed"]) == (text, unit.seeds[row["row"]])
        assert row["target_text"] == lm.decode_ids(row["target_ids"])
        assert row["decoded_text"] == lm.decode_ids(row["decoded_ids"])
        right = sum(a == b for a, b in zip(row["target_ids"], row["decoded_ids"], strict=True))
        assert right == row["correct"] and row["accuracy"] == right / unit.length
        assert row["exact"] == (right == unit.length)
        information = prototok.information(lm, [row["target_ids"]])
        assert row["h_lm"] == pytest.approx(float(information.nats), rel=1e-4)
        assert row["h_lm_tokens"] == unit.length - 1
        if isinstance(stored, MemFit):
            assert stored.mem.shape == (1, 1, 2, lm.hidden_size)
        else:
            ids = prototok.decode(lm, stored)[row["row"]]
            assert ids.tolist() == row["decoded_ids"]
            assert min(row["margins"]) == pytest.approx(row["margin"], abs=1e-4)


def test_most_of_these_easy_texts_come_back(run: RunFolder) -> None:
    rows = run.fits("table1").to_pylist()
    assert len(rows) == 10
    assert sum(row["exact"] for row in rows) >= 7


def test_only_exact_rows_of_timed_units_are_timed(run: RunFolder) -> None:
    units = run.units()
    for row in run.fits().to_pylist():
        assert (row["decode_seconds"] is not None) == (units[row["key"]].timed and row["exact"])
        if row["decode_seconds"]:
            assert row["tokens_per_second"] == pytest.approx(3 / row["decode_seconds"])
    assert {row["decoder"] for row in run.fits().to_pylist()} >= {None, "one forward"}


def test_a_unit_fitted_in_company_is_the_unit_fitted_alone(run: RunFolder) -> None:
    lm = prototok.load("tiny-llama", "cpu", "float32")
    by_seed = {
        unit.seeds: key for key, unit in run.units().items()
        if key in run.done() and unit.mode == "one-forward" and unit.arrangement == "e m*"
        and unit.share is None
    }  # fmt: skip
    row = next(row for row in run.fits().to_pylist() if row["key"] == by_seed[(7,)])
    recipe = recipe_of_unit("fast", {"max_steps": 150})
    alone = prototok.fast_fit(lm, [row["target_ids"]], seeds=[7], recipe=recipe)
    assert int(alone.steps) == row["steps"]
    torch.testing.assert_close(alone.tokens.e, run.tensors(by_seed[(7,)]).e, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prior", [False, True])
def test_a_rate_that_is_asked_for_holds_with_a_prior_and_at_any_width(prior: bool) -> None:
    assert recipe_of_unit("fast", {"lr": 0.07}).at_width(960, prior).lr == 0.07
    assert recipe_of_unit("fast", {"max_steps": 150}).at_width(960, prior).lr < 0.05


def test_what_cannot_be_done_is_recorded_with_its_reason(run: RunFolder) -> None:
    reasons = [row["reason"] for row in run.failures().to_pylist()]
    assert len(reasons) == 2
    assert any("positions, tiny-llama has 256" in reason for reason in reasons)
    assert any(reason.startswith("model: './nowhere' is no folder here") for reason in reasons)
    assert to_do(run, None, retry_failed=False) == []


def test_verify_finds_what_was_changed(run: RunFolder, tmp_path: Path) -> None:
    assert verify(run, 99, "cpu") == (6, 6, [])
    victim = next(k for k, u in run.units().items() if u.share == "m")
    path = run.tensors_path(victim)
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-4] + b"\0\0\0\0")
        assert verify(run, 0, "cpu")[2] == [f"{victim}: {path} is not the file that was recorded"]
        path.unlink()
        assert verify(run, 0, "cpu")[2] == [f"{victim}: {path} is missing"]
    finally:
        path.write_bytes(whole)
    shard = run.path / "fits" / f"{victim}.parquet"
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:100])
        (problem,) = verify(run, 0, "cpu")[2]
        assert problem.startswith(f"{victim}: its shard could not be read")
    finally:
        shard.write_bytes(whole)


def test_verify_decodes_again(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from prototok.results import proto_tokens

    real = proto_tokens.ProtoTokens.vectors
    monkeypatch.setattr(proto_tokens.ProtoTokens, "vectors", lambda *a: real(*a).flip(0))
    problems = verify(run, 99, "cpu")[2]
    assert problems and all("tokens right when decoded again" in p for p in problems)


def test_lots_are_of_one_group_longest_first_and_lose_nothing(tmp_path: Path) -> None:
    base = Unit("one-forward", "a", "s", ("t",), (0,), 1)
    units = [
        dataclasses.replace(base, model=model, length=n, share=share, alone=n == 3)
        for model in "ab" for n in range(1, 40) for share in (None, "m")
    ]  # fmt: skip
    run = RunFolder.create(tmp_path / "run")
    lots = Lots(run, units, 2, 64, 3)
    taken = []
    while lot := lots.take(taken[-1].model if taken else None):
        assert len({unit.group() for unit in lot}) == 1
        assert len(lot) == 1 or sum(u.positions for u in lot) <= 64
        assert len(lot) == 1 or not any(u.alone for u in lot)
        taken += lot
    assert sorted(u.key for u in taken) == sorted(u.key for u in units)
    models = [u.model for u in taken]
    assert models == sorted(models)


def test_a_lot_whose_worker_died_is_halved_until_the_culprit_is_alone(tmp_path: Path) -> None:
    base = Unit("one-forward", "a", "s", ("t",), (0,), 1)
    units = [dataclasses.replace(base, seeds=(s,)) for s in range(8)]
    culprit = units[5]
    run = RunFolder.create(tmp_path / "run")
    run.add("table1", {}, units, schema.TEXTS.empty_table())
    lots = Lots(run, units, 1, 64, attempts=2)
    deaths = 0
    while lot := lots.take():
        if culprit in lot:
            deaths += 1
            lots.died(lot, "SIGSEGV")
        else:
            for unit in lot:
                run.commit(unit.key, [{}], lambda path: path.write_bytes(b"") and None)
    assert len(run.done()) == 7
    (failure,) = run.failures().to_pylist()
    assert failure["key"] == culprit.key and failure["attempts"] == 2
    assert failure["reason"] == "its worker died: SIGSEGV" and deaths == 3 + 2


def test_shards_part_the_units() -> None:
    base = Unit("one-forward", "a", "s", ("t",), (0,), 1)
    units = {u.key: u for u in (dataclasses.replace(base, length=n) for n in range(1, 100))}
    parts = [shard_of(units, f"{i}/3") for i in range(3)]
    assert sorted(u.key for part in parts for u in part) == sorted(units)
    assert all(len(part) > 20 for part in parts)
    for wrong in ("3/3", "1", "a/b", "-1/2", "0/0"):
        with pytest.raises(ValueError, match="shard: "):
            shard_of(units, wrong)


def test_models_by_revision_and_with_random_weights(tmp_path: Path) -> None:
    assert split("EleutherAI/pythia-160m@step1000") == ("EleutherAI/pythia-160m", "step1000", False)
    assert split("random:tiny-llama") == ("tiny-llama", None, True)
    (tmp_path / "a@b").mkdir()
    assert split(str(tmp_path / "a@b"))[1] is None
    with pytest.raises(ValueError, match="is not NAME, NAME@REVISION"):
        split("tiny-llama@")
    control, again = (load_model("random:tiny-llama", "cpu", "float32") for _ in range(2))
    trained = load_model("tiny-llama", "cpu", "float32")
    assert control.identity.name == "random:tiny-llama"
    assert control.identity.fingerprint == again.identity.fingerprint
    assert control.identity.fingerprint != trained.identity.fingerprint
    assert control.identity.tokenizer_hash == trained.identity.tokenizer_hash
    ids = trained.encode("It was a dark and stormy night; the rain fell in torrents")
    held = prototok.information(trained, [ids]).nats
    assert float(prototok.information(control, [ids]).nats) > 1.3 * float(held)


def test_a_unit_is_not_blamed_for_a_worker_that_was_stopped(tmp_path: Path) -> None:
    units = [Unit("one-forward", "tiny-llama", "held-out", ("t",), (0,), n) for n in (1, 2)]
    run = RunFolder.create(tmp_path / "run")
    lots = Lots(run, units, 1, 64, attempts=1)
    for _ in range(5):
        lot = lots.take()
        assert lot is not None
        lots.put_back(lot)
    assert sum(map(len, lots.queue)) == 2 and not list((run.path / "failed").iterdir())
