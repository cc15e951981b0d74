"""What a package index shows, and what the source distribution holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import prototok

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a source distribution made of this tree, by their paths in it."""
    out = tmp_path_factory.mktemp("dist")
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools", minversion="77")
    command = ["setup.py", "-q", "egg_info", "-e", str(out), "sdist", "-d", str(out)]
    made = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    (path,) = out.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = [m for m in archive.getmembers() if m.isfile()]
        files = {m.name.partition("/")[2]: archive.extractfile(m) for m in members}
        return {name: file.read() for name, file in files.items() if file is not None}


def test_it_holds_what_its_tests_need(sdist: dict[str, bytes]) -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("needs a checkout")
    kept = [name for name in listed.stdout.splitlines() if os.path.exists(ROOT / name)]
    assert set(kept) - set(sdist) <= {".gitignore"}
    assert not [name for name in sdist if name.endswith((".so", ".pyc"))]


def test_the_description_has_no_links_into_a_checkout(sdist: dict[str, bytes]) -> None:
    shown = Parser().parsestr(sdist["PKG-INFO"].decode("utf-8"))
    text = shown.get_payload()
    assert shown["Description-Content-Type"] == "text/markdown"
    assert "# prototok" in text and "<picture>" not in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    assert "[FAQ]" not in text and "FAQ (`docs/faq.md`)" in text


def test_version_and_authors_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == cited["version"] == prototok.__version__
    assert [a["name"] for a in project["authors"]] == [a["name"] for a in cited["authors"]]
    assert cited["license"] == project["license"]
