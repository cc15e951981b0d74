"""Files that somebody damaged or made up: one sentence each, little memory, nothing executed.

Every parser of ours gets its own valid file with bytes flipped, cut off and put in, and its header
with any value in place of any field. It reads the file or raises ValueError.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import prototok
from prototok import FitResult, ProtoTokens
from prototok.autoregressive import MemFit
from prototok.fitting import capacity_file
from prototok.fitting.capacity import Growth
from prototok.fitting.learned.encoder import Encoder
from prototok.fitting.learned.encoder_network import EncoderNetwork
from prototok.fitting.learned.kept import weights_of
from prototok.fitting.learned.network import UpdateNetwork
from prototok.fitting.learned.optimizer import LearnedOptimizer
from prototok.fitting.prior import Prior
from prototok.results.fit_folder import FitFolder
from prototok.results.shards import ShardFolder, Shards
from prototok.sweep import schema
from prototok.sweep.experiments import settings_of
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.status import status
from prototok.sweep.unit import Unit
from prototok.texts.files import read_text
from prototok.texts.sources import documents
from support import small_llama

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([-1, 2**63, 10**30, float("nan"), "e m*", "m", "../../x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)  # fmt: skip
DAMAGE = st.tuples(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),  # where, XOR
    st.none() | st.floats(0, 1),  # cut off behind
    st.none() | st.tuples(st.floats(0, 1), st.binary(max_size=12)),  # put in
)
UNIT = Unit("one-forward", "tiny-llama", "held-out", ("t0",), (0,), 4)


def damaged(whole: bytes, damage: tuple) -> bytes:
    flips, cut, inserted = damage
    found = bytearray(whole)
    for where, mask in flips:
        found[int(where * (len(found) - 1))] ^= mask
    if inserted is not None:
        at = int(inserted[0] * len(found))
        found[at:at] = inserted[1]
    return bytes(found if cut is None else found[: int(cut * len(found))])


def read_or_refuse(read: Callable[[], object]) -> str | None:
    """What it says, None where it read the file; anything but ValueError fails the test."""
    try:
        read()
    except ValueError as error:
        said = str(error)
        assert 0 < len(said) < 3000 and "Traceback" not in said
        return said
    return None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One valid file of each kind."""
    folder = tmp_path_factory.mktemp("valid")
    lm = prototok.load(small_llama(), device="cpu", dtype="float32")
    recipe = prototok.Recipe(max_steps=1)
    fit = prototok.fast_fit(lm, [[3, 4, 5], [6, 7]], seeds=2, recipe=recipe)
    fit.save(folder / "fit")
    fit.tokens.save(folder / "tokens.safetensors")
    shared = prototok.fast_fit(lm, [[3, 4], [6, 7]], share="m", recipe=recipe)
    shared.tokens.save(folder / "shared.safetensors")
    prototok.autoregressive.fit(lm, [[3, 4]], recipe=recipe).save(folder / "mem.safetensors")
    d = lm.hidden_size
    prior = Prior(torch.zeros(2, d), torch.ones(2, d), torch.zeros(2, d, d), lm.identity)
    prior.save(folder / "prior.safetensors")
    weights = weights_of(UpdateNetwork(d, 4, 1, 2))
    LearnedOptimizer(prior, weights).save(folder / "optimizer.safetensors")
    Encoder(prior, weights_of(EncoderNetwork(d, 4, 1, 2))).save(folder / "encoder.safetensors")
    run = RunFolder.create(folder / "run")
    text = {"text_id": "t0", "source": "held-out", "number": 0, "ids": [1, 2, 3, 4], "text": "a"}
    run.add("table3", {"texts": 1}, [UNIT], pa.Table.from_pylist([text], schema=schema.TEXTS))
    run.commit(UNIT.key, [{"length": 4}], fit.tokens.save)
    other = dataclasses.replace(UNIT, length=3)
    run.add("figure2", {"texts": 1}, [UNIT, other], pa.Table.from_pylist([], schema=schema.TEXTS))
    run.fail(other.key, "because", 1)
    texts = [[3, 4], [], [6, 7]]
    prototok.fit_stream(lm, texts, folder / "shards", shard=3, recipe=recipe, progress=False)
    return folder


