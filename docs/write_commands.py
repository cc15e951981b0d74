"""Write docs/commands.md from the command line itself.

python docs/write_commands.py            # rewrite it
python docs/write_commands.py --check    # exit code 1 where it says otherwise
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from prototok.cli import app

PAGE = Path(__file__).with_name("commands.md")
HEAD = """# Commands

`prototok COMMAND --help` says the same. Exit codes: 0 ok, 2 usage, 3 ended with units that failed
or before a full disk, with the others saved, 130 interrupted with work saved.
`source <(prototok completion bash)` in ~/.bashrc, or the same of zsh in ~/.zshrc, completes
commands, options and their values at a Tab.
"""


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every command that does something, by its full name."""
    if hasattr(command, "commands"):
        for part, inner in command.commands.items():
            yield from commands(inner, f"{name} {part}")
    else:
        yield name, command


def section(name: str, command: Any) -> str:
    arguments = [p.name for p in command.params if p.param_type_name == "argument"]
    lines = [f"## {name} {' '.join(a.upper() for a in arguments)}".rstrip(), "", command.help, ""]
    if command.params:
        lines += ["| | | default |", "|---|---|---|"]
    for param in command.params:
        shown = ", ".join(f"`{one}`" for one in param.opts)
        if param.param_type_name == "argument":
            shown = param.name.upper()
        lines.append(f"| {shown} | {(param.help or '').replace('|', '/')} | {_default(param)} |")
    return "\n".join(lines).rstrip() + "\n"


def _default(param: Any) -> str:
    if param.required:
        return "required"
    return "" if param.default in (None, False) else f"`{param.default}`"


def main() -> None:
    parts = [section(name, c) for name, c in commands(typer.main.get_command(app), "prototok")]
    page = "\n".join([HEAD, *parts])
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    elif page != PAGE.read_text(encoding="utf-8"):
        sys.exit(f"{PAGE.name} is not what the commands say; run docs/write_commands.py")


if __name__ == "__main__":
    main()
