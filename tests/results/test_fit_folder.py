"""A user's files: what is ours is replaced when asked to, nothing else is, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

import prototok
from prototok import FitResult
from prototok.cli import main
from prototok.common import files
from prototok.results import fit_folder
from prototok.results.fit_folder import FitFolder
from prototok.results.fit_result import join
from prototok.results.unfinished import Unfinished

BOOK = (Path(prototok.__file__).parent / "models/tiny-llama/held_out.txt").read_text()[:90]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(BOOK)
    return tmp_path


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


def fit(*arguments: str, limit: int = 4, length: int = 1) -> int:
    """`prototok fit` of one token a chunk, which takes no time."""
    options = ["--length", str(length), "--limit", str(limit), "--device", "cpu"]
    return cli("fit", "book.txt", "-o", "F", *options, *arguments)


def stop_after(commits: int, monkeypatch: pytest.MonkeyPatch, how: BaseException) -> None:
    """Have the fit end by `how` when so many chunks are kept."""
    real, kept = FitFolder.commit, []

    def commit(self: FitFolder, text: int, result: FitResult) -> None:
        if len(kept) == commits:
            raise how
        real(self, text, result)
        kept.append(text)

    monkeypatch.setattr(FitFolder, "commit", commit)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_a_fit_is_not_overwritten_without_a_word(home: Path, capsys) -> None:
    assert fit() == 0
    before = tree(home)
    assert fit(limit=2) == 2
    assert "out: F holds an earlier fit of 4 texts; give --overwrite" in capsys.readouterr().err
    assert tree(home) == before
    assert fit("--overwrite", limit=2) == 0
    assert FitResult.load("F").tokens.texts == 2
    assert sorted(os.listdir("F")) == ["fits.parquet", "proto_tokens.safetensors"]


def test_the_users_own_files_stay(home: Path) -> None:
    """In the folder, and in its neighbours F.tmp and F.old."""
    assert fit(limit=1) == 0
    for folder in ("F", "F.tmp", "F.old", "F/unfinished"):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "thesis.txt").write_text("years of work")
    (home / "proto_tokens.safetensors.tmp").write_text("mine, too")
    kept = {name: content for name, content in tree(home).items() if "thesis" in name}
    assert fit("--overwrite", limit=2) == 0
    after = tree(home)
    assert {name: after[name] for name in kept} == kept
    assert FitResult.load("F").tokens.texts == 2
    assert (home / "proto_tokens.safetensors.tmp").read_text() == "mine, too"


@pytest.mark.parametrize("name", ["fits.parquet", "proto_tokens.safetensors"])
def test_a_file_that_only_has_our_name_is_left_alone(name: str, home: Path, capsys) -> None:
    assert fit(limit=1) == 0
    (home / "F" / name).write_text("not ours")
    before = tree(home)
    assert fit("--overwrite") == 2
    assert f"F/{name} was not written by prototok and is left as it is" in capsys.readouterr().err
    assert tree(home) == before
    with pytest.raises(ValueError, match="left as it is"):
        made_result().save(home / "F", overwrite=True)


def test_more_is_never_replaced_by_less_when_a_rerun_is_interrupted(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert fit(limit=4) == 0
    before = (home / "F/fits.parquet").read_bytes()
    with monkeypatch.context() as patched:
        stop_after(1, patched, KeyboardInterrupt())
        assert fit("--overwrite", limit=4) == 130
    assert "1 of 4 chunks" in capsys.readouterr().err
    assert (home / "F/fits.parquet").read_bytes() == before
    assert FitResult.load("F").tokens.texts == 4
    assert fit("--resume", limit=4) == 0
    assert "1 of 4 chunks are done already" in capsys.readouterr().err
    assert FitResult.load("F").tokens.texts == 4


def test_resuming_gives_the_fit_that_was_never_interrupted(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert fit(limit=5) == 0
    shutil.move("F", "G")
    with monkeypatch.context() as patched:
        stop_after(2, patched, KeyboardInterrupt())
        assert fit(limit=5) == 130
    assert "interrupted; 2 of 5 chunks are in F" in capsys.readouterr().err
    assert FitResult.load("F").tokens.texts == 2  # what had ended can be decoded
    assert cli("decode", "F", "--device", "cpu") == 0
    said = capsys.readouterr().err
    assert "unfinished: 3 more chunks are missing" in said
    assert "text exact: no, chunks are missing" in said
    assert fit(limit=5) == 2
    assert "holds an unfinished fit of 2 texts; give --resume" in capsys.readouterr().err
    assert fit("--resume", length=2) == 2
    assert "resume: F holds a fit of other texts, targets" in capsys.readouterr().err
    assert fit("--resume", limit=5) == 0
    went_on, straight = FitResult.load("F"), FitResult.load("G")
    assert [ids.tolist() for ids in went_on.targets] == [ids.tolist() for ids in straight.targets]
    assert torch.equal(went_on.exact, straight.exact)
    torch.testing.assert_close(went_on.tokens.e, straight.tokens.e, rtol=1e-3, atol=1e-3)
    assert sorted(os.listdir("F")) == ["fits.parquet", "proto_tokens.safetensors"]
    before = tree(home / "F")
    assert fit("--resume", limit=5) == 0  # nothing to do any more
    assert tree(home / "F") == before


def test_a_disk_that_fills_up_loses_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    with monkeypatch.context() as patched:
        stop_after(2, patched, OSError(errno.ENOSPC, "No space left on device"))
        assert fit() == 3
    said = capsys.readouterr().err
    assert "F cannot be written any more (No space left on device); 2 of 4 chunks" in said
    assert fit("--resume") == 0
    assert FitResult.load("F").tokens.texts == 4


def test_a_disk_that_is_too_small_is_told_before_the_first_step(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    usage = shutil.disk_usage(home)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert fit() == 2
    assert "out: F has room for 0.0 MB, and this fit takes about" in capsys.readouterr().err
    assert os.listdir() == ["book.txt"]


def test_a_disk_that_is_full_is_told_before_the_model_loads(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    monkeypatch.setattr("prototok.model.load.load", None)
    assert fit() == 2
    assert "out: F cannot be written (No space left on device)" in capsys.readouterr().err
    assert os.listdir() == ["book.txt"]


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("book.txt", "folder: book.txt is a file"),
        ("book.txt/sub", "out: book.txt/sub cannot be written (Not a directory)"),
        (".", "folder: . exists and holds something else than a fit"),
    ],
)
def test_a_place_that_cannot_be_is_told_before_the_model_loads(
    out: str, says: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("prototok.model.load.load", None)
    assert cli("fit", "book.txt", "-o", out) == 2
    assert says in capsys.readouterr().err
    assert tree(home) == {"book.txt": BOOK.encode()}


def test_the_folder_one_stands_in_is_a_place(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "empty").mkdir()
    monkeypatch.chdir(home / "empty")
    options = ["--length", "1", "--limit", "1", "--device", "cpu"]
    assert cli("fit", "../book.txt", "-o", ".", *options) == 0
    assert FitResult.load(home / "empty").tokens.texts == 1


def made_result() -> FitResult:
    lm = prototok.load("tiny-llama", device="cpu")
    return prototok.fast_fit(lm, [[5], [6], [7]], recipe=prototok.Recipe(max_steps=3))


def test_save_replaces_no_larger_fit(tmp_path: Path) -> None:
    result = made_result()
    result.save(tmp_path / "F")
    result.save(tmp_path / "F")  # of the same size
    small = join([part_of(result, 0)])
    with pytest.raises(ValueError, match="holds a fit of 3 texts, and this one has 1; pass over"):
        small.save(tmp_path / "F")
    small.save(tmp_path / "F", overwrite=True)
    assert FitResult.load(tmp_path / "F").tokens.texts == 1


def part_of(result: FitResult, text: int) -> FitResult:
    names = ("accuracy", "exact", "margin", "correct", "loss", "steps", "seconds", "seed")
    return FitResult(
        tokens=result.tokens.select([text]), targets=[result.targets[text]],
        accuracy_in_batch=result.accuracy_in_batch[text : text + 1],
        **{name: getattr(result, name)[text : text + 1] for name in names},
    )  # fmt: skip


def test_join_undoes_taking_apart(tmp_path: Path) -> None:
    result = made_result()
    again = join([part_of(result, t) for t in range(3)])
    assert torch.equal(again.tokens.e, result.tokens.e)
    assert torch.equal(again.steps, result.steps)
    assert [ids.tolist() for ids in again.targets] == [[5], [6], [7]]


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_save_that_stops_at_any_call_is_seen(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the folder then is the old fit, the new one, or said to be cut short."""
    result = made_result()
    result.save(tmp_path / "F")
    small, calls = part_of(result, 1), 0

    def stopping(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    real = os.replace
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stopping)
        try:
            small.save(tmp_path / "F", overwrite=True)
        except OSError:
            assert stop <= calls
    try:
        assert FitResult.load(tmp_path / "F").tokens.texts in (1, 3)
    except ValueError as error:
        assert "3 fits, 1 vectors" in str(error) or "a save was cut short" in str(error)
    assert sorted(os.listdir(tmp_path / "F")) == ["fits.parquet", "proto_tokens.safetensors"]


