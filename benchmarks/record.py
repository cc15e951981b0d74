"""What every result file says about where it came from."""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path

from prototok.bench.machine import describe

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict:
    """Command line, date, commit (with + where the tree was changed), machine and versions."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        try:
            run = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
        except OSError:  # no git here: what was measured must not be lost for that
            return ""
        return run.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..")
    return {
        "command": command_line(),
        "date": datetime.date.today().isoformat(),
        "commit": commit + ("+" if changed else ""),
        "machine": describe(),
    }


def command_line() -> str:
    """What was run, with its arguments; of an absolute path only the last part."""
    script = Path(sys.argv[0]).resolve().relative_to(RESULTS.parents[1])
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", str(script), *words])


def keep(record: dict, path: Path) -> None:
    """Write the record as JSON, as after each cell of a long run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def write(record: dict, path: Path) -> None:
    """Write the record as JSON, and say where."""
    keep(record, path)
    print(f"\nwritten to {path}")
