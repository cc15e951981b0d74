"""The documents as a site: `python docs/build_site.py`.

The source folder is the whole checkout, so that pages link as they do where they lie; the pages are
Markdown for people who read them there, and this file adds what a site needs. Nothing is fetched.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import prototok  # noqa: E402

project = "prototok"
author = "The prototok authors"
version = release = prototok.__version__
html_title = f"prototok {release}"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = [
    "docs/**", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/tour.ipynb",
]  # fmt: skip
exclude_patterns = [".*", "build", "dist", "**/__pycache__"]
root_doc = "docs/index"
nitpicky = False  # types are named in signatures, and torch's own pages are not at hand

html_theme = "furo"
html_static_path = ["pictures"]
html_additional_pages = {"index": "redirect.html"}
templates_path = ["site"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # examples/tour.ipynb is kept executed, and a test runs it
pygments_style, pygments_dark_style = "friendly", "github-dark"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
default_role = "code"


def readable(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring's Markdown and its columns of names into what Sphinx reads."""
    text = "\n".join(lines)
    text = re.sub(r"(?m)(?:^(?!-)\w[\w, ]*? {2,}\S.*\n(?: {2,}\S.*\n?)*)+", _columns, text + "\n")
    text = re.sub(r"(?m)(?:^\|.*\|\n)+", _table, text)
    text = re.sub(r"(?<!`)`([^`\n]+)`(?!`)", r"``\1``", text)
    # Of names with spaces between them Sphinx takes the last for the name, the others for its type.
    text = re.sub(r"(?m)^ +\w+(?:, \w+)+(?=: )", lambda m: m[0].replace(", ", ",\u200b"), text)
    lines[:] = text.split("\n")


def _columns(found: re.Match[str]) -> str:
    """`name   what it is` on lines of their own becomes a list of definitions."""
    entries = re.split(r"\n(?=\S)", found[0].rstrip("\n"))
    made = (re.split(r" {2,}", " ".join(entry.split("\n")), maxsplit=1) for entry in entries)
    listed = (f"``{name}``\n    {' '.join(what.split())}\n" for name, what in made)
    return "\n\n" + "".join(listed) + "\n"


def _table(found: re.Match[str]) -> str:
    rows = [line.strip("|").split("|") for line in found[0].splitlines()]
    cells = (
        "\n".join(f"   {'* -' if i == 0 else '  -'} {cell.strip()}" for i, cell in enumerate(row))
        for row in (rows[0], *rows[2:])
    )
    return "\n.. list-table::\n   :header-rows: 1\n\n" + "\n".join(cells) + "\n\n"


def in_both_modes(app: Sphinx, page: str, source: list[str]) -> None:
    """Show NAME-dark.svg in place of NAME-light.svg where the site is dark."""
    both = r"\1-light.svg){.only-light}\n\1-dark.svg){.only-dark}"
    source[0] = re.sub(r"(!\[[^\]]*\]\([^)]*)-light\.svg\)", both, source[0])


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("source-read", in_both_modes)
    app.connect("autodoc-process-docstring", readable, priority=400)  # before napoleon
