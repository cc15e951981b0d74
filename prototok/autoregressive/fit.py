"""`autoregressive.fit`: [mem] vectors from which a frozen model generates a text token by token.

Letters: T texts, S seeds, N targets of a text, K vectors in front, d hidden size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

import torch
import transformers
from torch import Tensor

import prototok
from prototok.autoregressive.generate import generate, require_room
from prototok.common.arguments import is_count, require_batch_size, seed_list
from prototok.common.progress import Progress
from prototok.fitting.engine.inputs import TeacherForced
from prototok.fitting.engine.rows import make_units
from prototok.fitting.engine.run import Finished, FitEvent, run
from prototok.fitting.recipe import Recipe, recipe_of
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.results.fit_result import FitInterrupted
from prototok.results.mem_fit import MemFit
from prototok.texts.targets import Texts, targets_of


def fit(
    lm: FrozenLM,
    texts: Texts,
    k: int = 1,
    *,
    length: int | None = None,
    seeds: int | Sequence[int] = 1,
    recipe: str | Recipe = "fast",
    first: str = "predicted",
    backend: str = "auto",
    batch_size: int | str = "auto",
    progress: bool | None = None,
    callback: Callable[[FitEvent], None] | None = None,
) -> MemFit:
    """Fit [mem_1 … mem_K] in front of each text, and verify by generating it from them alone.

    Minimises −Σ_i log P(t_i | mem_1 … mem_K, t_1 … t_{i−1}) over the vectors, the paper's
    autoregressive side (its §4, after Kuratov et al.), for all texts × seeds together. A row ends
    when its vectors *generate* the text at batch 1, in the model's dtype and in float32; one that
    is right only as long as the true text is fed goes on with a higher margin to clear.

    Args:
        lm: the frozen model, from `prototok.load`.
        texts: strings, ragged lists of token ids, or a LongTensor (T, N). A BOS that the tokenizer
            would put in front is dropped.
        k: K, vectors a text.
        length: cut every text to this many tokens.
        seeds: how many initialisations to fit for each text (0 … seeds − 1), or which ones.
        recipe: "fast", "paper", "kuratov" (their settings, see `kuratov`), or a `Recipe`.
        first: "predicted" has mem_K predict t_1; "given" feeds t_1 and scores N − 1 tokens, as
            Kuratov et al. do.
        backend: which kernels: "torch", "triton" (CUDA), "cpu" (C++), or "auto".
        batch_size: rows on the device at once.
        progress: None shows a bar on a terminal; True also prints lines elsewhere; False is quiet.
        callback: called with a `FitEvent` after every look at the device (every step on the CPU).

    Raises:
        ValueError: an argument that cannot be met, named.
        FitInterrupted: Ctrl-C; carries the texts whose fits had ended.
    """
    require_frozen(lm)
    settings = kuratov(lm) if recipe == "kuratov" else recipe_of(recipe)
    if not is_count(k):
        raise ValueError(f"k: {k!r} is not a positive integer")
    if first not in ("predicted", "given"):
        raise ValueError(f"first: {first!r} is not 'predicted' or 'given'")
    lm.plan(1, 1, backend)  # refuses a backend that cannot be had
    require_batch_size(batch_size)
    chosen = seed_list(seeds)
    given = int(first == "given")
    targets = targets_of(lm, texts, length)
    for i, ids in enumerate(targets):
        if len(ids) <= given:
            raise ValueError(f"texts: text {i} has one token, and first = 'given' scores none")
        try:
            require_room(lm, k, len(ids))
        except ValueError as error:
            raise ValueError(f"texts: text {i} is too long; {error}") from None

    units = make_units(targets, chosen, None, None)
    verified: dict[int, _Verified] = {}  # by row

    def confirm(finished: Finished) -> bool:
        (row,) = finished.unit.rows
        verified[row.index] = _verify(lm, row.targets, finished.vectors[0][0], given, backend)
        return verified[row.index].accuracy >= settings.accuracy

    inputs = TeacherForced(lm.embedding, k, given)
    ended: dict[int, tuple[Finished, _Verified]] = {}  # by row
    exact = 0

    def observe(event: FitEvent) -> None:
        bar.update(len(ended), f"{exact} exact, the oldest at step {int(event.steps.max())}")
        if callback is not None:
            callback(event)

    def result(texts: list[int]) -> MemFit:
        rows = [ended[t * len(chosen) + s] for t in texts for s in range(len(chosen))]
        shape = (len(texts), len(chosen))

        def column(values: list[float] | list[int]) -> Tensor:
            return torch.tensor(values).view(shape)

        accuracy = column([v.accuracy for _, v in rows])
        positions = inputs.input_length(max(len(ids) for ids in targets))
        plan = lm.plan(len(targets) * len(chosen), positions, backend)
        return MemFit(
            mem=torch.stack([f.vectors[0][0] for f, _ in rows]).view(*shape, k, lm.hidden_size),
            targets=[targets[t] for t in texts], first=first, model=lm.identity,
            accuracy=accuracy, exact=accuracy == 1.0,
            margin=column([v.margin for _, v in rows]),
            accuracy_teacher_forced=column([v.teacher_forced for _, v in rows]),
            steps=column([f.steps for f, _ in rows]),
            seconds=column([f.seconds for f, _ in rows]),
            seed=column(chosen * len(texts)),
            provenance={
                "recipe": json.dumps(dataclasses.asdict(settings)),
                "seeds": json.dumps(chosen),
                "dtype": str(lm.dtype).removeprefix("torch."),
                "device": lm.device.type,
                "backend": plan.passes.taken,
                "plan": plan.summary(),
                "verified with": _cache(lm),
                "prototok": prototok.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        )  # fmt: skip

    try:
        with Progress(len(units), "fit [mem]", progress) as bar:
            fits = run(lm, units, inputs, settings, batch_size, backend, confirm, observe)
            for finished in fits:
                (row,) = finished.unit.rows
                check = verified.pop(row.index)
                ended[row.index] = (finished, check)
                exact += check.accuracy == 1.0
    except KeyboardInterrupt:
        seeds_of = range(len(chosen))
        whole = [
            t for t in range(len(targets)) if all(t * len(chosen) + s in ended for s in seeds_of)
        ]
        raise FitInterrupted(result(whole) if whole else None, whole) from None
    return result(list(range(len(targets))))


def kuratov(lm: FrozenLM) -> Recipe:
    """Kuratov et al.'s settings: the paper recipe, started at the scale of the embedding matrix.

    AdamW lr 0.01, betas (0.9, 0.9), weight decay 0.01; randn × std(embedding matrix); at most 5000
    steps, and no more than 2000 in a row without a higher accuracy.
    """
    return Recipe(name="kuratov", init_std=float(lm.embedding.float().std()), patience=2000)


@dataclasses.dataclass(frozen=True)
class _Verified:
    """One row at batch 1, in the model's dtype and in float32; the worse of both."""

    accuracy: float  # as generated
    margin: float
    teacher_forced: float


