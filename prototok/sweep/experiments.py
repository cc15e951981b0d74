"""The paper's experiments by name: its settings as defaults, and their expansion to units.

Where the paper is silent (texts a cell, N of figures 4 to 6, texts of Table 4), the default here is
a choice of this project; docs/scaling.md names them all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from prototok.common.arguments import hint
from prototok.fitting.capacity import GRID
from prototok.model.load import BUILT_IN
from prototok.sweep import schema
from prototok.sweep.files import require_place
from prototok.sweep.models import load_model, tokenizer_of
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.settings import Settings, read_config
from prototok.sweep.unit import Unit
from prototok.texts.sources import Source, TargetText, continuations, target_texts
from prototok.texts.targets import text_id

SIX = (
    "EleutherAI/pythia-160m", "EleutherAI/pythia-410m", "EleutherAI/pythia-1.4b",
    "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B",
)  # fmt: skip
LLAMA_1B = (SIX[3],)
ARRANGEMENTS = ("e*", "e* m*", "(e m)*", "e m*+1", "e m*")

HELD_OUT, RANDOM, GENERATED = (
    Source.parse(text) for text in ("held-out", "random", "generated:held-out")
)
_COMMON = (
    "models", "sources", "texts", "lengths", "seeds", "prefix", "recipe", "changes", "dtype",
    "text_seed",
)  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """One table or figure: what it shows, which settings it has, its defaults by preset."""

    title: str
    keys: tuple[str, ...]
    paper: dict[str, Any]
    small: dict[str, Any]


# The small presets run on the models and texts in the package.
_QUICK: dict[str, Any] = {
    "models": BUILT_IN, "sources": (HELD_OUT,), "recipe": "fast", "changes": {"max_steps": 1000},
}  # fmt: skip
_MODEL_AND_SOURCE = {"sources": (HELD_OUT, RANDOM, GENERATED), "texts": 4}

_FIGURE_2 = Experiment(
    "Figure 2: information held, autoregressive against one forward",
    (*_COMMON, "share", "vectors"),
    {"models": SIX, "lengths": GRID, "share": (None, "m"), "vectors": (1, 2)},
    {**_QUICK, **_MODEL_AND_SOURCE, "lengths": (4, 8, 16, 32), "share": (None, "m"),
     "vectors": (1, 2)},
)  # fmt: skip
_FIGURE_4 = Experiment(
    "Figure 4: distances between vectors of the same text, context, or neither",
    (*_COMMON, "share", "contexts", "continuations"),
    {"models": LLAMA_1B, "lengths": (64,), "share": ("m",), "contexts": 50, "continuations": 10,
     "seeds": 10, "seeds_share": True},
    {**_QUICK, "sources": (GENERATED,), "lengths": (8,), "share": ("m",), "contexts": 4,
     "continuations": 4, "seeds": 4, "seeds_share": True, "changes": {"max_steps": 600}},
)  # fmt: skip

EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: where e and m stand",
        (*_COMMON, "arrangements"),
        {"models": LLAMA_1B, "lengths": tuple(2**i for i in range(11)),
         "arrangements": ARRANGEMENTS},
        {**_QUICK, "texts": 4, "lengths": (1, 2, 4, 8, 16), "arrangements": ARRANGEMENTS,
         "changes": {"max_steps": 600}},
    ),
    "table2": Experiment(
        "Table 2: vectors shared by groups of texts",
        (*_COMMON, "share", "group_sizes"),
        {"models": LLAMA_1B, "texts": 256, "lengths": (256,), "share": ("e", "m"),
         "group_sizes": (1, 4, 16, 64, 256), "seeds": 10},
        {**_QUICK, "texts": 8, "lengths": (8,), "share": ("e", "m"), "group_sizes": (1, 4, 8),
         "seeds": 2, "changes": {"max_steps": 600}},
    ),
    "table3": Experiment(
        "Table 3: capacity in tokens and in nats",
        (*_COMMON, "share", "group_sizes"),
        {"models": SIX, "lengths": GRID, "share": (None, "m")},
        {**_QUICK, **_MODEL_AND_SOURCE, "lengths": (4, 5, 8, 11, 16, 22, 32),
         "share": (None, "m")},
    ),
    "table4": Experiment(
        "Table 4: seconds to fit one text",
        (*_COMMON, "share"),
        {"models": SIX, "lengths": (32, 64, 128, 256, 512), "texts": 10, "alone": True},
        {**_QUICK, "lengths": (4, 8, 16), "texts": 3, "alone": True},
    ),
    "figure2": _FIGURE_2,
    "figure3": Experiment(
        "Figure 3: throughput at the longest text that comes back",
        (*_COMMON, "share", "vectors"),
        {"models": SIX, "lengths": GRID, "vectors": (1,), "timed": True},
        {**_QUICK, **_MODEL_AND_SOURCE, "lengths": (4, 8, 16, 32), "vectors": (1,),
         "timed": True},
    ),
    "figure4": _FIGURE_4,
    "figure5": dataclasses.replace(
        _FIGURE_4, title="Figure 5: distance of vectors against distance of texts"
    ),
    "figure6": Experiment(
        "Figure 6: paths between solutions of one text",
        (*_COMMON, "share"),
        {"models": LLAMA_1B, "lengths": (64,), "texts": 5, "seeds": 10, "share": ("m",),
         "seeds_share": True},
        {**_QUICK, "lengths": (8,), "texts": 3, "seeds": 4, "share": ("m",),
         "seeds_share": True, "changes": {"max_steps": 600}},
    ),
}  # fmt: skip
PRESETS = ("paper", "small")


def settings_of(
    name: str, preset: str = "paper", config: Path | None = None, **given: Any
) -> Settings:
    """Return an experiment's settings: its preset, overridden by a YAML file, then by `given`.

    Raises:
        ValueError: an unknown experiment, preset or key, or a value that cannot be.
    """
    if name not in EXPERIMENTS:
        raise ValueError(
            f"experiment: {name!r} is not one of {', '.join(EXPERIMENTS)}" + hint(name, EXPERIMENTS)
        )
    if preset not in PRESETS:
        raise ValueError(
            f"preset: {preset!r} is not one of {', '.join(PRESETS)}" + hint(preset, PRESETS)
        )
    experiment = EXPERIMENTS[name]
    found = dict(getattr(experiment, preset))
    if config is not None:
        found |= read_config(config, experiment.keys)
    found |= {key: value for key, value in given.items() if value or value == ""}
    if found.get("prefix") == "none":
        found["prefix"] = None
    return Settings(**found)


def plan(
    out: Path, name: str, settings: Settings, device: str = "auto", also: Sequence[Settings] = ()
) -> tuple[int, int]:
    """Expand an experiment into the run folder `out`; return how many units and texts it has.

    Texts are tokenised here, and continuations generated (which loads the models that make them),
    so that workers need nothing but the run folder and the models. An experiment may have further
    settings in `also`, as of what is fitted behind another prefix or to a shorter grid; a text is
    cut to the longest N of them all, so that it is one text in each. Planned again with other
    lengths, an experiment keeps its texts, which grow where they must: what is done stays done.
    """
    require_place(out)  # before models are loaded and texts generated
    known = _Known.of(out, name)
    units: dict[str, Unit] = {}
    rows: dict[str, dict[str, Any]] = {}
    parts = (settings, *also)
    longest = max(n for one in parts for n in one.lengths)
    made: dict[tuple, list[TargetText]] = {}  # once for all parts: some are generated
    for part, model in ((one, model) for one in parts for model in one.models):
        tokenizer = tokenizer_of(model)
        for source in part.sources:
            asked = (
                model, source, part.texts, part.contexts, part.continuations, part.text_seed,
                part.dtype,
            )  # fmt: skip
            if asked not in made:
                made[asked] = _texts(model, source, part, longest, device)
            texts = made[asked]
            ids = [known.id_of(source.name, text) for text in texts]
            for key, text in zip(ids, texts, strict=True):
                rows[key] = {
                    "text_id": key, "source": source.name, "number": text.number,
                    "context": text.context, "origin": text.origin, "ids": text.ids,
                    "text": tokenizer.decode(text.ids, clean_up_tokenization_spaces=False),
                }  # fmt: skip
            units |= {unit.key: unit for unit in expand(model, source.name, ids, part)}
    table = pa.Table.from_pylist(list(rows.values()), schema=schema.TEXTS)
    kept = settings.to_json() | ({"also": [part.to_json() for part in also]} if also else {})
    RunFolder.create(out).add(name, kept, units.values(), table)
    return len(units), len(rows)


@dataclass(frozen=True)
class _Known:
    """The texts of a run: their ids by their tokens, and those that an experiment had, by place.

    A text has its id from the tokens it was first cut to.
    """

    by_tokens: dict[tuple[int, ...], str]
    by_place: dict[tuple, list[dict[str, Any]]]

    @classmethod
    def of(cls, out: Path, experiment: str) -> _Known:
        known = cls({}, {})
        if not (out / "run.json").exists():
            return known
        run = RunFolder.open(out)
        used = {text for unit in run.units(experiment).values() for text in unit.texts}
        for row in run.texts().to_pylist():
            known.by_tokens.setdefault(tuple(row["ids"]), row["text_id"])
            if row["text_id"] in used:
                place = row["source"], row["number"], row["origin"], row["context"]
                known.by_place.setdefault(place, []).append(row)
        return known

    def id_of(self, source: str, text: TargetText) -> str:
        """Return the id of the text if it is known, longer or shorter, and else a new one."""
        place = source, text.number, text.origin, text.context
        for row in self.by_place.get(place, ()):
            both = min(len(row["ids"]), len(text.ids))
            if row["ids"][:both] == text.ids[:both]:
                found: str = row["text_id"]
                return found
        return self.by_tokens.get(tuple(text.ids)) or text_id(text.ids)


def _texts(
    model: str, source: Source, settings: Settings, longest: int, device: str
) -> list[TargetText]:
    if source.kind == "generated":
        contexts, each = settings.contexts or settings.texts, settings.continuations or 1
        lm = _loaded(model, device, settings.dtype)
        return continuations(source, lm, contexts, each, longest, settings.text_seed)
    if settings.contexts:
        raise ValueError(
            f"source: {source.name} has no contexts to continue; use generated:{source.kind}…"
        )
    tokenizer = tokenizer_of(model)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return target_texts(source, encode, settings.texts, longest, settings.text_seed)


@functools.lru_cache(maxsize=1)
def _loaded(model: str, device: str, dtype: str) -> Any:
    return load_model(model, device, dtype)


def expand(model: str, source: str, texts: list[str], s: Settings) -> Iterator[Unit]:
    """Yield all units of one model and source, over texts by their ids."""
    common: dict[str, Any] = {
        "model": model, "source": source, "prefix": s.prefix, "recipe": s.recipe,
        "changes": s.changes, "dtype": s.dtype, "alone": s.alone, "timed": s.timed,
    }  # fmt: skip
    for arrangement in s.arrangements:
        for share in s.share:
            for size in s.group_sizes if share else (None,):
                for length in s.lengths:
                    for rows in _sharing(_rows(texts, s), share, size, s.seeds_share):
                        yield Unit(
                            mode="one-forward", texts=tuple(text for text, _ in rows),
                            seeds=tuple(seed for _, seed in rows), length=length, share=share,
                            group_size=size, arrangement=arrangement, **common,
                        )  # fmt: skip
    for k in s.vectors:
        for length in s.lengths:
            for text, seed in _rows(texts, s):
                yield Unit(
                    mode="autoregressive", texts=(text,), seeds=(seed,), length=length, vectors=k,
                    **common,
                )  # fmt: skip


def _rows(texts: list[str], s: Settings) -> list[tuple[str, int]]:
    """List (text, seed) of every row; of a context's continuations only the last has more seeds."""
    if not s.continuations:
        return [(text, seed) for text in texts for seed in range(s.seeds)]
    return [
        (text, seed)
        for i, text in enumerate(texts)
        for seed in range(s.seeds if (i + 1) % s.continuations == 0 else 1)
    ]


def _sharing(
    rows: list[tuple[str, int]], share: str | None, size: int | None, seeds_share: bool
) -> list[list[tuple[str, int]]]:
    """Cut rows to those that have a vector in common."""
    if share is None:
        return [[row] for row in rows]
    texts = list(dict.fromkeys(text for text, _ in rows))
    size = size or len(texts)
    group = {text: i // size for i, text in enumerate(texts)}
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for text, seed in rows:
        found.setdefault((group[text], 0 if seeds_share else seed), []).append((text, seed))
    return list(found.values())
