"""What README and docs say: tables are results, snippets run, commands and links exist."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import prototok
from prototok import FrozenLM
from prototok.cli import app, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODEL = Path(prototok.__file__).parent / "models" / "tiny-llama"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def command_lines(page: Path) -> list[list[str]]:
    """What follows `prototok` in each indented line of a page, comments and line ends dropped."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^ {4,}(.*\bprototok .*)$", text, re.MULTILINE)
    lines += re.findall(r"`(prototok export [^`]+)`", text)
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while "prototok" in words:
            words = words[words.index("prototok") + 1 :]
            found.append(words[: words.index("&&")] if "&&" in words else words)
    return found


COMMANDS = [(page, words) for page in PAGES for words in command_lines(page)]


@pytest.mark.parametrize("script", ["benchmarks/readme_tables.py", "docs/write_commands.py"])
def test_what_is_written_by_a_script_is_as_it_writes_it(script: str) -> None:
    subprocess.run([sys.executable, ROOT / script, "--check"], check=True)


def test_the_readme_is_short_and_says_that_no_gpu_was_used() -> None:
    assert len(README.split()) <= 900
    assert "not run on a GPU yet" in README


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_lm: FrozenLM) -> dict[str, Any]:
    """A folder with a fit and an export, and the names that a page's snippets start from."""
    place = tmp_path_factory.mktemp("reader")
    texts = ["It was the best of times", "Call me Ishmael."]
    fit = prototok.fast_fit(tiny_lm, texts)
    fit.save(place / "tokens")
    prototok.export(fit, place / "adapters", format="peft")
    names: dict[str, Any] = {"lm": tiny_lm, "texts": texts, "fit": fit, "MODEL": str(MODEL)}
    return names | {"prototok": prototok, "torch": torch, "json": json, "Path": Path, "at": place}


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.name)
def test_snippets_run(
    page: Path, workplace: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path if page.name == "README.md" else workplace["at"])
    names = {} if page.name == "README.md" else dict(workplace)
    for code in snippets(page):
        exec(compile(code, page.name, "exec"), names)
    said = capsys.readouterr().out
    if page.name == "README.md":
        assert "FitResult(2 texts × 2 seeds, 4/4 exact" in said
        assert said.endswith("Call me Ishmael.\n")  # by plain transformers
        assert (tmp_path / "tokens" / "fits.parquet").is_file()
    if page.name == "elsewhere.md":
        assert torch.equal(names["ids"], names["fit"].targets[0])
        assert (workplace["at"] / "requests" / "00000.json").is_file()


@pytest.mark.parametrize("prefix", [None, " the"])
def test_the_readmes_transformers_snippet_puts_the_prefix_in_front(
    prefix: str | None, tiny_lm: FrozenLM, capsys: pytest.CaptureFixture
) -> None:
    best = prototok.fast_fit(tiny_lm, ["It was", "Call me Ishmael."], prefix=prefix).best()
    exec(snippets(ROOT / "README.md")[1], {"lm": tiny_lm, "best": best})
    assert capsys.readouterr().out == "Call me Ishmael.\n"


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda v: v.name if isinstance(v, Path) else " ".join(v[:3])
)
def test_commands_have_these_options(page: Path, words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    name, rest = "prototok", list(words)
    while hasattr(command, "commands"):
        name, command = rest[0], command.commands[rest.pop(0)]
    command.make_context(name, rest)  # parses, and runs nothing


def test_export_commands_run(
    workplace: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [words for _, words in COMMANDS if words[0] == "export"]
    assert len(found) >= 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens").symlink_to(workplace["at"] / "tokens")
    for i, words in enumerate(found):
        words[words.index("-o") + 1] = f"out-{i}"
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code and (tmp_path / f"out-{i}" / "export.json").is_file()


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []  # an example leaves nothing behind


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_both_pictures_say_the_same() -> None:
    drawn = [ROOT / "docs" / "pictures" / f"how-{kind}.svg" for kind in ("light", "dark")]
    light, dark = (re.sub(r"#[0-9a-f]{6}", "", path.read_text(encoding="utf-8")) for path in drawn)
    assert light == dark
    words = {one.text for one in ElementTree.fromstring(drawn[0].read_bytes()).iter() if one.text}
    assert {"e", "m", "Ish", "a frozen language model"} <= words
