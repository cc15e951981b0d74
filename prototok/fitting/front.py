"""What stands in front of fits: the prefix that was asked for, or what the model calls for."""

from __future__ import annotations

from prototok.fitting.prior import Prior
from prototok.fitting.recipe import Recipe
from prototok.model.frozen_lm import FrozenLM
from prototok.model.in_front import PrefixLike, prefix_of
from prototok.model.prefix import Prefix
from prototok.model.sink import sink_of


def front_of(
    lm: FrozenLM, prefix: PrefixLike | Prefix, recipe: Recipe, init: Prior | None = None
) -> tuple[FrozenLM, str]:
    """Return the model behind its prefix, and one line that says which and why.

    "auto" takes the prefix that `lm` has, else that of `init`, else one ordinary token where the
    recipe minds attention sinks and the model has one. Raises ValueError as `prefix_of` does.
    """
    if not (isinstance(prefix, str) and prefix == "auto"):
        chosen, why = prefix_of(lm, prefix), "as asked"
    elif lm.prefix is not None:
        chosen, why = lm.prefix, "that of lm"
    elif init is not None and init.prefix is not None:
        chosen, why = prefix_of(lm, init.prefix), "that of init"
    elif recipe.against_sink:
        sink = sink_of(lm)
        chosen, why = sink.prefix, str(sink)
    else:
        chosen, why = None, f"recipe {recipe.name!r} has none"
    return lm.behind(chosen), f"{describe(lm, chosen)} ({why})"


def describe(lm: FrozenLM, prefix: Prefix | None) -> str:
    """Return a prefix in words: its text and ids, or how many vectors it has."""
    if prefix is None:
        return "none"
    if prefix.ids is None:
        return f"{len(prefix)} vectors"
    ids = ", ".join(map(str, prefix.ids))
    return f"{lm.decode_ids(list(prefix.ids))!r}, token {ids}" if lm.tokenizer else f"token {ids}"
