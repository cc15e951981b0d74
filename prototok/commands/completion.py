"""`prototok completion`: a script for the shell, made from the commands themselves.

It holds every word that it offers, so that a press of Tab starts no Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from prototok.common.arguments import hint

SHELLS = ("bash", "zsh")

# What an option or argument of this name takes. Where its help names some of these words, only
# those are offered: `bench --recipe` knows fewer than `fit --recipe`.
VALUES = {
    "backend": ("auto", "torch", "triton", "cpu"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "experiment": ("table1", "table2", "table3", "table4", "figure2", "figure3", "figure4",
                   "figure5", "figure6"),
    "format": ("npz", "transformers", "peft", "llamacpp", "vllm", "sglang"),
    "launcher": ("local", "ray", "slurm"),
    "model": ("tiny-llama", "tiny-neox"),
    "prefix": ("auto", "none"),
    "preset": ("paper", "small"),
    "recipe": ("fast", "paper", "learned"),
    "shape": ("pythia-160m", "pythia-410m", "pythia-1.4b", "llama-3.2-1b", "llama-3.2-3b",
              "llama-3.1-8b"),
    "share": ("m", "e"),
    "shell": SHELLS,
    "what": ("fit", "decode"),
}  # fmt: skip

# A value of which no word is known leaves COMPREPLY empty, and the shell offers files.
_SCRIPT = """\
{start}_prototok() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
  local command= offered= whole= i
  if [[ $current == --*=* ]]; then  # --option=value, to bash three words
    whole=${{current%%=*}}= previous=${{current%%=*}} current=${{current#*=}}
  elif [[ $current == = ]]; then
    current=
  elif [[ $previous == = ]]; then
    previous=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "$command ${{COMP_WORDS[i]}}" in
      {paths}) command="${{command:+$command }}${{COMP_WORDS[i]}}" ;;
    esac
  done
  case "$command $previous" in
    {values}
    *)
      case "$command" in
        {commands}
      esac
      if [[ $current == -* ]]; then
        offered=${{offered#*/}}
      elif [[ -z $command || $previous == "${{command##* }}" ]]; then
        offered=${{offered%/*}}
      else
        offered=  # a later argument
      fi ;;
  esac
  COMPREPLY=($(compgen -P "$whole" -W "$offered" -- "$current"))
}}
complete -o default -F _prototok prototok
"""
_EITHER = " | \\\n      "
_ZSH = "autoload -Uz compinit bashcompinit\n(($+functions[compdef])) || compinit\nbashcompinit\n"
_SHELL = "bash or zsh."


def completion(
    context: typer.Context,
    shell: Annotated[str, typer.Argument(help=_SHELL)],
) -> None:
    """Print a script that completes commands, options and their values in the shell."""
    if shell not in SHELLS:
        raise ValueError(f"shell: {shell!r} is not bash or zsh" + hint(shell, SHELLS))
    print(script(context.find_root().command, shell), end="")


def script(root: Any, shell: str) -> str:
    """Return the script for `shell`, made of the click command `root` and all below it."""
    paths, offers = [], []
    takers: dict[str, list[str]] = {}  # the words for a value, and after what they are offered
    for path, command in _commands(root, ""):
        name, _, last = path.rpartition(" ")
        if path:
            paths.append(f'"{name} {last}"')
        options = [p for p in command.params if p.param_type_name == "option"]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        for option in options:
            if not (option.is_flag or option.count):
                places = takers.setdefault(_words(option), [])
                places += (f'"{path} {one}"' for one in option.opts)
        first = _words(arguments[0]) if arguments else " ".join(getattr(command, "commands", ()))
        names = [one for option in options for one in (*option.opts, *option.secondary_opts)]
        offers.append(f'"{path}") offered="{first}/{" ".join([*names, "--help"])}" ;;')
    return _SCRIPT.format(
        start=_ZSH if shell == "zsh" else "",
        paths=_EITHER.join(paths),
        values="\n    ".join(
            f'{_EITHER.join(places)}) offered="{words}" ;;' for words, places in takers.items()
        ),
        commands="\n        ".join(offers),
    )


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every command by the words that lead to it, "" for the root."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{path} {name}".strip())


def _words(param: Any) -> str:
    known = VALUES.get(param.name, ())
    named = [word for word in known if re.search(rf"\b{re.escape(word)}\b", param.help or "")]
    return " ".join(named or known)
