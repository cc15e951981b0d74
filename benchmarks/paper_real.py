"""The paper's experiments on SmolLM2-135M, with and without a token in front of its sink.

    cd FOLDER     # novels/*.txt, modern/*.txt, words.txt (a word a line), smollm2-135m (the model)
    python REPO/benchmarks/paper_real.py --out run

Paths are recorded as they are given, so it runs where texts and model lie; a link to the folder
that `benchmarks/get_smollm2.py` makes will do. Sizes are for an hour of one CPU core. It can be
stopped and started again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from paper_small import Parts, do, options

from prototok.geometry.paths import BezierSettings
from prototok.sweep.experiments import ARRANGEMENTS, settings_of
from prototok.texts.sources import Source

NOVELS = Source.parse("Novels=folder:novels")
MODERN = replace(Source.parse("Modern=folder:modern"), words=(600, 1200))
OWN = replace(Source.parse("Novels (gen)=generated:folder:novels"), context_tokens=128)
WORDS = Source.parse("Random=random:words.txt")

# The first cosine of `fast` ends at 300 updates, that of a text of 32 tokens at 600.
_BEHIND: dict[str, Any] = {"prefix": " the", "changes": {"max_steps": 300}}
_LONG = {**_BEHIND, "changes": {"max_steps": 600}, "lengths": (32,)}
_NOVELS = {"sources": (NOVELS,)}
_TABLE_1 = {**_NOVELS, "lengths": (1, 2, 4, 8, 16), "arrangements": ARRANGEMENTS}
_FOUR = {"sources": (NOVELS, MODERN, OWN, WORDS), "texts": 4}
_ONE_FORWARD = (
    {**_FOUR, **_BEHIND, "lengths": (8, 16), "share": (None, "m")},
    {**_FOUR, **_LONG, "share": (None,)},
)
_MEM = {**_NOVELS, **_BEHIND, "texts": 4, "lengths": (8, 16, 32), "share": (), "vectors": (1, 2)}
# Where 300 updates bring back no text and no longest length.
_LONGER = {**_NOVELS, **_BEHIND, "changes": {"max_steps": 1200}, "texts": 4}
_SHARED = {**_LONGER, "lengths": (32,), "share": ("m",), "vectors": ()}
_MEM_LONGER = {**_LONGER, "lengths": (32, 64), "share": (), "vectors": (1, 2)}
_SIXTY_FOUR = {**_LONGER, "lengths": (64,), "share": (None,), "vectors": ()}
_EIGHT = {**_BEHIND, "lengths": (8,)}
# Times of an idle machine; at N = 32 `fast` may go on for as long as most texts need.
_TIMED = {**_NOVELS, **_BEHIND, "texts": 4}
_TO_32 = {**_TIMED, "lengths": (32,), "changes": {"max_steps": 900}}
_CLOUD = {**_EIGHT, "sources": (OWN,), "contexts": 10, "continuations": 4, "seeds": 3}
EXPERIMENTS: dict[str, tuple[dict[str, Any], ...]] = {
    "table1": (
        {**_TABLE_1, **_BEHIND, "texts": 8},
        {**_TABLE_1, **_BEHIND, "texts": 4, "prefix": None},
        {**_TABLE_1, **_LONG, "texts": 8, "arrangements": ("(e m)*", "e m*")},
        {**_TABLE_1, **_LONG, "texts": 4, "arrangements": ("e*",)},
    ),
    "table3": _ONE_FORWARD,
    "table2": (
        {**_EIGHT, **_NOVELS, "texts": 16, "seeds": 1, "share": ("m",), "group_sizes": (1, 4, 16)},
        {**_EIGHT, **_NOVELS, "texts": 16, "seeds": 1, "share": ("e",), "group_sizes": (4, 16)},
    ),
    "figure2": (
        *({**part, **_NOVELS, "vectors": ()} for part in _ONE_FORWARD),
        _MEM,
        _SHARED,
        _MEM_LONGER,
        _SIXTY_FOUR,
    ),
    "table4": ({**_TIMED, "lengths": (8, 16), "texts": 8}, {**_TO_32, "texts": 8}),
    "figure3": ({**_TIMED, "lengths": (8, 16)}, _TO_32),
    "figure4": (_CLOUD,),
    "figure5": (_CLOUD,),
    "figure6": ({**_EIGHT, **_NOVELS, "texts": 4, "seeds": 4, "share": ("m", None)},),
}


def parts() -> Parts:
    """Return the settings of every experiment."""
    return {
        name: [
            replace(settings_of(name, "small", models=("smollm2-135m",)), **given)
            for given in sizes
        ]
        for name, sizes in EXPERIMENTS.items()
    }


def main() -> None:
    do(options(__doc__).parse_args(), parts(), BezierSettings(max_steps=300), most_pairs=1)


if __name__ == "__main__":
    main()
