"""Every command in README and docs is run here, or says why it is not."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import prototok
from documents import PAGES, ROOT, SHELL, commands, indented
from prototok.cli import app, main

MODEL = Path(prototok.__file__).parent / "models" / "tiny-neox"
BOOK = MODEL.with_name("tiny-llama") / "held_out.txt"

# Why a command is not run. It is parsed all the same where it is `prototok` or a script of ours.
NOT_RUN = {
    r"pip install|python -m venv|\. ": "needs a network; .ci/run installs into a fresh environment",
    r"\.ci/run|pytest": "what runs this test",
    r"source <\(prototok completion": "tests/test_completion.py asks the shells",
    r"nsys|ncu|.*--shape": "needs a GPU",
    r"benchmarks/gpu.sh": "needs a GPU; tests/benchmarks runs it without",
    r"vllm|curl": "needs vLLM and a GPU",
    r"python exported/": "tests/exporting runs every program that is exported",
    r"python -m prototok.bench": "a minute a model; tests/bench runs a short one",
    r"python benchmarks/": "minutes to hours, or a network; tests/benchmarks runs what is quick",
    r"prototok (learn|encode)|.*--init": "trains for minutes; tests/test_cli.py trains small ones",
    r"prototok demo": "serves until Ctrl-C; tests/demo drives its page",
    r"prototok sweep run": "minutes to days; tests/sweep runs small ones with each launcher",
    r"prototok sweep plan .*--source": "needs the paper's models",
    r"export RAY|ray ": "needs a cluster",
}


def reason(words: list[str]) -> str | None:
    line = re.sub(r"^[A-Z_]+=\S+ ", "", " ".join(words))  # a variable set for the command alone
    return next((why for what, why in NOT_RUN.items() if re.match(what, line)), None)


def ours(words: list[str]) -> list[str]:
    """What a command gives `prototok`, a profiler in front or not; [] where it does not call it."""
    if words[1:3] == ["-m", "prototok.bench"]:
        return ["bench", *words[3:]]
    return words[words.index("prototok") + 1 :] if "prototok" in words else []


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]
OURS = [(page, ours(words)) for page, words in COMMANDS if ours(words)]
SCRIPTS = [(page, words) for page, words in COMMANDS if words[0] == "python" and words[1] != "-m"]


def ids(value: object) -> str:
    return value.name if isinstance(value, Path) else " ".join(value[:4])  # type: ignore[index]


@pytest.mark.parametrize(("page", "words"), OURS, ids=ids)
def test_commands_have_these_options(page: Path, words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    name, rest = "prototok", list(words)
    while hasattr(command, "commands"):
        name, command = rest[0], command.commands[rest.pop(0)]
    command.make_context(name, rest)  # parses, and runs nothing


class _Parsed(Exception):
    pass


@pytest.mark.parametrize(
    ("page", "words"), [s for s in SCRIPTS if not s[1][1].startswith("exported/")], ids=ids
)
def test_scripts_have_these_options(
    page: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(self, *arguments)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.setattr(sys, "path", [str((ROOT / words[1]).parent), *sys.path])
    with pytest.raises(_Parsed):
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another in one folder, as a reader would."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(BOOK.read_text(encoding="utf-8")[:80], encoding="utf-8")
    if page.name == "elsewhere.md":  # it starts where a fit is
        main_ok(["fit", "book.txt", "--length", "4", "--limit", "2", "-o", "tokens"])
    if page.name == "scaling.md":  # its own plan needs the paper's models
        main_ok(["sweep", "plan", "table3", "--preset", "small", "-o", "run"])
    for words in commands(page):
        if reason(words) is None:
            assert words[0] == "prototok", f"{page.name}: run it or say why not: {words}"
            main_ok([str(MODEL) if word == "MODEL" else word for word in words[1:]])
            if "-o" in words:
                assert Path(words[words.index("-o") + 1]).exists(), words


def main_ok(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code, words


def test_every_reason_is_of_a_command() -> None:
    for what in NOT_RUN:
        assert any(re.match(what, " ".join(words)) for _, words in COMMANDS), what


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_is_fenced(page: Path) -> None:
    """Only what is fenced as Python is run as Python."""
    for block in indented(page):
        if block.split()[0] not in SHELL:
            assert not re.search(r"prototok\.|\bimport\b|\w\.\w+\(", block), block
