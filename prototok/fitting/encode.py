"""`encode`: proto-tokens in one pass of an encoder, without a gradient, each verified.

Letters: T texts, d hidden size.
"""

from __future__ import annotations

import json
import time

from prototok.common.progress import Progress
from prototok.common.world import own_world
from prototok.decoding.decode import require_length
from prototok.fitting.driver import EndedRow, require_room_for
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.fast_fit import one_forward, result_of, tokens_of
from prototok.fitting.front import front_of
from prototok.fitting.learned.encoder import Encoder
from prototok.fitting.recipe import FAST
from prototok.fitting.shipped import shipped
from prototok.fitting.verify import Verified, verify
from prototok.model.frozen_lm import FrozenLM, require_frozen
from prototok.model.in_front import PrefixLike
from prototok.model.prefix import Prefix
from prototok.results.arrangement import Arrangement
from prototok.results.fit_result import FitResult
from prototok.results.provenance import provenance_of
from prototok.texts.targets import Texts, targets_of

_ROWS = 256  # from one look at the bar to the next


def encoder_for(lm: FrozenLM, encoder: Encoder | None) -> Encoder:
    """Return the encoder, or the one that a built-in model brings, with the model it reads with.

    Raises:
        ValueError: none was given and none comes with the model, or it is of another one.
    """
    encoder = shipped(Encoder, lm) if encoder is None else encoder
    if encoder is None:
        raise ValueError(f"encoder: none comes with {lm.identity.name}; see learn_encoder")
    if not isinstance(encoder, Encoder):
        raise ValueError(f"encoder: {type(encoder).__name__} is not an Encoder; see learn_encoder")
    return encoder.on(lm)


@own_world
def encode(
    lm: FrozenLM,
    texts: Texts,
    encoder: Encoder | None = None,
    *,
    length: int | None = None,
    prefix: PrefixLike | Prefix = "auto",
    backend: str = "auto",
    progress: bool | None = None,
) -> FitResult:
    """Say e and m of texts in one pass each, and verify every one by decoding it alone.

    What comes back is what `fast_fit` gives, after no step: vectors, and how many tokens of each
    text they bring back. `fast_fit(lm, texts, init=encoder)` goes on from there.

    Args:
        lm: the frozen model, from `prototok.load`.
        texts: as in `fast_fit`, none longer than `encoder.longest`.
        encoder: from `prototok.learn_encoder`, of this model; None: what a built-in model brings.
        length: cut every text to this many tokens.
        prefix: what stands in front of e; "auto": what the encoder was trained behind.
        backend, progress: as in `fast_fit`.

    Raises:
        ValueError: an argument that cannot be met, named.
    """
    require_frozen(lm)
    encoder = encoder_for(lm, encoder)
    lm.plan(1, 1, backend)  # refuses a backend that cannot be had
    layout = Arrangement.parse("e m*")
    targets = targets_of(lm, texts, length)
    lm, in_front = front_of(lm, prefix, FAST, encoder.start)
    require_room_for(targets, lambda n: require_length(n, lm, layout))
    setup = one_forward(lm, layout, FAST, encoder.start, backend, None)
    clock = time.perf_counter()
    groups = encoder.started(lm, make_groups(targets, [0], None, None))
    share = (time.perf_counter() - clock) / len(groups)
    ended: list[EndedRow[Verified]] = []
    exact = 0
    with Progress(len(groups), "encode", progress) as bar:
        for first in range(0, len(groups), _ROWS):
            guesses = []
            for group in groups[first : first + _ROWS]:
                (row,) = group.rows
                assert row.start is not None
                guesses.append((group.index, row, row.start))
            checks = verify(setup, [(row.targets, start) for _, row, start in guesses])
            for (index, row, start), check in zip(guesses, checks, strict=True):
                ended.append(
                    EndedRow(row, index, start, check, check.accuracy, 0, share, failed=False)
                )
                exact += check.exact
            bar.update(len(ended), f"{exact} exact")
    plan = lm.plan(
        len(targets), layout.input_length(max(map(len, targets))), backend, layout.is_pair
    )
    made = {"name": "encoder", "trained": encoder.start.provenance}
    provenance = provenance_of(lm, FAST, [0], plan) | {
        "recipe": json.dumps(made), "prefix": in_front,
    }  # fmt: skip
    return result_of(tokens_of(setup, ended, 1, None, provenance), ended)