READERS = {
    "tokens": ProtoTokens.load, "shared": ProtoTokens.load, "mem": MemFit.load, "prior": Prior.load,
    "optimizer": LearnedOptimizer.load, "encoder": Encoder.load,
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
@QUICK
@given(damage=DAMAGE)
def test_damaged_vectors(kind: str, damage: tuple, made: Path) -> None:
    path = made / f"damaged-{kind}"
    path.write_bytes(damaged((made / f"{kind}.safetensors").read_bytes(), damage))
    read_or_refuse(lambda: READERS[kind](path))


@pytest.mark.parametrize("kind", READERS)
@QUICK
@given(data=st.data())
def test_vectors_with_any_header(kind: str, data: st.DataObject, made: Path) -> None:
    with safe_open(made / f"{kind}.safetensors", "pt") as file:
        header = json.loads(file.metadata()["prototok"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    inside = data.draw(st.sampled_from([header, header["model"]]))
    inside[data.draw(st.sampled_from([*inside, "another"]))] = data.draw(ANY_JSON)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(list(tensors)))
        shape = data.draw(st.lists(st.integers(0, 3), max_size=4))
        kinds = [torch.float32, torch.int64, torch.bool, torch.float64]
        tensors[name] = torch.zeros(shape, dtype=data.draw(st.sampled_from(kinds)))
    path = made / f"header-{kind}"
    save_file(tensors, path, metadata={"prototok": json.dumps(header)})
    read_or_refuse(lambda: READERS[kind](path))


@QUICK
@given(damage=DAMAGE)
def test_damaged_growths(damage: tuple, made: Path, small_lm: prototok.FrozenLM) -> None:
    lm = small_lm
    file = capacity_file.CapacityFile(made / "c.csv", overwrite=True)
    with file.claimed():
        file.begin(lm, {})
        file.keep(Growth(1, stage=2, exact=3, start=torch.zeros(2, lm.hidden_size)), lm)
        path = made / "c.csv.unfinished" / "00000001"
        path.write_bytes(damaged(path.read_bytes(), damage))
        read_or_refuse(lambda: capacity_file._read(path, lm))
        path.unlink()


@QUICK
@given(text=st.text(max_size=200) | ANY_JSON.map(json.dumps))
def test_vectors_whose_header_is_any_text(text: str, made: Path) -> None:
    path = made / "any-header"
    save_file({"e": torch.zeros(1)}, path, metadata={"prototok": text})
    for read in READERS.values():
        assert "but not" in (read_or_refuse(lambda read=read: read(path)) or "")


def claiming(shape: list[int], dtype: str, size: int) -> bytes:
    """A safetensors file whose header claims a tensor that is not there."""
    header = {"e": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        claiming([1 << 40], "F32", 1 << 42), claiming([1 << 20, 1 << 20], "F32", 16),
        claiming([2**63, 2**63], "F32", 16), claiming([-1], "F32", 16), claiming([4], "F99", 16),
        struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2**40) + b"{}", b"", b"\0" * 7,
        struct.pack("<Q", 20_000) + b"[" * 20_000,
    ],
)  # fmt: skip
def test_claims_are_held_against_the_file_before_memory_is_taken(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in READERS.values():
        assert "is not a whole safetensors file" in (read_or_refuse(lambda r=read: r(path)) or "")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000  # KiB


@pytest.mark.parametrize("depth", [10, 100_000])
def test_json_without_end(depth: int, made: Path) -> None:
    text = "[" * depth
    path = made / "deep"
    save_file({"e": torch.zeros(1)}, path, metadata={"prototok": text})
    assert "but not one of proto-tokens" in (read_or_refuse(lambda: ProtoTokens.load(path)) or "")
    assert read_or_refuse(lambda: Unit.parse(text))


def test_lengths_that_cannot_be_are_refused_before_anything_is_decoded(
    made: Path, tmp_path: Path
) -> None:
    tokens = ProtoTokens.load(made / "tokens.safetensors")
    for length in (0, -1, 2**62):
        longer = dataclasses.replace(tokens, lengths=torch.full_like(tokens.lengths, length))
        longer.save(tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="a text of it has no possible length"):
            ProtoTokens.load(tmp_path / "x.safetensors")
    lm = prototok.load(small_llama(), device="cpu", dtype="float32")
    longer = dataclasses.replace(tokens, lengths=torch.full_like(tokens.lengths, 1 << 20))
    with pytest.raises(ValueError, match="need 1048576 positions"):
        prototok.decode(lm, longer)


def test_groups_that_are_not_there(made: Path, tmp_path: Path) -> None:
    tokens = ProtoTokens.load(made / "shared.safetensors")
    for group in (-1, 1, 2**40):
        groups = torch.full_like(tokens.lengths, group)
        dataclasses.replace(tokens, groups=groups).save(tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="a text of it is in no group"):
            ProtoTokens.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["fits.parquet", "proto_tokens.safetensors"])
