"""`learn_encoder`: train a network from text to e and m, once a frozen model.

Letters: R rows of a step, N targets, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from prototok.common.world import own_world
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.setup import Setup
from prototok.fitting.learned.checkpoint import Checkpoint
from prototok.fitting.learned.encoder import Encoder
from prototok.fitting.learned.encoder_network import EncoderNetwork
from prototok.fitting.learned.guesses import Guesses
from prototok.fitting.learned.kept import weights_of
from prototok.fitting.learned.network import token_rows
from prototok.fitting.learned.training import Step, joined, prepared, train
from prototok.fitting.prior import Prior
from prototok.fitting.recipe import FAST
from prototok.model.frozen_lm import FrozenLM
from prototok.model.in_front import PrefixLike
from prototok.model.prefix import Prefix
from prototok.texts.targets import Texts

_WIDTH, _DEPTH = 640, 4
_RATE = 1e-3  # of the AdamW that trains the network
_TEMPERATURE = 0.7  # of the loss


@own_world
def learn_encoder(
    lm: FrozenLM,
    texts: Texts | None = None,
    *,
    lengths: Sequence[int] = (8,),
    steps: int = 3000,
    prior: Prior | None = None,
    prefix: PrefixLike | Prefix = "auto",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    backend: str = "auto",
    progress: bool | None = None,
) -> Encoder:
    """Train a network to say e and m of a text in one pass, through the frozen model.

    The loss is that of the decoding; no text is fitted. `encoder(texts)` then gives e and m, and
    `fast_fit(lm, texts, init=encoder)` starts there.

    Args:
        lm: the frozen model, from `prototok.load`.
        texts: what windows are cut from to train on, each at least as long as the longest of them;
            the more and the nearer to what will be encoded, the better. None samples 512 texts of
            up to 128 tokens from the model itself, which is few: see docs/amortised.md.
        lengths: of the windows, rising; the short ones alone come first. The encoder takes any text
            up to the longest, and is best at these.
        steps: of training, each a forward and backward of about 1024 positions.
        prior: the mean and spread that vectors are counted in, from `learn_shared`; None: what
            comes with a built-in model, or `learn_shared(lm)`.
        prefix: what stands in front of e, as in `fast_fit`, and of what is encoded.
        seed: of the network's weights and of the windows; the same gives the same.
        checkpoint: a file that training is kept in every minute; where it is there, training goes
            on from it, as if it had never stopped.
        backend, progress: as in `fast_fit`.

    Raises:
        ValueError: an argument that cannot be met, named.
    """
    given = prepared(
        lm, texts, lengths, steps, seed, prior, prefix, FAST, backend, progress
    )  # fmt: skip
    bare, lm, grid, seed = lm, given.lm, given.lengths, given.seed
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = EncoderNetwork(lm.hidden_size, _WIDTH, _DEPTH, grid[-1])
    network.scale.fill_(given.spread)
    network.token_scale.fill_(float(token_rows(lm).float().std()))
    network.to(lm.device)
    recipe = replace(FAST, temperature=_TEMPERATURE)
    setup = Setup(lm, OneForward(given.layout, prior=given.start), recipe, backend, None)
    start = given.finished()
    kept = None if checkpoint is None else Checkpoint(checkpoint, lm, start.provenance)

    def begin(done: int) -> Step:
        guesses = [Guesses(setup, network, n) for n in grid]

        def make(optimizer: torch.optim.Optimizer, step: int) -> Callable[[], str]:
            # A generator a step, so that a training that goes on sees what it would have seen.
            generator = torch.Generator("cpu").manual_seed((seed << 32) + step & (1 << 63) - 1)
            place = guesses[step % joined(len(grid), step / steps)]
            place.train_step(optimizer, given.corpus, generator)
            return place.note

        return make

    train("learn encoder", network, steps, _RATE, kept, begin, progress)
    return Encoder(start, weights_of(network), bare)
