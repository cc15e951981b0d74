"""What the documents hold that can be run: snippets of Python and lines for a shell."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = {
    ".ci/run", "RAY_ADDRESS=HEAD:6379", "benchmarks/gpu.sh", "curl", "export", "ncu", "nsys", "pip",
    "prototok", "pytest", "python", "ray", "source", "vllm",
}  # fmt: skip


def snippets(page: Path) -> list[str]:
    """Return the Python of a page, without what a comment in front says is not run, and why."""
    fenced = r"(<!-- not run: [^\n]+ -->\n)?```python\n(.*?)```"
    found = re.findall(fenced, page.read_text(encoding="utf-8"), re.DOTALL)
    return [code for reason, code in found if not reason]


def indented(page: Path) -> list[str]:
    """Return the blocks of a page that are indented by four spaces: commands and formulas."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"\n\n((?: {4}.*\n|\n(?= {4}))+)", text)


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command of a page: those in blocks, then those within lines."""
    found = []
    for block in indented(page):
        if block.split()[0] in SHELL:
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                words = shlex.split(line, comments=True)
                while "&&" in words:
                    found.append(words[: words.index("&&")])
                    words = words[words.index("&&") + 1 :]
                found += [words] if words else []
    within = re.findall(r"`(prototok [^`…|]* -o [^`…|]+)`", page.read_text(encoding="utf-8"))
    return found + [shlex.split(line) for line in within]
