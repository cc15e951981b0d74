"""What a notebook shows of a result: one line, or a small table with nothing unescaped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import prototok
from prototok import FitResult, FrozenLM, Recipe, autoregressive
from prototok.fitting.shipped import shipped
from prototok.geometry import nearest_tokens, norms, pca
from prototok.model.in_front import prefix_of

TEXTS = [[3, 7, 1], [9, 2, 4]]
RECIPE = Recipe(lr=0.1, max_steps=60)


@pytest.fixture(scope="module")
def fit(small_lm: FrozenLM) -> FitResult:
    return prototok.fast_fit(small_lm, TEXTS, seeds=2, recipe=RECIPE, history=True)


def test_a_fit_says_its_size_and_how_many_are_exact(fit: FitResult) -> None:
    exact, steps = int(fit.exact.sum()), int(fit.steps.median())
    expected = f"FitResult(2 texts × 2 seeds, {exact}/4 exact, median {steps} steps)"
    assert repr(fit) == expected
    one = fit.best()
    one = replace(one, margin=torch.full_like(one.margin, float("-inf")))
    assert "2 texts × 1 seed, 2/2 exact, 2 failed, median" in repr(one)


def test_every_public_object_is_one_short_line(fit: FitResult, small_lm: FrozenLM) -> None:
    prefix = prefix_of(small_lm, [5, 6])
    behind = small_lm.behind(prefix)
    paths = prototok.interpolate(small_lm, fit, [(0, 1)], points=3)
    mem = autoregressive.fit(small_lm, TEXTS, recipe=RECIPE)
    shown: list[Any] = [
        fit, fit.tokens, fit.history, fit.history and fit.history.curves[0][0], mem, prefix,
        small_lm, behind, small_lm.body, small_lm.plan(2, 3, pair=True), paths,
        prototok.information(small_lm, TEXTS), prototok.capacity(small_lm, TEXTS, lengths=(2,)),
        shipped(prototok.Prior, prototok.load("tiny-llama")), norms(small_lm, fit.tokens.e[:, 0]),
        nearest_tokens(small_lm, fit.tokens.e[:, 0], k=1), pca(fit.tokens.e[:, 0], 1),
        prototok.Recipe(),
    ]  # fmt: skip
    for one in shown:
        assert "\n" not in repr(one) and 0 < len(repr(one)) < 600, type(one)
        assert type(one).__name__ in repr(one)
    assert repr(behind).endswith("behind Prefix(ids=[5, 6]))")
    assert "2 texts × 2 seeds of 3 tokens, 'e m*'" in repr(fit.tokens)
    values = prototok.information(small_lm, [[1, 2]])
    nats = f"{float(values.nats[0]):.4g}"
    assert repr(values) == f"Information(nats=[{nats}], scored=[1], bos='drop')"


def test_the_table_is_small_and_escaped(fit: FitResult, small_lm: FrozenLM) -> None:
    page = fit._repr_html_()
    assert page.count("<tr>") == 3 and page.count("<th>") == 7
    many = prototok.fast_fit(small_lm, [[i + 3] for i in range(14)], recipe=Recipe(max_steps=1))
    assert many._repr_html_().count("<tr>") == 11 and "and 4 more" in many._repr_html_()
    mem = autoregressive.fit(small_lm, TEXTS, recipe=RECIPE)
    assert mem._repr_html_().count("<tr>") == 3
    from prototok.common.shown import html_table

    assert "<script>" not in html_table("<script>", ["<script>"], [["<script>"]], 1)


def test_decode_takes_a_fit(fit: FitResult, small_lm: FrozenLM) -> None:
    ids = prototok.decode(small_lm, fit)
    assert torch.equal(ids, prototok.decode(small_lm, fit.tokens))
    with pytest.raises(ValueError, match="tokens: list is not ProtoTokens or a FitResult"):
        prototok.decode(small_lm, [1, 2])  # type: ignore[call-overload]


def test_history_is_what_a_callback_saw(small_lm: FrozenLM) -> None:
    seen: list[tuple[int, int, float]] = []

    def note(event: prototok.fitting.fast_fit.FitEvent) -> None:
        columns = (event.rows, event.steps, event.loss)
        seen.extend(zip(*(c.tolist() for c in columns), strict=True))

    fit = prototok.fast_fit(
        small_lm, [[3, 7, 1], [9, 2]], seeds=2, recipe=RECIPE, callback=note, history=True
    )
    assert fit.history is not None
    for row in range(4):
        curve = fit.history.curves[row // 2][row % 2]
        expected = [(step, loss) for r, step, loss in seen if r == row]
        assert curve.steps.tolist() == [step for step, _ in expected]
        length = int(fit.tokens.lengths[row // 2])
        losses = torch.tensor([loss for _, loss in expected]) / length
        torch.testing.assert_close(curve.loss, losses)
        assert float(curve.accuracy.max()) == float(fit.accuracy_in_batch[row // 2, row % 2])
    best = fit.best()
    assert best.history is not None
    for text, seed in enumerate(best.seed[:, 0].tolist()):
        assert best.history.curves[text][0] is fit.history.curves[text][seed]
    table = fit.history.to_pandas()
    assert len(table) == len(seen) and set(table.text) == {0, 1}


def test_a_plot_has_a_line_a_row(fit: FitResult) -> None:
    pytest.importorskip("matplotlib")
    figure = fit.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for
    above, below = figure.axes
    assert len(above.lines) == len(below.lines) == 4
    assert fit.history is not None
    assert below.lines[3].get_ydata() == pytest.approx(fit.history.curves[1][1].accuracy.numpy())
    with pytest.raises(ValueError, match="fit with history=True"):
        replace(fit, history=None).plot()