def _verify(lm: FrozenLM, targets: Tensor, mem: Tensor, given: int, backend: str) -> _Verified:
    """Generate from one row's vectors (K, d) and compare with its targets (N,)."""
    accuracy = teacher_forced = 1.0
    margin = float("inf")
    first = targets[:1] if given else None
    for model in (lm, lm.cast(torch.float32)):
        ids = generate(model, mem[None], len(targets), _cache(lm), first, backend)[0]
        right = (ids == targets)[given:]
        margins = _margins(model, targets, mem, backend)[given:]
        accuracy = min(accuracy, float(right.double().mean()))
        teacher_forced = min(teacher_forced, float((margins > 0).double().mean()))
        # Up to its first wrong token the generation has read the text itself.
        sound = int(right.long().cumprod(0).sum())
        margin = min(margin, float(margins[: sound + 1].min()))
        if sound < len(right):
            margin = min(margin, 0.0)
    return _Verified(accuracy, margin, teacher_forced)


@torch.no_grad()
def _margins(lm: FrozenLM, targets: Tensor, mem: Tensor, backend: str) -> Tensor:
    """(N,) target logit minus the best other logit, with the text before each target given."""
    vectors, ids = mem[None].to(lm.device, lm.dtype), targets.to(lm.device)
    inputs_embeds = torch.cat([vectors, lm.embed(ids[:-1])[None]], dim=1)
    logits = lm.logits(inputs_embeds, backend)[0, len(mem) - 1 :].float()  # (N, V)
    own = logits.gather(1, ids[:, None])
    best_other = logits.scatter(1, ids[:, None], float("-inf")).amax(dim=1)
    return (own[:, 0] - best_other).cpu()


def _cache(lm: FrozenLM) -> str:
    return "dynamic" if lm.body.family == "general" else "engine"
