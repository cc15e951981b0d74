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


def write(record: dict, path: Path) -> None:
    """The record as JSON; its path and a last line of JSON are printed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"\nwritten to {path}")