@QUICK
@given(damage=DAMAGE)
def test_damaged_fits(name: str, damage: tuple, made: Path) -> None:
    folder = made / "damaged-fit"
    shutil.copytree(made / "fit", folder, dirs_exist_ok=True)
    whole = (folder / name).read_bytes()
    found = damaged(whole, damage)
    (folder / name).write_bytes(found)
    said = read_or_refuse(lambda: FitResult.load(folder))
    if name == "proto_tokens.safetensors":
        assert (said is None) == (found == whole)  # no flipped bit passes for a vector


@QUICK
@given(data=st.data())
def test_fits_with_any_column(data: st.DataObject, made: Path) -> None:
    folder = made / "other-fit"
    shutil.copytree(made / "fit", folder, dirs_exist_ok=True)
    table = pq.read_table(folder / "fits.parquet")
    at = data.draw(st.integers(0, table.num_columns - 1))
    values = st.none() | st.integers(-9, 2**40) | st.text(max_size=3) | st.lists(st.integers(-1, 9))
    one = data.draw(values)
    column = pa.array([one] * data.draw(st.sampled_from([len(table), 1])))
    if len(column) == len(table):
        table = table.set_column(at, table.schema.names[at], column)
    else:
        table = table.slice(0, 1)
    pq.write_table(table, folder / "fits.parquet")
    read_or_refuse(lambda: FitResult.load(folder))


def read_run(folder: Path) -> None:
    run = RunFolder.open(folder)
    run.settings(), run.units(), run.texts(), run.fits(), run.fits("table3"), status(run)
    run.failures()
    [read() for _, read in run.shards()]


RUN_FILES = (
    "run.json", "plan.parquet", "texts.parquet", f"fits/{UNIT.key}.parquet",
    f"failed/{dataclasses.replace(UNIT, length=3).key}.json",
)  # fmt: skip


@pytest.mark.parametrize("name", RUN_FILES)
@QUICK
@given(damage=DAMAGE)
def test_damaged_run_folders(name: str, damage: tuple, made: Path) -> None:
    folder = made / "damaged-run"
    shutil.copytree(made / "run", folder, dirs_exist_ok=True)
    (folder / name).write_bytes(damaged((folder / name).read_bytes(), damage))
    read_or_refuse(lambda: read_run(folder))


@pytest.mark.parametrize("name", [n for n in RUN_FILES if n.endswith(".json")])
@QUICK
@given(data=st.data())
def test_run_folders_with_any_json(name: str, data: st.DataObject, made: Path) -> None:
    folder = made / "other-run"
    shutil.copytree(made / "run", folder, dirs_exist_ok=True)
    found = json.loads((made / "run" / name).read_text())
    found[data.draw(st.sampled_from([*found, "another"]))] = data.draw(ANY_JSON)
    (folder / name).write_text(json.dumps(data.draw(st.sampled_from([found, [found]]))))
    read_or_refuse(lambda: read_run(folder))


