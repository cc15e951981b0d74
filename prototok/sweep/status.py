"""A run in a table for people."""

from __future__ import annotations

from prototok.sweep.run_folder import RunFolder


def status(run: RunFolder) -> str:
    """Make a table: each experiment's units, what is done and what failed."""
    done, failed = run.done(), set(run.failures()["key"].to_pylist())
    plan = run.plan()
    found: dict[str, set[str]] = {name: set() for name in run.settings()}
    names, keys = plan["experiment"].to_pylist(), plan["key"].to_pylist()
    for name, key in zip(names, keys, strict=True):
        found[name].add(key)
    lines: list[tuple[str, ...]] = [("experiment", "units", "done", "failed", "to do")]
    for name, mine in [*found.items(), ("all", set(keys))]:
        counts = len(mine), len(mine & done), len(mine & failed), len(mine - done - failed)
        lines.append((name, *map(str, counts)))
    width = max(len(line[0]) for line in lines)
    return "\n".join(
        line[0].ljust(width) + "".join(cell.rjust(9) for cell in line[1:]) for line in lines
    )
