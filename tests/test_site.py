"""The documents as a site: it builds without a warning, offline, and opens from the disk."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import prototok
from documents import PAGES, ROOT

for needed in ("sphinx", "furo", "myst_nb"):
    pytest.importorskip(needed)


class _Links(HTMLParser):
    """What a page loads, where it leads, and the names within it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.names.add(found.get("id", ""))
        if tag in ("script", "img", "iframe", "source") and "src" in found:
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(found["href"])
        if tag == "a" and "href" in found:
            self.leads.append(found["href"])


def build(out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "docs" / "build_site.py"), "--out", str(out)]
    return subprocess.run(command, cwd=out.parent, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, _Links]:
    """Every page of the site, built with warnings as errors."""
    out = tmp_path_factory.mktemp("site")
    made = build(out)
    assert made.returncode == 0 and not made.stderr, made.stderr
    assert not list(out.parent.rglob("jupyter_execute"))  # nothing beside it
    return {p: _Links(p.read_text(encoding="utf-8")) for p in out.rglob("*.html")} | {
        out: _Links("")
    }


def top(site: dict[Path, _Links]) -> Path:
    return min(site, key=lambda path: len(path.parts))


def test_every_document_is_a_page(site: dict[Path, _Links]) -> None:
    out = top(site)
    for page in PAGES:
        if page.name != "README.md":  # the front page says it
            assert (out / page.relative_to(ROOT)).with_suffix(".html") in site, page
    assert {out / "index.html", out / "search.html", out / "examples" / "tour.html"} <= set(site)


def test_it_loads_nothing_from_the_network(site: dict[Path, _Links]) -> None:
    for page, links in site.items():
        for loaded in links.loads:
            path = loaded.partition("?")[0]
            assert not re.match(r"\w+:|//", path), f"{page.name} loads {loaded}"
            assert (page.parent / path).is_file(), f"{page.name} loads {loaded}"
    for style in top(site).rglob("*.css"):
        assert not re.search(r"(@import|url\()[^;)]*//", style.read_text(encoding="utf-8")), style


def test_every_link_leads_somewhere(site: dict[Path, _Links]) -> None:
    for page, links in site.items():
        for link in links.leads:
            path, _, name = link.partition("#")
            if re.match(r"https?:|mailto:", path):
                continue
            target = (page.parent / unquote(path)).resolve() if path else page
            assert target.exists(), f"{page.name} links {link}"
            if name and target in site:
                assert unquote(name) in site[target].names, f"{page.name} links {link}"


def test_the_reference_has_every_public_name(site: dict[Path, _Links]) -> None:
    out = top(site)
    found = site[out / "docs" / "api.html"].names
    known = {name for name in prototok.__all__ if name != "autoregressive"}  # a module of its own
    assert {f"prototok.{name}" for name in known} <= found
    assert "prototok.FitResult.best" in found
    page = (out / "docs" / "api.html").read_text(encoding="utf-8")
    assert "<dt>" in page and "accuracy_in_batch" in page  # columns of names are lists


def test_it_can_be_searched_from_the_disk(site: dict[Path, _Links]) -> None:
    index = (top(site) / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(")  # a script, which a page may load from a file
    assert all(word in index for word in ("margin", "docs/guide", "examples/tour"))


def test_it_has_a_dark_side(site: dict[Path, _Links]) -> None:
    page = (top(site) / "docs" / "index.html").read_text(encoding="utf-8")
    assert "theme-toggle" in page
    pictures = re.findall(r"<img[^>]*how-(?:light|dark)[^>]*>", page)
    assert ["only-light" in picture for picture in pictures] == [True, False]
    assert ["only-dark" in picture for picture in pictures] == [False, True]


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    refused = build(tmp_path)
    assert refused.returncode == 2 and f"out: {tmp_path} exists and is no site" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