@QUICK
@given(data=st.data())
def test_units_with_any_field(data: st.DataObject) -> None:
    found = json.loads(UNIT.spec())
    found[data.draw(st.sampled_from([*found, "another"]))] = data.draw(ANY_JSON)
    spec = json.dumps(found)
    said = read_or_refuse(lambda: Unit.parse(spec))
    if said is None:
        unit = Unit.parse(spec)
        assert unit.key and unit.group() and unit.positions >= 1


SHARD_FILES = (
    "fit.json", "00000000/shard.json", "00000000/fits.parquet",
    "00000000/proto_tokens.safetensors",
)  # fmt: skip


def look_at_shards(folder: Path) -> None:
    """Read all that there is; then go on with it."""
    read_or_refuse(lambda: Shards(folder).summary())
    for read in (lambda s: s.vectors, lambda s: s.records, lambda s: s.load()):
        read_or_refuse(lambda read=read: [read(shard) for shard in Shards(folder)])
    place = ShardFolder(folder, resume=True)
    read_or_refuse(lambda: place.require_same(0, 3, "another"))
    read_or_refuse(lambda: place.begin({"shard": 3}))


@pytest.mark.parametrize("name", SHARD_FILES)
@QUICK
@given(damage=DAMAGE)
def test_damaged_shards(name: str, damage: tuple, made: Path) -> None:
    place = made / "damaged-shards"
    shutil.copytree(made / "shards", place, dirs_exist_ok=True)
    whole = (made / "shards" / name).read_bytes()
    (place / name).write_bytes(damaged(whole, damage))
    look_at_shards(place)


@pytest.mark.parametrize("name", [n for n in SHARD_FILES if n.endswith(".json")])
@QUICK
@given(data=st.data())
def test_shards_with_any_json(name: str, data: st.DataObject, made: Path) -> None:
    place = made / "damaged-shards"
    shutil.copytree(made / "shards", place, dirs_exist_ok=True)
    content = json.loads((made / "shards" / name).read_text())
    field = data.draw(st.sampled_from(sorted(content)))
    content[field] = data.draw(ANY_JSON)
    (place / name).write_text(json.dumps(content))
    look_at_shards(place)


@pytest.mark.parametrize("name", ["../../thesis", "a/b", "", "x" * 65])
def test_names_in_a_plan_do_not_lead_out_of_the_folder(name: str, made: Path) -> None:
    folder = made / "leading-run"
    shutil.copytree(made / "run", folder, dirs_exist_ok=True)
    for column, says in (("key", "has a key that is none"), ("experiment", "an? experiment")):
        plan = pq.read_table(made / "run" / "plan.parquet")
        at = plan.schema.names.index(column)
        table = plan.set_column(at, plan.schema.field(at), pa.array([name] * len(plan)))
        pq.write_table(table, folder / "plan.parquet")
        with pytest.raises(ValueError, match=says):
            RunFolder.open(folder).compact()


@pytest.mark.parametrize("name", ["tmp", "fits", "tensors", "failed", "compacted", "run.json"])
def test_links_that_lead_out_of_a_run_are_refused(name: str, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made / "run", folder)
    target = tmp_path / "elsewhere"
    shutil.move(folder / name, target)
    (folder / name).symlink_to(target)
    with pytest.raises(ValueError, match=f"{name} is a link that leads out of the folder"):
        RunFolder.open(folder)


