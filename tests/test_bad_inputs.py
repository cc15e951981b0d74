"""What a user can get wrong, by class: one sentence that names it, and nothing half written.

docs/reliability.md shows how many there are of each class; a test here keeps its figures true.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch

import prototok
from prototok import FrozenLM, Recipe, autoregressive
from prototok.cli import main
from prototok.geometry.paths import BezierSettings
from prototok.geometry.robustness import noisy
from prototok.geometry.vectors import nearest_tokens, pca
from prototok.sweep.run_folder import RunFolder
from prototok.texts.files import read_text
from prototok.texts.sources import Source
from support import small_llama

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
NAN, INF = float("nan"), float("inf")
HUGE = 1 << 70  # neither a tensor nor a column of a table takes it
NO_COUNTS: tuple[Any, ...] = (0, -1, 1.5, "3", True, NAN, HUGE, [1], {})
NO_SEEDS: tuple[Any, ...] = (1.5, "3", True, None, HUGE, -HUGE)
NO_TEXTS: tuple[Any, ...] = (
    [], "one string", b"bytes", 7, None, [""], [None], [[]], [[1.5]], [[True]], [[-1]], [[97]],
    [[1 << 40]], [{"a": 1}], np.zeros((1, 1, 1), int), torch.tensor(3), [object()], {"a": 1},
)  # fmt: skip
NO_MODELS: tuple[Any, ...] = (None, "tiny-llama", 3, object())
NO_BACKENDS: tuple[Any, ...] = ("cuda", "", "Torch", None, 3)
NO_RECIPES: tuple[Any, ...] = ("x", "", None, 3, {})


@functools.cache
def lm() -> FrozenLM:
    return prototok.load(small_llama(), device="cpu", dtype="float32")


@functools.cache
def fitted() -> prototok.FitResult:
    return prototok.fast_fit(lm(), [[3, 4, 5]], seeds=2, recipe=Recipe(max_steps=1))


def fit(**options: Any) -> object:
    return prototok.fast_fit(**({"lm": lm(), "texts": [[3, 4]]} | options))


def fit_stream(**options: Any) -> object:
    with tempfile.TemporaryDirectory() as home:
        given = {"lm": lm(), "texts": [[3, 4]], "folder": Path(home) / "F", "shard": 1}
        try:
            return prototok.fit_stream(**(given | options))
        finally:
            assert not list(Path(home).iterdir())


def decode(**options: Any) -> object:
    return prototok.decode(**({"lm": lm(), "tokens": fitted().tokens} | options))


def information(**options: Any) -> object:
    return prototok.information(**({"lm": lm(), "texts": [[3, 4]]} | options))


def capacity(**options: Any) -> object:
    given = {"lm": lm(), "texts": [[3, 4]], "lengths": (1, 2), "recipe": Recipe(max_steps=1)}
    return prototok.capacity(**(given | options))


def learn_shared(**options: Any) -> object:
    return prototok.learn_shared(**({"lm": lm(), "texts": [[3, 4]] * 2, "steps": 1} | options))


def mem(**options: Any) -> object:
    return autoregressive.fit(**({"lm": lm(), "texts": [[3, 4]]} | options))


def generate(**options: Any) -> object:
    given = {"lm": lm(), "mem": torch.zeros(1, 1, 32), "length": 2}
    return autoregressive.generate(**(given | options))


def interpolate(**options: Any) -> object:
    return prototok.interpolate(**({"lm": lm(), "fit": fitted(), "pairs": [(0, 1)]} | options))


def connect(**options: Any) -> object:
    given = {"lm": lm(), "fit": fitted(), "pairs": [(0, 1)]}
    return prototok.connect(**(given | {"settings": BezierSettings(max_steps=1)} | options))


def nearest(**options: Any) -> object:
    return nearest_tokens(**({"lm": lm(), "vectors": torch.zeros(1, 32)} | options))


def shaken(**options: Any) -> object:
    return noisy(**({"tokens": fitted().tokens, "level": 0.1} | options))


def components(**options: Any) -> object:
    return pca(**({"vectors": torch.randn(4, 3)} | options))


def learn_optimizer(**options: Any) -> object:
    given = {"lm": lm(), "texts": [[3, 4, 5]], "lengths": (2,), "steps": 1, "prefix": None}
    return prototok.learn_optimizer(**(given | options))


def learn_encoder(**options: Any) -> object:
    given = {"lm": lm(), "texts": [[3, 4, 5]], "lengths": (2,), "steps": 1, "prefix": None}
    return prototok.learn_encoder(**(given | options))


def export(**options: Any) -> object:
    with tempfile.TemporaryDirectory() as home:
        try:
            return prototok.export(**({"fit": fitted(), "folder": Path(home) / "F"} | options))
        finally:
            assert not list(Path(home).iterdir())


def load(**options: Any) -> object:
    return prototok.load(**({"model": "tiny-llama", "device": "cpu"} | options))


FUNCTIONS: dict[str, Callable[..., object]] = {
    "fast_fit": fit, "fit_stream": fit_stream, "decode": decode, "information": information,
    "capacity": capacity,
    "learn_shared": learn_shared, "autoregressive.fit": mem, "autoregressive.generate": generate,
    "interpolate": interpolate, "connect": connect, "nearest_tokens": nearest, "noisy": shaken,
    "pca": components,
    "learn_optimizer": learn_optimizer, "learn_encoder": learn_encoder, "export": export,
    "load": load, "Recipe": Recipe, "BezierSettings": BezierSettings, "Source": Source,
}  # fmt: skip

# Class → function → argument → values.
Table = dict[str, dict[str, dict[str, tuple[Any, ...]]]]
API: Table = {
    "numbers that count nothing": {
        "fast_fit": {
            "length": NO_COUNTS, "batch_size": NO_COUNTS, "seeds": NO_COUNTS[:7],
            "max_steps": NO_COUNTS,
        },
        "learn_optimizer": {"steps": NO_COUNTS, "positions": NO_COUNTS, "horizon": NO_COUNTS},
        "learn_encoder": {"steps": NO_COUNTS},
        "fit_stream": {
            "length": NO_COUNTS, "shard": (*NO_COUNTS, None), "batch_size": NO_COUNTS,
            "seeds": NO_COUNTS[:7],
        },
        "decode": {"length": NO_COUNTS, "batch_size": NO_COUNTS},
        "information": {"length": NO_COUNTS},
        "capacity": {"batch_size": NO_COUNTS, "restarts": (-1, 1.5, "3", True, NAN, HUGE)},
        "learn_shared": {
            "length": NO_COUNTS, "steps": NO_COUNTS, "batch_size": NO_COUNTS,
            "prefix": (0, -1, True, HUGE),
        },
        "autoregressive.fit": {
            "k": NO_COUNTS, "length": NO_COUNTS, "batch_size": NO_COUNTS, "seeds": NO_COUNTS[:7],
        },
        "autoregressive.generate": {"length": NO_COUNTS},
        "interpolate": {"points": NO_COUNTS, "batch_size": NO_COUNTS},
        "connect": {"points": NO_COUNTS, "batch_size": NO_COUNTS},
        "nearest_tokens": {"k": (*NO_COUNTS, 98)},
        "pca": {"components": (*NO_COUNTS, 5)},
        "BezierSettings": {"max_steps": NO_COUNTS, "samples": NO_COUNTS, "check_every": NO_COUNTS},
    },
    "texts that are none": {
        "fit_stream": {
            "texts": (
                "one string", b"bytes", 7, None, {"a": 1}, object(),
                pandas.DataFrame({"text": ["a table"]}),
            )
        },
        "fast_fit": {"texts": NO_TEXTS}, "information": {"texts": NO_TEXTS},
        "capacity": {"texts": NO_TEXTS}, "autoregressive.fit": {"texts": NO_TEXTS},
        "learn_shared": {"texts": tuple(t for t in NO_TEXTS if t is not None)},
    },
    "lengths that do not fit": {
        "fast_fit": {"length": (3, 41), "texts": ([[3] * 41],)},
        "decode": {"length": (41, 1 << 40)},
        "information": {"length": (3,), "texts": ([[3] * 50],)},
        "capacity": {"lengths": ((), (2, 1), (1, 1), (0,), (1.5,), "12", 3, (41,))},
        "autoregressive.fit": {"length": (3,), "texts": ([[3] * 41],)},
        "autoregressive.generate": {"length": (41, 1 << 40)},
    },
    "models that are none": {
        name: {"lm": NO_MODELS}
        for name in FUNCTIONS
        if name not in ("load", "pca", "noisy", "export", "Recipe", "BezierSettings", "Source")
    },
    "backends that are none": {
        name: {"backend": NO_BACKENDS}
        for name in ("fast_fit", "fit_stream", "decode", "information", "capacity",
                     "autoregressive.fit",
                     "autoregressive.generate", "interpolate", "connect", "learn_shared",
                     "learn_optimizer", "learn_encoder")
    },
    "recipes": {
        "fit_stream": {"recipe": NO_RECIPES},
        "fast_fit": {"recipe": NO_RECIPES}, "capacity": {"recipe": NO_RECIPES},
        "autoregressive.fit": {"recipe": NO_RECIPES},
        "Recipe": {
            "lr": (0, -1, NAN, INF, "1", None, 10**400),
            "betas": ((0.9,), (0.9, 1.0), 3, "ab", (NAN, 0.9)),
            "eps": (0, NAN, "1"), "weight_decay": (-1, NAN, "1"), "schedule": ("linear", None, 3),
            "cycle": (0, 1.5, "3", HUGE), "warmup": (-1, 1.5, "3", HUGE),
            "init_std": (0, NAN, None),
            "prior_rate": (0, NAN, "1"), "m_rate": (-1, NAN), "temperature": (0, INF, "1"),
            "max_steps": NO_COUNTS, "patience": NO_COUNTS, "accuracy": (0, 1.1, NAN, "1", None),
            "lr_width": NO_COUNTS, "cycle_tokens": NO_COUNTS,
            "cold": (0, NAN, "1"), "spreads": (-1, NAN, "1"), "cooling": (0, -1, NAN),
            "margin": (-1, NAN, "1"), "eigenbasis": ("yes", 1), "shipped_prior": ("no", 0),
            "name": (None, 3),
        },
    },
    "names and other options": {
        "fast_fit": {
            "share": ("both", "", 3, True), "arrangement": ("m e*", "", None, 3, "e0 m*", "e m*+9"),
            "group_size": (1, 0), "init": ("prior", 3), "callback": (3, "print"), "on_text": (3,),
            "prefix": (2.5, [1.5], [True], [97], {"a": 1}, np.zeros((400, 31))),
            "seeds": ([], [1, 1], [1.5], ["a"], None, {}, [HUGE]),
        },
        "fit_stream": {
            "arrangement": ("m e*", "", None, 3), "init": ("prior", 3), "share": ("m",),
            "recipes": ("fast",), "group_size": (1,), "on_text": (print,),
        },
        "information": {"bos": ("maybe", None, True)},
        "autoregressive.fit": {"first": ("third", None, 1), "callback": (3, "print")},
        "autoregressive.generate": {
            "cache": ("paged", None),
            "first": (torch.zeros(2).long(), torch.tensor([97]), [1], 3),
            "mem": (None, torch.zeros(1, 1, 31), torch.zeros(0, 1, 32), torch.zeros(32)),
        },
        "interpolate": {"pairs": ([(0, 9)], [(0, 0)], [(0,)], "ab", 3, []), "fit": (None, 3)},
        "connect": {
            "pairs": ([(0, 9)], [(0, 0)], [(0,)], "ab", 3, []), "fit": (None, 3),
            "settings": ("fast", 3),
        },
        "BezierSettings": {
            "lr": (0, -1, NAN, "1"), "betas": (3, (2, 3), (0.9,), "ab"), "seed": NO_SEEDS,
        },
        "capacity": {"init": ("prior", 3)},
        "learn_optimizer": {
            "prior": ("x", 3), "rate": (0, "1"), "near": (-1, "1"), "lengths": (3, (), (HUGE,)),
            "reach": (-1, 1.5, HUGE), "seed": NO_SEEDS,
        },
        "learn_encoder": {"prior": ("x", 3), "lengths": (3, ()), "seed": NO_SEEDS},
        "nearest_tokens": {"seed": NO_SEEDS},
        "noisy": {"seed": NO_SEEDS, "level": (-1, "1", NAN, None), "vectors": ("x", None)},
        "export": {"format": ("x", None, 3, ["npz"])},
        "Source": {
            "kind": ("web", "folder", "dataset", "generated", ""), "words": ((1, 2), (3, 2)),
            "column": (None, 3), "context_tokens": (0, "many"),
        },
    },
    "what to load": {
        "load": {
            "model": ("", "no/where", "/no/where", "tiny-lama", "a b", "../x", None, 3, "a/b/c"),
            "device": ("tpu", "", "cuda:99", "cpu:x", 3, None, "xpu"),
            "dtype": ("float7", "int8", "", torch.int64, 3, None, "float8_e4m3fn"),
            "revision": ("main",), "attention": ("flash", "paged", "", None),
        },
    },
}  # fmt: skip


def extra(function: str, argument: str) -> dict[str, Any]:
    """Arguments without which a value would not be looked at."""
    if function == "Recipe" and argument == "cycle":
        return {"schedule": "cosine"}
    if function == "Source":
        return {"name": "s"} | ({} if argument == "kind" else {"kind": "held-out"})
    return {}


API_CASES = [
    pytest.param(function, argument, value, id=f"{function}-{argument}-{i}")
    for table in API.values()
    for function, arguments in table.items()
    for argument, values in arguments.items()
    for i, value in enumerate(values)
]


@pytest.mark.parametrize(("function", "argument", "value"), API_CASES)
def test_a_bad_argument_is_one_sentence(function: str, argument: str, value: Any) -> None:
    with pytest.raises(ValueError) as refused:
        FUNCTIONS[function](**extra(function, argument) | {argument: value})
    said = str(refused.value)
    assert re.match(r"[a-z_]+: ", said) and "\n" not in said and len(said) < 600, said


FIT = ("fit", "book.txt", "-o", "F", "--device", "cpu")
DATASET = ("dataset", "book.txt", "-o", "F", "--device", "cpu")
SWEEP = ("sweep", "plan", "table3", "-o", "R", "--preset", "small")
COMMANDS: dict[str, list[tuple[str, ...]]] = {
    "prototok fit": [
        ("fit",), ("fit", "book.txt"), ("fit", "none.txt", "-o", "F"), ("fit", ".", "-o", "F"),
        ("fit", "empty.txt", "-o", "F"), ("fit", "latin.txt", "-o", "F"),
        ("fit", "book.txt", "-o", "book.txt"), ("fit", "book.txt", "-o", "book.txt/x"),
        ("fit", "book.txt", "-o", "full"), ("fit", "book.txt", "-o", "."), (*FIT, "--nonsense"),
        (*FIT, "--length", "0"), (*FIT, "--length", "-1"), (*FIT, "--length", "1.5"),
        (*FIT, "--length", "many"), (*FIT, "--length", "9999"), (*FIT, "--limit", "0"),
        (*FIT, "--limit", "x"), (*FIT, "--recipe", "x"), (*FIT, "--recipe", ""),
        (*FIT, "--arrangement", "m e*"), (*FIT, "--arrangement", ""), (*FIT, "--share", "both"),
        (*FIT, "--share", "m", "--arrangement", "e*"), (*FIT, "--seeds", "0"),
        (*FIT, "--seeds", "a"), (*FIT, "--batch-size", "0"), (*FIT, "--batch-size", "x"),
        (*FIT, "--model", "tiny-lama"), (*FIT, "--model", "no/where"), (*FIT, "--model", "full"),
        (*FIT, "--model", ""), (*FIT, "--device", "tpu"), (*FIT, "--device", "cuda:99"),
        (*FIT, "--dtype", "float7"), (*FIT, "--dtype", "int8"), (*FIT, "--revision", "main"),
        (*FIT, "--resume", "--overwrite"), (*FIT, "--max-steps", str(HUGE)),
        (*FIT, "--seeds", str(HUGE)), (*FIT, "--prefix", "\udcff"), ("fit", "/dev/null", "-o", "F"),
    ],
    "prototok dataset": [
        ("dataset",), ("dataset", "book.txt"), ("dataset", "none.txt", "-o", "F"),
        ("dataset", "*.csv", "-o", "F"), ("dataset", "bad.yaml", "-o", "F"),
        ("dataset", "full", "-o", "F"), ("dataset", "bad.parquet", "-o", "F", "--device", "cpu"),
        (*DATASET[:2], "-o", "book.txt"), (*DATASET[:2], "-o", "book.txt/x"),
        (*DATASET[:2], "-o", "full"), (*DATASET[:2], "-o", "."), (*DATASET[:2], "-o", "made"),
        (*DATASET, "--length", "0"), (*DATASET, "--shard", "0"), (*DATASET, "--shard", "x"),
        (*DATASET, "--limit", "-1"), (*DATASET, "--recipe", "x"), (*DATASET, "--seeds", "0"),
        (*DATASET, "--arrangement", "m e*"), (*DATASET, "--batch-size", "0"),
        (*DATASET, "--model", "tiny-lama"), (*DATASET, "--device", "tpu"),
        (*DATASET, "--init", "none"), (*DATASET, "--resume", "--overwrite"),
        (*DATASET, "--shard", str(HUGE)), (*DATASET, "--limit", str(HUGE)),
    ],
    "prototok decode": [
        ("decode",), ("decode", "none"), ("decode", "full"), ("decode", "book.txt"),
        ("decode", "half"), ("decode", "made", "--model", "tiny-neox"),
        ("decode", "made", "--model", "tiny-lama"), ("decode", "made", "--device", "tpu"),
        ("decode", "made", "--dtype", "float7"), ("decode", "made", "--out", "book.txt"),
        ("decode", "made", "--out", "full"), ("decode", "made", "--out", "book.txt/x"),
    ],
    "prototok capacity": [
        ("capacity",), ("capacity", "none.txt"), ("capacity", "empty.txt"), ("capacity", "full"),
        ("capacity", "book.txt", "--texts", "0"), ("capacity", "book.txt", "--longest", "1"),
        ("capacity", "book.txt", "--recipe", "x"), ("capacity", "book.txt", "--restarts", "-1"),
        ("capacity", "book.txt", "--out", "book.txt"), ("capacity", "book.txt", "--out", "full"),
        ("capacity", "book.txt", "--out", "book.txt/x"), ("capacity", "book.txt", "--model", "x/y"),
        ("capacity", "book.txt", "--device", "tpu"), ("capacity", "book.txt", "--dtype", "float7"),
        ("capacity", "book.txt", "--resume"), ("capacity", "book.txt", "--overwrite"),
        ("capacity", "book.txt", "--out", "c.csv", "--resume", "--overwrite"),
    ],
    "prototok bench": [
        ("bench", "--lengths", "a,b"), ("bench", "--lengths", "0"), ("bench", "--lengths", ""),
        ("bench", "--shape", "gpt-5"), ("bench", "--texts", "0"), ("bench", "--recipe", "x"),
        ("bench", "--shape", "pythia-160m", "--model", "x"), ("bench", "--model", "tiny-lama"),
        ("bench", "--out", "book.txt"), ("bench", "--out", "full"), ("bench", "--out", "x.svg"),
        ("bench", "--profile", "9:3"), ("bench", "--profile", "x"), ("bench", "--device", "tpu"),
        ("bench", "--dtype", "float7"),
    ],
    "prototok profile": [
        ("profile", "dream"), ("profile", "--steps", "3:2"), ("profile", "--steps", "x"),
        ("profile", "--batch", "0"), ("profile", "--length", "0"), ("profile", "--backend", "x"),
        ("profile", "--model", "tiny-lama"), ("profile", "--shape", "gpt-5"),
        ("profile", "--trace", "book.txt"), ("profile", "--trace", "full"),
        ("profile", "--device", "tpu"), ("profile", "--dtype", "float7"),
        ("profile", "--length", "99999", "--device", "cpu"),
    ],
    "prototok sweep": [
        ("sweep", "dance"), ("sweep", "plan"), ("sweep", "plan", "table9", "-o", "R"),
        ("sweep", "plan", "table3", "-o", "R"), (*SWEEP, "--preset", "huge"),
        (*SWEEP, "-o", "full"), (*SWEEP, "-o", "book.txt"), (*SWEEP, "--config", "none.yaml"),
        (*SWEEP, "--config", "full"), (*SWEEP, "--config", "bad.yaml"),
        (*SWEEP, "--config", "odd.yaml"), (*SWEEP, "--config", "latin.txt"),
        (*SWEEP, "--model", "tiny-lama"), (*SWEEP, "--model", "@main"), (*SWEEP, "--model", "a@"),
        (*SWEEP, "--source", "web"), (*SWEEP, "--source", "folder"),
        (*SWEEP, "--source", "folder:none"), (*SWEEP, "--source", "folder:full"),
        (*SWEEP, "--source", "dataset:none.parquet"), (*SWEEP, "--source", "dataset:bad.parquet"),
        (*SWEEP, "--source", "dataset:bad.jsonl"), (*SWEEP, "--source", "generated"),
        (*SWEEP, "--source", "generated:generated:held-out"), (*SWEEP, "--source", "random:none"),
        (*SWEEP, "--source", "random", "--source", "random"), (*SWEEP, "--prefix", "\udcff"),
        ("sweep", "run", "none"), ("sweep", "run", "full"),
        ("sweep", "run", "run", "--shard", "2/2"), ("sweep", "run", "run", "--shard", "x"),
        ("sweep", "run", "run", "--shard", "-1/2"),
        ("sweep", "run", "run", "--launcher", "pbs"), ("sweep", "run", "run", "--workers", "0"),
        ("sweep", "run", "run", "--batch-size", "0"), ("sweep", "run", "run", "--attempts", "0"),
        ("sweep", "run", "run", "--slurm", "a=b"),
        ("sweep", "status", "none"), ("sweep", "status", "book.txt"), ("sweep", "status", "broken"),
        ("sweep", "verify", "none"), ("sweep", "verify", "run", "--sample", "-1"),
        ("sweep", "verify", "broken"), ("sweep", "compact", "none"), ("sweep", "compact", "broken"),
    ],
    "prototok report": [
        ("report",), ("report", "none"), ("report", "full"), ("report", "book.txt"),
        ("report", "broken"), ("report", "run", "-o", "full"), ("report", "run", "-o", "page"),
        ("report", "run", "-o", "run.html"), ("report", "run", "-o", "book.txt"),
        ("report", "run", "-o", "book.txt/x.html"), ("report", "run", "--pairs", "0"),
        ("report", "run", "--curve-steps", "0"),
    ],
    "prototok": [("dance",), ("--nonsense",), ("env", "--nonsense"), ("env", "more")],
}  # fmt: skip
CLI_CASES = [
    pytest.param(arguments, id=" ".join(arguments))
    for commands in COMMANDS.values()
    for arguments in commands
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, with files and folders of theirs that nothing below may change."""
    home = tmp_path_factory.mktemp("home")
    (home / "book.txt").write_text("It was a dark and stormy night. " * 2500)
    (home / "empty.txt").write_text(" \n")
    (home / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (home / "bad.yaml").write_text("a: [")
    (home / "odd.yaml").write_text("texts: many")
    (home / "bad.jsonl").write_text("{}\n")
    (home / "bad.parquet").write_text("PAR1")
    for folder in ("full", "half", "broken"):
        (home / folder).mkdir()
    (home / "full" / "thesis.md").write_text("years of work")
    fitted().save(home / "made")
    (home / "half" / "fits.parquet").write_bytes((home / "made" / "fits.parquet").read_bytes())
    RunFolder.create(home / "run")
    (home / "broken" / "run.json").write_text("{")
    return home


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != "lock"  # of a run, empty
    }


