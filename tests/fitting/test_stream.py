"""Many texts: shards that depend on their texts alone, whatever stops the work between them."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import prototok
from prototok import FitResult, FrozenLM, Recipe, Shards, fast_fit, fit_stream
from prototok.cli import main
from prototok.common import files
from prototok.results.shards import Shard, ShardFolder
from prototok.texts.targets import text_id

QUICK = Recipe(lr=0.1, betas=(0.9, 0.99), max_steps=60)
TEXTS = [[5, 9, 2], [7, 3], [1], [8, 8, 4], [2, 6], [9, 1, 1], [3]]
DEAD = f"~{files.host()}.0.999999999"  # how a process that was killed named what it was writing


def stream(lm: FrozenLM, texts: object, folder: Path, **options: object) -> object:
    options = {"shard": 3, "recipe": QUICK, "batch_size": 3, "progress": False} | options
    return fit_stream(lm, texts, folder, **options)  # type: ignore[arg-type]


def same(a: Path, b: Path) -> bool:
    """Two folders have the same files, and the same in them but for seconds."""
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (a, b)]
    if names[0] != names[1]:
        return False
    for name in names[0]:
        ours, theirs = a / name, b / name
        if name.endswith(".parquet"):
            tables = [pq.read_table(p).drop_columns(["seconds"]) for p in (ours, theirs)]
            alike = tables[0].equals(tables[1])
        else:
            alike = ours.is_dir() or ours.read_bytes() == theirs.read_bytes()
        if not alike:
            return False
    return True


@pytest.fixture(scope="module")
def straight(small_lm: FrozenLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "F"
    stream(small_lm, iter(TEXTS), folder)
    return folder


def test_shards_hold_what_fast_fit_finds_of_their_texts(straight: Path, small_lm: FrozenLM) -> None:
    shards = Shards(straight)
    assert len(shards) == 3 and shards.complete
    for shard, texts in zip(shards, (TEXTS[:3], TEXTS[3:6], TEXTS[6:]), strict=True):
        fit = fast_fit(small_lm, texts, recipe=QUICK, batch_size=3, progress=False)
        assert torch.equal(shard.vectors["e"], fit.tokens.e)
        assert torch.equal(shard.vectors["m"], fit.tokens.m)
        assert torch.equal(shard.load().steps, fit.steps)
        records = shard.records
        assert records["targets"].to_pylist() == texts
        assert records["text_id"].to_pylist() == [text_id(ids) for ids in texts]
        assert records["steps"].to_pylist() == fit.steps[:, 0].tolist()
        assert records["exact"].to_pylist() == fit.exact[:, 0].tolist()
        assert records["margin"].to_pylist() == fit.margin[:, 0].tolist()
        assert records["prefix"].to_pylist() == [None] * len(texts)
    numbers = [n for shard in shards for n in shard.records["number"].to_pylist()]
    assert numbers == list(range(7))
    found = shards.summary()
    assert (found.texts, found.shards, found.refused, found.failed) == (7, 3, 0, 0)
    exact = [e for shard in shards for e in shard.records["exact"].to_pylist()]
    assert found.exact == sum(exact) > 3
    assert json.loads((straight / "summary.json").read_text())["texts"] == 7


def test_seeds_and_a_prefix_are_in_the_records(small_lm: FrozenLM, tmp_path: Path) -> None:
    stream(small_lm, [[5, 9], [7]], tmp_path / "F", seeds=[4, 2], prefix=[11, 3])
    (shard,) = Shards(tmp_path / "F")
    assert shard.vectors["e"].shape == (2, 2, 32)
    records = shard.records
    assert records["number"].to_pylist() == [0, 0, 1, 1]
    assert records["seed"].to_pylist() == [4, 2, 4, 2]
    assert records["prefix"].to_pylist() == [[11, 3]] * 4
    assert records.schema.field("prefix").type == pa.list_(pa.int32())
    assert shard.load().tokens.prefix is not None


def test_vectors_are_mapped_and_not_read(straight: Path) -> None:
    shard = Shards(straight)[0]
    e = shard.vectors["e"]
    if Path("/proc/self/maps").exists():
        assert str(shard.folder / "proto_tokens.safetensors") in Path("/proc/self/maps").read_text()
    before = (shard.folder / "proto_tokens.safetensors").read_bytes()
    e += 1  # of the copy in memory
    assert (shard.folder / "proto_tokens.safetensors").read_bytes() == before


@pytest.mark.parametrize("stop", range(1, 15))
def test_a_stop_at_any_file_is_made_good_by_going_on(
    stop: int, straight: Path, small_lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a file gets its name: the plan, then four renames a shard, then the totals."""
    real, calls = os.replace, itertools.count(1)
    full = OSError(errno.ENOSPC, "No space left on device")
    how = full if stop % 2 else KeyboardInterrupt()

    def stopping(source: Path, target: Path) -> None:
        if next(calls) == stop:
            raise how
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stopping)
        with pytest.raises((KeyboardInterrupt, OSError)):
            stream(small_lm, iter(TEXTS), tmp_path / "F")
    kept = ShardFolder(tmp_path / "F").done()
    assert len(kept) == max(0, (stop - 2) // 4)
    if not kept:
        assert not (tmp_path / "F").exists()  # as if nobody had been there
    assert not any(files.is_temporary(path) for path in tmp_path.rglob("*"))
    fitted = fits_of(monkeypatch)
    stream(small_lm, iter(TEXTS), tmp_path / "F", resume=True)
    assert len(fitted) == 3 - len(kept)  # what was kept is not fitted again
    assert same(tmp_path / "F", straight)


def fits_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many texts each call of `fast_fit` gets."""
    real, seen = fast_fit, []

    def noting(lm: FrozenLM, texts: list, **options: object) -> FitResult:
        seen.append(len(texts))
        return real(lm, texts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("prototok.fitting.stream.fast_fit", noting)
    return seen


@pytest.mark.parametrize("left", ["no record", "half a file", "an empty folder"])
def test_what_a_kill_leaves_is_fitted_again(
    left: str, straight: Path, small_lm: FrozenLM, tmp_path: Path
) -> None:
    """Nothing is cleared up by who is killed."""
    stream(small_lm, TEXTS, tmp_path / "F")
    shard = tmp_path / "F" / "00000001"
    (shard / "shard.json").unlink()
    if left != "no record":
        (shard / "fits.parquet").unlink()
        (shard / "proto_tokens.safetensors").unlink()
    if left == "half a file":
        for folder in (shard, tmp_path / "F", tmp_path / "F" / "00000000"):
            (folder / f".fits.parquet{DEAD}").write_bytes(b"PAR1")
    assert ShardFolder(tmp_path / "F").done() == [0, 2]
    assert [s.number for s in Shards(tmp_path / "F")] == [0, 2]
    stream(small_lm, TEXTS, tmp_path / "F", resume=True)
    assert same(tmp_path / "F", straight)


def test_an_iterator_that_raises_loses_no_shard(
    straight: Path, small_lm: FrozenLM, tmp_path: Path
) -> None:
    class Lost(Exception):
        pass

    def texts() -> Iterator[list[int]]:
        yield from TEXTS[:5]
        raise Lost("the connection")

    with pytest.raises(Lost, match="^the connection$"):
        stream(small_lm, texts(), tmp_path / "F")
    assert len(Shards(tmp_path / "F")) == 1 and not Shards(tmp_path / "F").complete
    stream(small_lm, TEXTS, tmp_path / "F", resume=True)
    assert same(tmp_path / "F", straight)


def test_no_texts_at_all(small_lm: FrozenLM, tmp_path: Path) -> None:
    found = stream(small_lm, iter([]), tmp_path / "F")
    assert found == prototok.results.shards.StreamSummary(0, 0, 0, 0, 0, 0)
    assert len(Shards(tmp_path / "F")) == 0 and Shards(tmp_path / "F").complete


def test_bad_texts_are_recorded_and_stop_nothing(tiny_lm: FrozenLM, tmp_path: Path) -> None:
    bad = ["", [], [1.5], None, {"text": "a"}, "\ud800", [1 << 40], "Oh", [3] * 4000, b"no"]
    texts = ["Call me", [5, 6, 7], pa.scalar("Some years ago"), torch.tensor([8, 9]), *bad]
    found = stream(tiny_lm, texts, tmp_path / "F", length=2, shard=5, recipe=Recipe(max_steps=2))
    shards = Shards(tmp_path / "F")
    assert (found.texts, found.refused, found.shards) == (14, 9, 3)
    why = dict(shards.refused())
    assert sorted(why) == [4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert all(said.startswith(f"texts: text {n} ") and "\n" not in said for n, said in why.items())
    assert "is not valid Unicode" in why[9] and "fewer than length = 2" in why[11]
    numbers = [n for s in shards for n in s.records.to_pydict().get("number", [])]
    assert numbers == [0, 1, 2, 3, 12]  # a long one is cut
    assert shards[1].vectors == {} and shards[1].records.num_rows == 0
    with pytest.raises(ValueError, match="^shards: no text of shard 1 was fitted$"):
        shards[1].load()
    before = (tmp_path / "F" / "00000001" / "shard.json").read_bytes()
    stream(
        tiny_lm, texts, tmp_path / "F", length=2, shard=5, recipe=Recipe(max_steps=2), resume=True
    )
    assert (tmp_path / "F" / "00000001" / "shard.json").read_bytes() == before


def test_a_text_that_is_too_long_is_refused(small_lm: FrozenLM, tmp_path: Path) -> None:
    found = stream(small_lm, [[3] * 41, [5]], tmp_path / "F")
    ((number, why),) = Shards(tmp_path / "F").refused()
    assert number == 0 and found.refused == 1  # type: ignore[attr-defined]
    assert why.startswith("texts: text 0 is too long; length: 41 tokens need 41 positions")


def test_fits_that_fail_are_among_the_records(
    small_lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prototok.fitting.engine import step as step_module

    real = step_module.forward_backward

    def spoiled(*arguments: object) -> tuple[torch.Tensor, ...]:
        grads = real(*arguments)  # type: ignore[arg-type]
        slots = arguments[1]
        bad = slots.targets[arguments[3], 0] == 7  # type: ignore[attr-defined, index]
        return tuple(g.masked_fill(bad[:, None, None], float("nan")) for g in grads)

    monkeypatch.setattr(step_module, "forward_backward", spoiled)
    found = stream(small_lm, [[5, 9], [7, 3], [2]], tmp_path / "F")
    assert (found.failed, found.texts) == (1, 3)  # type: ignore[attr-defined]
    records = Shards(tmp_path / "F")[0].records
    assert records["margin"].to_pylist()[1] == float("-inf")
    assert records["exact"].to_pylist()[1] is False


def test_no_more_is_read_than_a_shard_and_none_is_held(
    small_lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, read_at_commit = itertools.count(), []
    held: list[weakref.ref] = []
    last = -1

    def texts() -> Iterator[list[int]]:
        nonlocal last
        for ids in TEXTS:
            last = next(taken)
            yield ids

    real = ShardFolder.commit

    def commit(self: ShardFolder, number: int, record: object, result: object, c: object) -> None:
        read_at_commit.append(last + 1)
        gc.collect()
        assert all(earlier() is None for earlier in held)
        held.append(weakref.ref(result))  # type: ignore[arg-type]
        real(self, number, record, result, c)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardFolder, "commit", commit)
    stream(small_lm, texts(), tmp_path / "F")
    assert read_at_commit == [3, 6, 7]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, r"^out: .*F holds 3 shards; give --resume to go on or --overwrite to start again$"),
        ({"resume": True, "shard": 4}, "holds a fit of other shard;"),
        ({"resume": True, "length": 1}, "holds a fit of other length;"),
        ({"resume": True, "seeds": [1]}, "holds a fit of other seeds;"),
        ({"resume": True, "recipe": Recipe(max_steps=61)}, "holds a fit of other recipe;"),
        ({"resume": True, "prefix": [3]}, "holds a fit of other prefix;"),
        ({"resume": True, "arrangement": "e*"}, "holds a fit of other arrangement;"),
        ({"resume": True, "texts": [*TEXTS[:4], [2, 7], *TEXTS[5:]]},
         r"holds a fit of other texts, or fewer, from shard 1 on \(text 3\); give --overwrite"),
        ({"resume": True, "texts": TEXTS[:2]}, "of other texts, or fewer, from shard 0 on"),
        ({"resume": True, "texts": [*TEXTS, [4]]}, "of other texts, or fewer, from shard 2 on"),
        ({"resume": True, "overwrite": True}, "^resume: give --resume to go on or"),
    ],
)  # fmt: skip
def test_nothing_else_is_gone_on_with(
    changes: dict, says: str, straight: Path, small_lm: FrozenLM
) -> None:
    before = {str(p): p.read_bytes() for p in straight.rglob("*") if p.is_file()}
    options = dict(changes)
    with pytest.raises(ValueError, match=says):
        stream(small_lm, options.pop("texts", TEXTS), straight, **options)
    assert {str(p): p.read_bytes() for p in straight.rglob("*") if p.is_file()} == before


def test_a_start_is_part_of_what_it_is(small_lm: FrozenLM, tmp_path: Path) -> None:
    def prior(value: float) -> prototok.Prior:
        d = small_lm.hidden_size
        return prototok.Prior(
            torch.full((2, d), value), torch.ones(2, d), torch.eye(d).repeat(2, 1, 1),
            small_lm.identity,
        )  # fmt: skip

    stream(small_lm, TEXTS[:3], tmp_path / "F", init=prior(0.0))
    stream(small_lm, TEXTS[:3], tmp_path / "F", init=prior(0.0), resume=True)
    with pytest.raises(ValueError, match="holds a fit of other init;"):
        stream(small_lm, TEXTS[:3], tmp_path / "F", init=prior(0.5), resume=True)


def test_overwriting_leaves_the_users_files(small_lm: FrozenLM, tmp_path: Path) -> None:
    stream(small_lm, TEXTS, tmp_path / "F")
    mine = [tmp_path / "F" / "notes.md", tmp_path / "F" / "00000001" / "notes.md"]
    for path in mine:
        path.write_text("years of work")
    stream(small_lm, TEXTS[:2], tmp_path / "F", overwrite=True)
    assert [path.read_text() for path in mine] == ["years of work"] * 2
    assert len(Shards(tmp_path / "F")) == 1


@pytest.mark.parametrize("name", ["thesis.txt", "fits.parquet"])
def test_a_folder_of_something_else_is_left_alone(
    name: str, small_lm: FrozenLM, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("mine")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"^out: .* exists and holds something else than sh"):
            stream(small_lm, TEXTS, tmp_path, **options)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"
    with pytest.raises(ValueError, match=r"^out: .* is a file$"):
        stream(small_lm, TEXTS, tmp_path / name)
    with pytest.raises(ValueError, match=r"^shards: .* holds no shards"):
        Shards(tmp_path)


def test_every_shard_is_a_fit_that_can_be_decoded(straight: Path, small_lm: FrozenLM) -> None:
    shard: Shard = Shards(straight)[1]
    tokens = shard.load().tokens
    decoded = prototok.decode(small_lm, tokens)
    for row, ids, exact in zip(decoded, TEXTS[3:6], shard.load().exact[:, 0], strict=True):
        assert not exact or row[: len(ids)].tolist() == ids


EARLY = """
import os, sys
from prototok.cli import main
from prototok.commands import dataset
real = dataset._keep_caches_small
def checked():
    assert "torch" not in sys.modules
    real()
    print([os.environ[n] for n in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")])
    raise SystemExit(0)
dataset._keep_caches_small = checked
main(["dataset", "a.txt", "-o", "F"])
"""


def test_caches_are_limited_before_torch_reads_how_large_they_are(tmp_path: Path) -> None:
    """Else memory grows by a gigabyte; what the user has set stays."""
    (tmp_path / "a.txt").write_text("a\n")
    done = subprocess.run(
        [sys.executable, "-c", EARLY], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"LRU_CACHE_CAPACITY": "9", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "['64', '9']"), done.stderr


def test_the_command_reads_files_of_every_kind_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_bytes(b"Call me\r\n\nd\xe9j\xe0\n")
    Path("b.jsonl").write_text('{"text": "some"}\nnot json\n{"text": [5, 6]}\n')
    pq.write_table(pa.table({"text": [[7], [8, 9]]}), "c.parquet")
    command = ["dataset", "a.txt", "*.jsonl", "c.parquet", "-o", "F", "--shard", "4", "--length"]
    command += ["1", "--device", "cpu", "--max-steps", "40"]

    def cli(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*command, *arguments])
        return int(ended.value.code or 0), capsys.readouterr().err

    real = ShardFolder.commit
    with monkeypatch.context() as patched:

        def commit(self: ShardFolder, number: int, *rest: object) -> None:
            if number == 1:
                raise KeyboardInterrupt
            real(self, number, *rest)  # type: ignore[arg-type]

        patched.setattr(ShardFolder, "commit", commit)
        assert cli() == (130, "interrupted; 1 shards are in F, and --resume goes on from there\n")
    code, said = cli("--resume")
    totals, why = said.splitlines()
    assert code == 0 and totals.endswith(" exact, 3 refused; written to F")
    assert totals.startswith("8 texts in 2 shards, ")
    assert why.startswith("text 1 was refused (texts: text 1 is empty); ")
    assert dict(Shards("F").refused()) == {
        1: "texts: text 1 is empty",
        2: "texts: text 2 could not be read, line 3 of a.txt is not UTF-8",
        4: "texts: text 4 could not be read, line 2 of b.jsonl is no JSON with 'text' "
           "(JSONDecodeError('Expecting value: line 1 column 1 (char 0)'))",
    }  # fmt: skip
    assert Shards("F")[1].records["targets"].to_pylist()[-2:] == [[7], [8]]
