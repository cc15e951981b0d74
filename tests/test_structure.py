"""The house as docs/architecture.md has it: imports point one way, and no file is long."""

from __future__ import annotations

import ast
import graphlib
import itertools
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the top down. An arrow may point to the same level or below.
LEVELS = (
    ("__main__", "cli"),
    ("commands",),
    ("bench", "demo", "sweep", "report"),
    (
        "capacity",
        "decode",
        "encode",
        "export",
        "fast_fit",
        "learn_encoder",
        "learn_optimizer",
        "learn_shared",
    ),  # doors to functions of the packages below
    ("fitting", "decoding", "autoregressive", "geometry", "exporting"),
    ("model", "results", "texts"),
    ("common",),
    ("prototok_kernels",),
)
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
MOST_LINES = 400


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for root in (ROOT, ROOT / "kernels"):
        for path in sorted(root.glob("prototok*/**/*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, known: Iterable[str]) -> set[str]:
    """The modules of ours that a module imports, inside functions and for types as well."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not followed here"
            # `from package import module` is an import of the module, not of the package alone.
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else str(node.module))
    return found & set(known)


def graph() -> dict[str, set[str]]:
    """Arrows between modules. The public face `prototok` imports all it shows, when it is asked."""
    known = modules()
    arrows = {name: imports(path.read_text(), known) for name, path in known.items()}
    del arrows["prototok"]
    return arrows


def room(module: str) -> str:
    """The package of `prototok` that a module is in, or `prototok_kernels`."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "prototok" and rest else first


def circle(arrows: dict[str, set[str]]) -> list[str] | None:
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        found: list[str] = error.args[1]
        return found
    return None


def test_no_module_imports_the_public_face() -> None:
    assert [name for name, used in graph().items() if "prototok" in used] == []


def test_no_import_circle() -> None:
    assert circle(graph()) is None


def test_no_circle_of_packages() -> None:
    rooms: dict[str, set[str]] = {}
    for name, used in graph().items():
        rooms.setdefault(room(name), set()).update(room(other) for other in used)
    assert circle({name: used - {name} for name, used in rooms.items()}) is None


def test_every_arrow_points_down() -> None:
    up = [
        f"{name} -> {other}"
        for name, used in graph().items()
        for other in sorted(used)
        if LEVEL[room(other)] < LEVEL[room(name)]
    ]
    assert up == []


@pytest.mark.parametrize("folder", ["prototok", "csrc", "kernels"])
def test_no_file_is_long(folder: str) -> None:
    code = [
        path
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".inl", ".css", ".js")
    ]
    assert len(code) > 10
    lines = {path: len(path.read_text().splitlines()) for path in code}
    assert {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > MOST_LINES} == {}


@pytest.mark.parametrize("module", ["prototok", "prototok.cli", "prototok.bench.command"])
def test_nothing_heavy_is_imported_before_it_is_used(module: str) -> None:
    """So `import prototok` and `--help` answer at once."""
    heavy = ("torch", "transformers", "numpy", "pyarrow", "prototok.fitting", "prototok.model")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_circle_and_an_arrow_up_are_seen() -> None:
    """The checks above can fail."""
    known = ("a", "a.b", "c")
    assert imports("def f():\n    from a import b, d\n    import c\n", known) == {"a", "a.b", "c"}
    assert circle({"a": {"c"}, "c": {"a"}}) is not None
    pairs = itertools.pairwise(("cli", "bench", "fitting", "model", "common", "prototok_kernels"))
    assert all(LEVEL[above] < LEVEL[below] for above, below in pairs)
