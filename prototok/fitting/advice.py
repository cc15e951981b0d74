"""What to try where texts did not come back."""

from __future__ import annotations

from prototok.common.shown import count
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.setup import Setup
from prototok.results.fit_result import FitResult

_NEAR = 0.9  # from this token accuracy on, more of the same may do


def advice(fit: FitResult, setup: Setup) -> str | None:
    """Return a line about the texts of `fit` that no seed got right, most promising first.

    None where every text came back, or where texts share a vector.
    """
    best = fit.best()
    missing = ~best.exact[:, 0]
    if fit.tokens.share is not None or not bool(missing.any()):
        return None
    assert isinstance(setup.inputs, OneForward)
    reached = best.accuracy[missing, 0]
    most = f"more than {setup.recipe.max_steps} steps"
    near = float(reached.median()) >= _NEAR
    ways = [
        most if near else "a smaller length",
        "" if fit.tokens.seeds > 1 else "4 seeds",
        "" if setup.recipe.name != "paper" else "the recipe 'fast'",
        "" if fit.tokens.prefix is not None else "a prefix such as ' the'",
        "" if setup.inputs.prior is not None else "a learned start",
        "a smaller length" if near else most,
    ]
    low, high = float(reached.min()), float(reached.max())
    span = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
    return (
        f"{count(int(missing.sum()), 'text')} of {len(missing)} did not come back whole (token "
        f"accuracy {span}); try {', '.join(way for way in ways if way)}"
    )
