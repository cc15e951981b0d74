"""The command line as a user types it: exit codes, files, and what stays whole when it fails."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import prototok
from prototok import FitResult, LearnedOptimizer
from prototok.cli import app, main
from prototok_kernels.backend import this_machine
from support import small_llama

HELD_OUT = Path(prototok.__file__).parent / "models" / "tiny-llama" / "held_out.txt"


def prototok_cli(*arguments: str, cwd: Path, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "prototok", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("books") / "book.txt"
    path.write_text(HELD_OUT.read_text()[:160])
    return path


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(("arguments", "code"), [(["env"], 0), (["decode", "nothing-there"], 2)])
def test_a_reader_that_goes_away_is_no_error(
    arguments: list[str], code: int, buffered: bool, tmp_path: Path
) -> None:
    """As `prototok env | head -0` does; what else is wrong is still said."""
    process = subprocess.Popen(
        [sys.executable, *([] if buffered else ["-u"]), "-m", "prototok", *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # long before anything is printed
    with process.stderr as stderr:
        said = stderr.read()
    assert process.wait() == code and "Pipe" not in said and "Traceback" not in said, said
    assert bool(said.strip()) == bool(code)


def test_fit_then_decode_gives_the_book_back(book: Path, tmp_path: Path) -> None:
    made = prototok_cli("fit", str(book), "--length", "4", "-o", "tokens", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "tiny-llama: llama (its own forward)" in made.stderr
    read = prototok_cli("decode", "tokens", cwd=tmp_path)
    assert read.returncode == 0, read.stderr
    fit = FitResult.load(tmp_path / "tokens")
    exact = int(fit.exact.sum())
    assert f"{exact} of {fit.tokens.texts} chunks are exact" in read.stderr
    assert exact >= 0.9 * fit.tokens.texts
    if exact == fit.tokens.texts:
        assert read.stdout == book.read_text() + "\n"
    # Only what went wrong is named.
    assert read.stderr.count("chunk ") == fit.tokens.texts - exact


def test_what_learn_writes_is_what_fit_starts_from(book: Path, tmp_path: Path) -> None:
    learn = ["learn", "optimizer", "--book", str(book), "--lengths", "2", "--steps", "1"]
    made = prototok_cli(*learn, "-o", "first.safetensors", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    begun = ["--init", "first.safetensors", "-o", "opt.safetensors"]
    more = prototok_cli(*learn, *begun, cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    made_by = LearnedOptimizer.load(tmp_path / "opt.safetensors").start.provenance
    assert made_by["init"] == "LearnedOptimizer trained at N = 2 for 1 steps"
    fit = ["fit", str(book), "--length", "2", "--limit", "2", "--recipe", "learned", "-o", "tokens"]
    done = prototok_cli(*fit, "--init", "opt.safetensors", cwd=tmp_path)
    assert done.returncode == 0 and "2 exact" in done.stderr, done.stderr
    recipe = FitResult.load(tmp_path / "tokens").tokens.provenance["recipe"]
    assert json.loads(recipe)["name"].startswith("learned from ")
    again = prototok_cli(*fit, "--init", "opt.safetensors", "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    shipped = prototok_cli(*fit, "--overwrite", cwd=tmp_path)  # the model brings one
    assert shipped.returncode == 0 and "2 exact" in shipped.stderr, shipped.stderr
    for wrong, said in (
        ([*fit, "--init", str(book), "--overwrite"], "init: "),
        (["learn", "optimizer", "--init", str(book), "-o", "x"], "init: "),
        (["learn", "optimizer", "-o", str(book)], "out: "),
        (["learn", "optimizer", "--lengths", "a,b", "-o", "x"], "lengths: "),
    ):
        refused = prototok_cli(*wrong, cwd=tmp_path)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr


def test_an_encoder_encodes_and_fits_start_from_it(book: Path, tmp_path: Path) -> None:
    learn = ["learn", "encoder", "--book", str(book), "--lengths", "2", "--steps", "1"]
    made = prototok_cli(*learn, "-o", "enc.safetensors", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    encode = ["encode", str(book), "--encoder", "enc.safetensors", "--limit", "3", "-o", "tokens"]
    done = prototok_cli(*encode, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = FitResult.load(tmp_path / "tokens")
    exact, right = int(found.exact.sum()), int(found.correct.sum()) / 6
    assert f"3 chunks, 6 tokens, {exact} exact, {right:.3f} of tokens right" in done.stderr
    assert prototok_cli("decode", "tokens", cwd=tmp_path).returncode == 0
    fit = ["fit", str(book), "--length", "2", "--limit", "2", "-o", "fits"]
    fitted = prototok_cli(*fit, "--init", "enc.safetensors", cwd=tmp_path)
    assert fitted.returncode == 0 and "2 exact" in fitted.stderr, fitted.stderr
    own = ["encode", str(book), "--model", "tiny-neox", "--limit", "3", "-o", "own"]
    brought = prototok_cli(*own, cwd=tmp_path)  # the model brings one
    assert brought.returncode == 0 and "3 chunks, 24 tokens" in brought.stderr, brought.stderr
    for wrong, said in (
        (encode, "out: "),
        ([*encode, "--length", "3", "--overwrite"], "texts: text 0 has 3 tokens, more than the 2"),
        ([*encode, "--model", "tiny-neox", "--overwrite"], "encoder: fitted on tiny-llama"),
        ([*fit, *2 * ["--init", "enc.safetensors"], "--overwrite"], "init: two files are"),
    ):
        refused = prototok_cli(*wrong, cwd=tmp_path)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr


def test_learn_prior_writes_a_prior(book: Path, tmp_path: Path) -> None:
    learn = ["learn", "prior", "--book", str(book), "--length", "4", "-o", "prior.safetensors"]
    made = prototok_cli(*learn, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert prototok.Prior.load(tmp_path / "prior.safetensors").provenance["length"] == "4"
    short = tmp_path / "short.txt"  # its last piece is no whole one
    short.write_text("It was a dark and stormy night, and", encoding="utf-8")
    again = [*learn[:3], str(short), *learn[4:-1], "other.safetensors"]
    assert prototok_cli(*again, cwd=tmp_path).returncode == 0
    short.write_text("It was", encoding="utf-8")
    refused = prototok_cli(*again, cwd=tmp_path)
    assert refused.returncode == 2 and "fewer than 4 tokens" in refused.stderr


def test_a_prefix_is_fitted_behind_and_decoded_behind(book: Path, tmp_path: Path) -> None:
    fit = ["fit", str(book), "--length", "2", "--limit", "2", "-o", "tokens"]
    made = prototok_cli(*fit, "--prefix", " the", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "in front: ' the', token " in made.stderr
    tokens = FitResult.load(tmp_path / "tokens").tokens
    assert tokens.prefix is not None
    read = prototok_cli("decode", "tokens", cwd=tmp_path)
    assert "2 of 2 chunks are exact" in read.stderr
    other = prototok_cli(*fit, "--prefix", "none", "--resume", cwd=tmp_path)
    assert other.returncode == 2 and "holds a fit of other prefix" in other.stderr


def test_a_dataset_says_why_a_text_was_refused(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("It was a dark night.\nHe\n")
    made = prototok_cli("dataset", "lines.txt", "--length", "3", "-o", "F", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "text 1 was refused (" in made.stderr and "1 refused" in made.stderr
    assert "every reason is in F/*/shard.json" in made.stderr


def test_decoding_with_another_model_is_refused(book: Path, tmp_path: Path) -> None:
    prototok_cli("fit", str(book), "--length", "2", "--limit", "1", "-o", "tokens", cwd=tmp_path)
    wrong = prototok_cli("decode", "tokens", "--model", "tiny-neox", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("prototok: tokens: fitted on tiny-llama")


def test_decoding_with_another_tokenizer_is_refused(book: Path, tmp_path: Path) -> None:
    """The same weights; its ids would be printed as other words, and called exact."""
    prototok_cli("fit", str(book), "--length", "2", "--limit", "1", "-o", "tokens", cwd=tmp_path)
    shutil.copytree(HELD_OUT.parent, tmp_path / "other")
    rules = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    words = sorted(rules["model"]["vocab"], key=rules["model"]["vocab"].get)
    turned = words[:300] + words[:299:-1]
    rules["model"]["vocab"] = {word: i for i, word in enumerate(turned)}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(rules))
    wrong = prototok_cli("decode", "tokens", "--model", "other", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("prototok: tokens: fitted with another tokenizer")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit", "nowhere.txt", "-o", "t"], "prototok: text: there is no file nowhere.txt"),
        (["fit", "empty.txt", "-o", "t"], "prototok: text: empty.txt is empty"),
        (["fit", "latin.txt", "-o", "t"], "prototok: text: latin.txt is not UTF-8"),
        (["fit", "book.txt", "-o", "t", "--length", "0"], "prototok: length: 0 is not"),
        (["fit", "book.txt", "-o", "t", "--length", "1.5"], "prototok fit"),
        (["fit", "book.txt", "-o", "t", "--length", "9999"], "prototok: texts: text 0 is too long"),
        (["fit", "book.txt", "-o", "t", "--limit", "0"], "prototok: limit: 0 is not"),
        (["fit", "book.txt", "-o", "t", "--recipe", "x"], "prototok: recipe: 'x' is not"),
        (
            ["fit", "book.txt", "-o", "t", "--model", "no/where"],
            "prototok: model: 'no/where' is no",
        ),
        (["fit", "book.txt", "-o", "book.txt"], "prototok: folder: book.txt is a file"),
        (["fit", "book.txt", "-o", "full"], "prototok: folder: full exists and holds something"),
        (["decode", "full"], "prototok: folder: full holds no fit"),
        (["decode", "shards"], "it is a folder of shards; shards/00000000 is the first of them"),
        (["fit", "book.txt", "-o", "t", "--model", "book.txt"], "model: book.txt is a file, and"),
        (["learn", "prior", "-o", "p", "--length", "4000"], "length: 4000 tokens need 4000 pos"),
        (["bench", "--lengths", "a,b"], "prototok: lengths: 'a,b' is not a list"),
        (["bench", "--lengths", "0"], "prototok: length: 0 is not a positive integer"),
        (["bench", "--shape", "gpt-5"], "prototok: shape: 'gpt-5' is not one of"),
        (["bench", "--texts", "0"], "prototok: texts: 0 is not"),
        (["bench", "--shape", "pythia-160m", "--model", "x"], "prototok: shape: give a model or"),
        (["fit", "bok.txt", "-o", "t"], "no file bok.txt; did you mean 'book.txt'?"),
        (["fit", "book.txt", "-o", "t", "--recipe", "fsat"], "did you mean 'fast'?"),
        (["fit", "book.txt", "-o", "t", "--model", "tiny-lama"], "did you mean 'tiny-llama'?"),
        (["fit", "book.txt", "-o", "t", "--device", "cuad"], "did you mean 'cuda'?"),
        (["fit", "book.txt", "-o", "t", "--dtype", "bfloat61"], "did you mean 'bfloat16'?"),
        (["fit", "book.txt", "-o", "t", "--arrangement", "e m"], "did you mean 'e m*'?"),
        (["fit", "book.txt", "-o", "t", "--max-steps", "0"], "prototok: max_steps: 0 is not"),
        (["profile", "fitt"], "did you mean 'fit'?"),
        (["profile", "--backend", "tritan"], "did you mean 'triton'?"),
        (["bench", "--shape", "pythia160m"], "did you mean 'pythia-160m'?"),
        (["sweep", "plan", "tabel1", "-o", "r"], "did you mean 'table1'?"),
        (["sweep", "plan", "table1", "-o", "r", "--preset", "smal"], "did you mean 'small'?"),
        (["unknown"], "unknown"),
        (["fit"], "prototok fit"),
    ],
)
def test_bad_usage_is_exit_code_2_and_writes_nothing(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 2500)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "shards" / "00000000").mkdir(parents=True)
    (tmp_path / "shards" / "00000000" / "fits.parquet").write_bytes(b"")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_fit_that_is_stopped_keeps_what_had_ended(how: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(HELD_OUT.read_text())
    command = [sys.executable, "-m", "prototok", "fit", "book.txt", "--length", "2", "-o", "tokens"]
    command += ["--batch-size", "4", "--limit", "2000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        # What runs in a shell's background ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("tokens/unfinished/*/fits.parquet"))) < 3:
            assert time.monotonic() < end and process.poll() is None, "no chunk was kept"
            time.sleep(0.05)
        process.send_signal(how)
        said = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    kept = len(list(tmp_path.glob("tokens/unfinished/*/fits.parquet")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book.txt", "tokens"]
    if how is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, said
        assert FitResult.load(tmp_path / "tokens").tokens.texts == kept
        assert f"interrupted; {kept} of 2000 chunks are in tokens" in said
    command[command.index("2000")] = str(kept)
    other = prototok_cli(*command[3:], "--resume", cwd=tmp_path)
    assert other.returncode == 2 and "tokens holds a fit of other texts" in other.stderr


def test_the_steps_are_those_asked_for(book: Path, tmp_path: Path) -> None:
    made = prototok_cli(
        "fit", str(book), "--length", "8", "--limit", "2", "--max-steps", "3", "-o", "t",
        cwd=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    fit = FitResult.load(tmp_path / "t")
    assert fit.steps.tolist() == [[3], [3]]
    assert json.loads(fit.tokens.provenance["recipe"])["max_steps"] == 3
    assert "2 texts of 2 did not come back whole" in made.stderr
    read = prototok_cli("decode", "t", cwd=tmp_path)
    assert read.stderr.count("of 8 tokens right") == 2


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    shown = prototok_cli("--version", cwd=tmp_path)
    assert shown.returncode == 0 and shown.stdout == f"prototok {prototok.__version__}\n"


def test_no_help_has_brackets_which_the_terminal_would_take_for_markup() -> None:
    def said(command: Any) -> Iterator[str]:
        yield command.help or ""
        yield from (getattr(option, "help", None) or "" for option in command.params)
        for inner in getattr(command, "commands", {}).values():
            yield from said(inner)

    texts = list(said(typer.main.get_command(app)))
    assert len(texts) > 100 and not [text for text in texts if "[" in text]


def test_env_and_help_answer_fast(tmp_path: Path) -> None:
    shown = prototok_cli("env", cwd=tmp_path)
    assert shown.returncode == 0 and "\ntransformers: " in shown.stdout
    assert f"prototok: {prototok.__version__}\n" in shown.stdout
    (kernels,) = re.findall(r"C\+\+ kernels: (.*)", shown.stdout)
    built = this_machine()
    assert kernels.startswith("not built") != built.cpp
    assert all(name in kernels for name in built.instruction_sets)
    code = "import sys, prototok.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    helped = prototok_cli("--help", cwd=tmp_path)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert helped.returncode == 0 and "bench" in helped.stdout
    # Of the processor, for a machine may be busy: 0.2 s, and 4 with torch and transformers.
    assert spent.ru_utime - before.ru_utime < 1.0


def test_general_family_says_so(book: Path, tmp_path: Path) -> None:
    small_llama(
        vocab_size=4096, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_text((HELD_OUT.parent / name).read_text())
    made = prototok_cli(
        "fit",
        str(book),
        "--length",
        "1",
        "--limit",
        "1",
        "--model",
        "model",
        "-o",
        "t",
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    assert "model: general (its rope is 'dynamic', which depends" in made.stderr
