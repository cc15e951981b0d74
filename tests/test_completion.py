"""`prototok completion`: what the shells themselves offer."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from prototok.cli import app, main
from prototok.commands.completion import SHELLS, VALUES, script
from prototok.exporting.formats import FORMATS
from prototok.fitting.recipe import recipe_of
from prototok.model.load import BUILT_IN
from prototok.model.shapes import SHAPES
from prototok.sweep.experiments import EXPERIMENTS, PRESETS
from prototok_kernels.plan import BACKENDS

ROOT = typer.main.get_command(app)
ASK = """
source "$1"
while read -r line; do
  eval "COMP_WORDS=($line)"
  COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMPREPLY=(); _prototok
  echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).write_text(script(ROOT, shell))
    (folder / "my book.txt").touch()
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_offers_commands_options_and_values(scripts: Path) -> None:
    expected = {
        "prototok sw": "sweep",
        "prototok sweep plan table": "table1 table2 table3 table4",
        "prototok sweep plan table1 ''": "",  # one is enough
        "prototok fit book.txt --re": "--recipe --revision --resume",
        "prototok fit book.txt --recipe ''": "fast paper learned",
        "prototok fit book.txt --recipe = le": "learned",  # as bash cuts --recipe=le
        "prototok fit book.txt --out ''": "",  # a file: left to the shell
        "prototok bench --recipe ''": "fast paper",  # its help names two
        "prototok profile ''": "fit decode",
        "prototok learn ''": "prior optimizer encoder",
        "prototok fit sweep --share ''": "m e",  # a book of that name is no command
        "prototok --v": "--version",
    }
    asked = subprocess.run(
        ["bash", "-c", ASK, "bash", scripts / "bash"],
        input="\n".join(expected) + "\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not asked.stderr
    assert dict(zip(expected, asked.stdout.splitlines(), strict=True)) == expected


def typed(shell: list[str], source: Path, line: str, expected: str, cwd: Path) -> str:
    """Return what a shell in a terminal shows, once `expected` has come or a minute has passed."""
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        shell, stdin=inner, stdout=inner, stderr=inner, start_new_session=True, cwd=cwd,
        env={**os.environ, "TERM": "dumb", "PS1": "$ "},
    )  # fmt: skip
    os.close(inner)
    seen = ""
    try:
        for sent, awaited in ((f"source {source}; echo rea''dy\n", "ready"), (line, expected)):
            os.write(terminal, sent.encode())
            seen, end = "", time.monotonic() + 60
            while awaited not in seen and time.monotonic() < end:
                if select.select([terminal], [], [], 1)[0]:
                    seen += os.read(terminal, 65536).decode(errors="replace")
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    return seen


@pytest.mark.parametrize(
    "shell", [["bash", "--norc", "-i"], ["zsh", "-f", "-i"]], ids=lambda s: s[0]
)
@pytest.mark.parametrize(
    ("line", "becomes"),
    [
        ("prototok swee\t", "prototok sweep "),
        ("prototok fit --recipe=lear\t", "--recipe=learned"),
        ("prototok fit my\t", r"my\ book.txt"),
    ],
)
def test_in_a_terminal(shell: list[str], line: str, becomes: str, scripts: Path) -> None:
    if shutil.which(shell[0]) is None:
        pytest.skip(f"needs {shell[0]}")
    assert becomes in typed(shell, scripts / shell[0], line, becomes, scripts)


def test_every_command_and_option_is_there() -> None:
    text = script(ROOT, "bash")

    def check(command: Any, path: str) -> None:
        (line,) = (
            one for one in text.splitlines() if one.strip().startswith(f'"{path}") offered=')
        )
        options = [param for param in command.params if param.param_type_name == "option"]
        offered = line.partition("/")[2].split()
        assert {one for option in options for one in option.opts} <= set(offered)
        for name, inner in getattr(command, "commands", {}).items():
            check(inner, f"{path} {name}".strip())

    check(ROOT, "")


def test_values_are_those_that_are_taken() -> None:
    assert set(VALUES["format"]) == set(FORMATS)
    assert set(VALUES["model"]) == set(BUILT_IN)
    assert set(VALUES["shape"]) <= set(SHAPES)
    assert set(VALUES["backend"]) == set(BACKENDS)
    assert set(VALUES["experiment"]) == set(EXPERIMENTS)
    assert set(VALUES["preset"]) == set(PRESETS)
    for name in VALUES["recipe"]:
        recipe_of(name)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "bach"])
    assert ended.value.code == 2
    assert "'bach' is not bash or zsh; did you mean 'bash'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["completion", "zsh"])
    assert not ended.value.code
    assert capsys.readouterr().out == script(ROOT, "zsh")