@pytest.mark.parametrize("arguments", CLI_CASES)
def test_a_bad_command_is_exit_code_2_and_changes_nothing(
    arguments: tuple[str, ...], home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(home)
    before = content(home)
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert said.strip() and "Traceback" not in said
    if "Usage:" not in said:
        (sentence,) = [line for line in said.splitlines() if line.startswith("prototok: ")]
        assert re.match(r"prototok: [a-z_]+: ", sentence), sentence
    assert content(home) == before


def test_the_page_has_the_figures() -> None:
    counts = {
        name: sum(len(values) for function in table.values() for values in function.values())
        for name, table in API.items()
    }
    counts |= {f"`{name}`": len(commands) for name, commands in COMMANDS.items()}
    page = PAGE.read_text(encoding="utf-8")
    for name, count in counts.items():
        assert f"| {name} | {count} |" in page, (name, count)
    assert f"**{sum(counts.values())}**" in page and sum(counts.values()) >= 300
    ids = [param.id for param in CLI_CASES]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", ["a:b", "~", "file:x"])
def test_a_folder_may_have_any_name(
    name: str, small_lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit = prototok.fast_fit(small_lm, [[3, 4]], recipe=Recipe(max_steps=2), progress=False)
    fit.save(name)
    assert (tmp_path / name / "fits.parquet").exists()
    assert torch.equal(prototok.FitResult.load(name).tokens.e, fit.tokens.e)


def test_vectors_are_not_replaced_by_something_else(small_lm: FrozenLM, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    fit = prototok.fast_fit(small_lm, [[3, 4]], recipe=Recipe(max_steps=2), progress=False)
    fit.tokens.save(path)
    fit.tokens.save(path)
    prior = prototok.Prior(torch.zeros(2, 32), torch.ones(2, 32), None, small_lm.identity)
    with pytest.raises(ValueError, match="holds a prototok.proto_tokens, no prototok.prior"):
        prior.save(path)
    assert torch.equal(prototok.ProtoTokens.load(path).e, fit.tokens.e)


def test_a_checkpoint_that_cannot_be_written_is_refused_at_once(
    small_lm: FrozenLM, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text("no folder")
    start = prototok.Prior(torch.zeros(2, 32), torch.ones(2, 32), None, small_lm.identity)
    with pytest.raises(ValueError, match="^checkpoint: "):
        prototok.learn_optimizer(
            small_lm, [[5, 6, 7, 8]], lengths=(2,), steps=10**6, prior=start,
            checkpoint=tmp_path / "book.txt" / "x", progress=False,
        )  # fmt: skip


def test_a_prefix_that_is_no_unicode_is_one_sentence(tiny_lm: FrozenLM) -> None:
    with pytest.raises(ValueError, match="^prefix: .* is not valid Unicode"):
        prototok.fast_fit(tiny_lm, ["a b"], prefix="\ud800", progress=False)


def test_vectors_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    broken = dataclasses.replace(fitted().tokens, m=fitted().tokens.m * NAN)
    with pytest.raises(ValueError, match=r"^m: .* not finite; .*x\.safetensors is not written"):
        broken.save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_book_may_come_through_a_pipe() -> None:
    read, write = os.pipe()
    os.write(write, b"A book.")
    os.close(write)
    assert read_text(f"/dev/fd/{read}") == "A book."
    os.close(read)


def test_text_goes_nowhere_where_stdout_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_lm: FrozenLM
) -> None:
    prototok.fast_fit(tiny_lm, ["a b"], recipe=Recipe(max_steps=1)).save(tmp_path / "F")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as ended:
        main(["decode", str(tmp_path / "F"), "--device", "cpu"])
    assert ended.value.code in (None, 0, 3)