def test_an_interrupt_behind_the_last_rename_leaves_a_whole_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def interrupted(source: Path, target: Path) -> None:
        real(source, target)
        if Path(target).name == "fits.parquet":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made_result().save(tmp_path / "F")
    assert FitResult.load(tmp_path / "F").tokens.texts == 3


def test_vectors_of_one_fit_do_not_go_with_measurements_of_another(tmp_path: Path) -> None:
    result = made_result()
    result.save(tmp_path / "F")
    moved = result.tokens.e + 1
    object.__setattr__(result.tokens, "e", moved)
    result.tokens.save(tmp_path / "F" / "proto_tokens.safetensors")
    with pytest.raises(ValueError, match="the vectors of one fit and the measurements of another"):
        FitResult.load(tmp_path / "F")


def test_vectors_take_the_place_of_vectors_alone(tmp_path: Path) -> None:
    tokens = made_result().tokens
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"path: .*thesis\.txt was not written by prototok"):
        tokens.save(tmp_path / "thesis.txt")
    (tmp_path / "t.safetensors.tmp").write_text("mine")
    tokens.save(tmp_path / "t.safetensors")
    tokens.save(tmp_path / "t.safetensors")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "t.safetensors.tmp").read_text() == "mine"


def test_temporary_files_of_the_dead_are_removed_and_no_others(tmp_path: Path) -> None:
    names = [f".a~{files.host()}.0.999999999", f"b~{files.host()}.999999999"]
    stay = [f".a~{files.host()}.0.{os.getpid()}", ".a~00000000.0.999999999", "notes~2", "~"]
    for name in names + stay:
        (tmp_path / name).write_text("")
    assert files.remove_orphans(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == sorted(stay)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--recipe", "fsat", "recipe: 'fsat' is not"),
        ("--share", "both", "share: 'both' is not None, 'm' or 'e'"),
        ("--arrangement", "m e*", "arrangement: 'm e*' is not known"),
        ("--seeds", "0", "seeds: 0 is not a positive integer"),
        ("--length", "-3", "length: -3 is not a positive integer"),
        ("--limit", "0", "limit: 0 is not a positive integer"),
        ("--batch-size", "0", "batch_size: 0 is not a positive integer"),
    ],
)
def test_arguments_are_checked_before_the_model_loads(
    option: str, value: str, says: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("prototok.model.load.load", None)
    assert cli("fit", "book.txt", "-o", "F", option, value) == 2
    assert says in capsys.readouterr().err
    assert os.listdir() == ["book.txt"]


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_an_end_while_clearing_up_is_no_loss(removed: int, home: Path, monkeypatch, capsys) -> None:
    """The whole fit is there; of what was kept on the way some texts are gone already."""
    with monkeypatch.context() as patched:
        patched.setattr(fit_folder, "_remove", lambda text: None)
        assert fit(limit=2) == 0
    assert len(os.listdir(home / "F" / "unfinished")) == 2
    for text in range(removed):
        shutil.rmtree(home / "F" / "unfinished" / f"{text:08d}")
    before = (home / "F/fits.parquet").read_bytes()
    assert fit("--resume", limit=2) == 0
    assert "2 of 2 chunks are done already" in capsys.readouterr().err
    assert (home / "F/fits.parquet").read_bytes() == before
    assert sorted(os.listdir("F")) == ["fits.parquet", "proto_tokens.safetensors"]


def test_a_save_cut_short_is_made_good_by_resuming(home: Path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Unfinished, "clear", lambda self: None)
        assert fit(limit=2) == 0
    FitResult.load(home / "F" / "unfinished" / "00000000").tokens.save(
        home / "F" / "proto_tokens.safetensors"
    )
    with pytest.raises(ValueError, match="2 fits, 1 vectors"):
        FitResult.load(home / "F")
    assert fit("--resume", limit=2) == 0
    assert FitResult.load(home / "F").tokens.texts == 2


DEAD = f"~{files.host()}.0.999999999"  # how a process that was killed named what it was writing


def test_a_chunk_that_was_killed_between_its_two_files_is_fitted_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_after(2, patched, KeyboardInterrupt())
        assert fit() == 130
    folder = home / "F" / "unfinished"
    kept = next(folder.glob("0*"))
    cut = next(path for t in range(4) if not (path := folder / f"{t:08d}").exists())
    cut.mkdir()
    shutil.copy(kept / "proto_tokens.safetensors", cut)
    (cut / f".fits.parquet{DEAD}").write_bytes(b"PAR1")
    assert fit("--resume") == 0
    assert FitResult.load("F").tokens.texts == 4
    assert sorted(os.listdir("F")) == ["fits.parquet", "proto_tokens.safetensors"]


@pytest.mark.parametrize(
    "left", [[f".trial{DEAD}"], [f"unfinished/.fit.json{DEAD}"], ["unfinished/00000001/x"]]
)
def test_a_place_that_a_process_was_killed_in_can_be_used(left: list[str], home: Path) -> None:
    for name in left:
        (home / "F" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "F" / name).write_bytes(b"")
    assert fit(limit=1) == 0
    assert FitResult.load("F").tokens.texts == 1


def test_a_save_that_was_killed_between_its_two_files_can_be_made_again(tmp_path: Path) -> None:
    result = made_result()
    result.save(tmp_path / "F")
    (tmp_path / "F" / "fits.parquet").rename(tmp_path / "F" / f".fits.parquet{DEAD}")
    result.save(tmp_path / "F")
    assert FitResult.load(tmp_path / "F").tokens.texts == 3
    assert sorted(os.listdir(tmp_path / "F")) == ["fits.parquet", "proto_tokens.safetensors"]
    (tmp_path / "F" / "fits.parquet").unlink()
    with pytest.raises(ValueError, match="holds something else than a fit"):
        result.save(tmp_path / "F")  # vectors that somebody saved alone
