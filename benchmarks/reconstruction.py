"""How many texts come back whole, in how many steps, and whether plain transformers agrees.

    python benchmarks/reconstruction.py --shared ../shared

fits texts on the small real models below --shared and on the built-in ones. Every text claimed
exact is decoded again by `AutoModelForCausalLM` in float32 at batch 1, from the stored safetensors
alone, and counted as confirmed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from record import RESULTS, provenance, write
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prototok
from prototok import FitResult, FrozenLM
from prototok.fitting.recipe import recipe_of
from prototok.model.load import BUILT_IN
from prototok.texts.files import read_text

STORIES, NOVEL = "corpora/tinystories/valid.txt", "corpora/novels/E_ENG18652_Carroll.txt"


@dataclass(frozen=True)
class Case:
    model: str  # below --shared, or built in
    text: str  # below --shared; "held_out" is the built-in models' own
    length: int
    recipe: str
    max_steps: int


CASES = (
    Case("models/stories260k", STORIES, 16, "paper", 1500),
    Case("models/stories260k", STORIES, 16, "fast", 1500),
    Case("models/stories3m", STORIES, 16, "paper", 1500),
    Case("models/stories3m", STORIES, 16, "fast", 1500),
    Case("models/stories3m", STORIES, 32, "fast", 3000),
    Case("models/neox4m", NOVEL, 8, "paper", 1500),
    Case("models/neox4m", NOVEL, 8, "fast", 1500),
    Case("tiny-llama", "held_out", 16, "paper", 1500),
    Case("tiny-llama", "held_out", 16, "fast", 1500),
    Case("tiny-neox", "held_out", 8, "paper", 1500),
    Case("tiny-neox", "held_out", 8, "fast", 1500),
)


def texts_of(lm: FrozenLM, path: Path, case: Case, count: int) -> list[list[int]]:
    """Stories: the first paragraphs long enough. Books: consecutive pieces from 5 % in."""
    text = read_text(path)
    if case.text == STORIES:
        paragraphs = [lm.encode(part) for part in text.split("\n\n")]
        return [ids[: case.length] for ids in paragraphs if len(ids) >= case.length][:count]
    ids = lm.encode(text[len(text) // 20 :])
    return [ids[i : i + case.length] for i in range(0, count * case.length, case.length)]


@torch.no_grad()
def confirmed(fit: FitResult, path: str) -> int:
    """Exact texts that plain transformers reproduces in float32 from the file alone."""
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        fit.tokens.save(Path(folder) / "tokens.safetensors")
        stored = load_file(Path(folder) / "tokens.safetensors")
    count = 0
    for i, target in enumerate(fit.targets):
        e, m = stored["e"][i, 0], stored["m"][i, 0]
        embeds = torch.cat([e[None], m.expand(len(target) - 1, -1)])[None]
        same = torch.equal(plain(inputs_embeds=embeds).logits[0].argmax(-1), target)
        count += same and bool(fit.exact[i, 0])
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=Path, help="folder with models/ and corpora/")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS / "reconstruction.json")
    a = parser.parse_args()
    built_in = Path(prototok.__file__).parent / "models"
    rows = []
    print("model         N  recipe  exact  confirmed  steps: quartiles of exact  seconds a text")
    for case in CASES:
        own = case.model in BUILT_IN
        if a.only not in case.model or (a.shared is None and not own):
            continue
        path = str(built_in / case.model if own else a.shared / case.model)
        lm = prototok.load(case.model if own else path)
        source = Path(path) / "held_out.txt" if own else a.shared / case.text
        recipe = dataclasses.replace(recipe_of(case.recipe), max_steps=case.max_steps)
        texts = texts_of(lm, source, case, a.texts)
        clock = time.perf_counter()
        fit = prototok.fast_fit(lm, texts, recipe=recipe, progress=True)
        seconds = (time.perf_counter() - clock) / len(texts)
        steps = fit.steps[fit.exact].double()
        points = torch.tensor([0.25, 0.5, 0.75]).double()
        quartiles = torch.quantile(steps, points).tolist() if len(steps) else []
        row = {
            **dataclasses.asdict(case),
            "model": case.model.rsplit("/", 1)[-1],
            "dtype": str(lm.dtype).removeprefix("torch."),
            "texts": len(texts),
            "exact": int(fit.exact.sum()),
            "confirmed": confirmed(fit, path),
            "accuracy": float(fit.accuracy.mean()),
            "steps_quartiles": quartiles,
            "steps": fit.steps[:, 0].tolist(),
            "margin_smallest": float(fit.margin[fit.exact].min()) if len(steps) else None,
            "seconds_per_text": seconds,
        }
        rows.append(row)
        middle = " / ".join(f"{q:.0f}" for q in quartiles)
        print(
            f"{row['model']:<12} {case.length:>2}  {case.recipe:<6}  "
            f"{row['exact']:>2}/{len(texts)}  {row['confirmed']:>9}  {middle:>25}  {seconds:.2f}",
            flush=True,
        )
    write(provenance() | {"cases": rows}, a.out)
    print(json.dumps([{k: r[k] for k in ("model", "length", "recipe", "exact")} for r in rows]))


if __name__ == "__main__":
    main()