def test_a_link_in_place_of_the_lock_empties_no_file(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(made / "run", folder)
    (tmp_path / "thesis.txt").write_text("years of work")
    (folder / "tmp" / "lock").unlink()
    (folder / "tmp" / "lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(OSError):
        RunFolder.open(folder).compact()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_writing_replaces_a_link_and_not_what_it_leads_to(made: Path, tmp_path: Path) -> None:
    tokens = ProtoTokens.load(made / "tokens.safetensors")
    tokens.save(tmp_path / "target.safetensors")
    before = (tmp_path / "target.safetensors").read_bytes()
    os.symlink(tmp_path / "target.safetensors", tmp_path / "link.safetensors")
    dataclasses.replace(tokens, e=tokens.e + 1).save(tmp_path / "link.safetensors")
    assert (tmp_path / "target.safetensors").read_bytes() == before
    assert not (tmp_path / "link.safetensors").is_symlink()


@QUICK
@given(data=st.data())
def test_settings_with_any_value(data: st.DataObject, made: Path) -> None:
    names = ["models", "sources", "texts", "lengths", "seeds", "share", "group_sizes", "recipe"]
    names += ["changes", "dtype", "text_seed", "another"]
    found = {data.draw(st.sampled_from(names)): data.draw(ANY_JSON)}
    if data.draw(st.booleans()):
        fields = [f.name for f in dataclasses.fields(prototok.Recipe)]
        found = {"changes": {data.draw(st.sampled_from(fields)): data.draw(ANY_JSON)}}
    (made / "c.yaml").write_text(json.dumps(found))
    read_or_refuse(lambda: settings_of("table3", "small", made / "c.yaml"))


@QUICK
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_settings_of_any_bytes(content: bytes, made: Path) -> None:
    (made / "c.yaml").write_bytes(content)
    read_or_refuse(lambda: settings_of("table3", "small", made / "c.yaml"))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        "models: !!python/object/apply:os.system ['touch pwned']",
        "models: !!python/name:os.system", "lengths: " + "[" * 5000, "? [a, b]\n: c", "a: *missing",
        "texts: 2024-01-01", "texts: .nan", "lengths: [1, .inf]", "models: [1]", "\0",
        BOMB.replace("i: &i", "lengths: &i"), BOMB.replace("i: &i", "models: &i"),
        "sources: {source: [held-out]}", "sources: {source: held-out, words: [1]}",
        "sources: {source: held-out, context_tokens: many}", "dtype: float7",
    ],
)  # fmt: skip
def test_yaml_executes_nothing_and_fills_no_memory(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(content)
    assert read_or_refuse(lambda: settings_of("table3", "small", tmp_path / "c.yaml"))
    assert os.listdir() == ["c.yaml"]


@QUICK
@given(content=st.binary(max_size=40))
def test_books_of_any_bytes(content: bytes, made: Path) -> None:
    (made / "book.txt").write_bytes(content)
    if read_or_refuse(lambda: read_text(made / "book.txt")) is None:
        assert read_text(made / "book.txt").encode() == content


@QUICK
@given(lines=st.lists(ANY_JSON.map(lambda v: json.dumps({"text": v}).encode()) | st.binary()))
def test_json_lines_of_any_kind(lines: list[bytes], made: Path) -> None:
    path = made / "texts.jsonl"
    path.write_bytes(b"\n".join(lines))
    if read_or_refuse(lambda: list(documents(str(path), "text"))) is None:
        assert all(isinstance(text, str) for text in documents(str(path), "text"))


@pytest.mark.parametrize("values", [[1, 2], [b"a"], [["a"]], [1.5], [None]])
def test_parquet_columns_that_hold_no_text(values: list, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": values}), tmp_path / "x.parquet")
    said = read_or_refuse(lambda: list(documents(str(tmp_path / "x.parquet"), "text")))
    assert "not text" in (said or "")


@QUICK
@given(content=st.binary(max_size=80) | ANY_JSON.map(lambda v: json.dumps(v).encode()))
def test_plans_of_unfinished_fits(content: bytes, made: Path) -> None:
    folder = made / "unfinished-fit"
    (folder / "unfinished").mkdir(parents=True, exist_ok=True)
    (folder / "unfinished" / "fit.json").write_bytes(content)

    def resume() -> None:
        with FitFolder(folder, resume=True).claimed() as place:
            place.begin({"format": "prototok.unfinished_fit", "version": 1, "texts": 2}, 0)

    assert read_or_refuse(resume)
    assert (folder / "unfinished" / "fit.json").read_bytes() == content


def test_nothing_of_ours_unpickles() -> None:
    """What would run something that a file says is nowhere in the package."""
    package = Path(prototok.__file__).parent
    runs = re.compile(
        r"import pickle|pickle\.load|torch\.load\(|yaml\.load\(|trust_remote_code=True"
        r"|(?<![.\w])(?:eval|exec)\("
    )
    for path in package.rglob("*.py"):
        assert not runs.search(path.read_text(encoding="utf-8")), path
