"""What README and docs say: tables are results, snippets run, commands and links exist."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

import prototok
from documents import PAGES, ROOT, snippets
from prototok import FrozenLM

MODEL = Path(prototok.__file__).parent / "models" / "tiny-llama"
CODE = {".py", ".cpp", ".h", ".inl", ".sh"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["benchmarks/readme_tables.py", "docs/write_commands.py"])
def test_what_is_written_by_a_script_is_as_it_writes_it(script: str) -> None:
    subprocess.run([sys.executable, ROOT / script, "--check"], check=True)


def test_the_readme_is_short_and_says_where_a_gpus_figures_are() -> None:
    assert len(README.split()) <= 900
    assert "what was not](docs/gpu.md)" in README


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
    monkeypatch.chdir(workplace["at"] if page.name == "elsewhere.md" else tmp_path)
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


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []  # an example leaves nothing behind


def test_the_notebook_runs_and_is_kept_as_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for needed in ("ipykernel", "matplotlib", "pandas"):
        pytest.importorskip(needed)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    kept = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    again = nbformat.from_dict(kept)
    nbclient.NotebookClient(
        again, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    def shown(book: Any) -> list[str]:
        """What a cell prints, without what a machine rounds or reports for itself."""
        cells = [cell for cell in book.cells if cell.cell_type == "code"]
        outputs = [[o for o in cell.outputs if o.get("name") != "stderr"] for cell in cells]
        # On a busy machine what is printed comes in several parts.
        texts = [
            "".join(o.get("text", "") for o in some) or some[0]["data"]["text/plain"]
            for some in outputs
        ]
        return [re.sub(r"median \d+ steps", "", text) for i, text in enumerate(texts) if i != 2]

    assert shown(kept) == shown(again)
    assert all(o.get("name") != "stderr" for cell in kept.cells for o in cell.get("outputs", ()))
    pictures = [
        o
        for cell in kept.cells
        for o in cell.get("outputs", ())
        if "image/png" in o.get("data", ())
    ]
    assert len(pictures) == 2
    assert (ROOT / "examples" / "tour.ipynb").stat().st_size < 200_000
    assert list(tmp_path.iterdir()) == []  # an example leaves nothing behind


def test_every_page_is_in_the_site() -> None:
    """Each is named in the contents of the site, and among the links for who reads it elsewhere."""
    index = ROOT / "docs" / "index.md"
    text = index.read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(index.parent).with_suffix("").as_posix()
        assert name == "index" or (f"\n{name}\n" in text and f"]({name}.md)" in text), name


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"\.\. auto\w+:: (?:prototok\.)?(\w+)", text)
    assert set(prototok.__all__) <= set(found)


def test_documents_that_code_names_are_there() -> None:
    folders = ("prototok", "kernels", "csrc", "benchmarks", "tests", "examples", "docs", ".ci")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in CODE]
    named = {
        name
        for path in [*files, *PAGES, ROOT / "setup.py", ROOT / "pyproject.toml"]
        for name in re.findall(r"docs/[\w/-]+\.(?:md|py|svg)\b", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


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
