"""Paths and robustness of a real run's solutions, read back from its tensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import prototok
from prototok.geometry import BezierSettings, score
from prototok.report import gallery as gallery_module
from prototok.report.build import build
from prototok.report.gallery import gallery
from prototok.report.measure import fit_of, measure
from prototok.report.results import Subject, read
from prototok.sweep.experiments import plan, settings_of
from prototok.sweep.run_folder import RunFolder
from prototok.sweep.work import Worker
from prototok.texts.sources import Source


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Figure 6 in miniature: one text, two seeds, m shared and m per text, and this behind ids."""
    path = tmp_path_factory.mktemp("run") / "run"
    settings = settings_of(
        "figure6", "small", None, models=("tiny-neox",), sources=(Source.parse("held-out"),),
        texts=1, seeds=2, lengths=(5,), share=("m", None), dtype="float32",
    )  # fmt: skip
    behind = dataclasses.replace(settings, share=(None,), prefix=(5, 17))
    plan(path, "figure6", settings, "cpu", also=(behind,))
    found = RunFolder.open(path)
    units = list(found.units().values())
    for one in units:
        assert [done for _, done in Worker(found, "cpu").do([one])] == [True]
    return found


def test_rows_of_a_run_are_the_fits_that_were_committed(run: RunFolder) -> None:
    lm = prototok.load("tiny-neox", device="cpu", dtype="float32")
    fits = read(run.path).experiments["figure6"].where(prefix="auto").fits()
    fit = fit_of(read(run.path), fits, lm)
    assert len(fits) == 4 and bool(fit.exact.all())  # two rows that share m, two of their own
    assert torch.equal(score(lm, fit), fit.accuracy)
    assert fit.tokens.m is not None
    by_share = [i for i, f in enumerate(fits) if f["share"] == "m"]
    assert torch.equal(fit.tokens.m[by_share[0]], fit.tokens.m[by_share[1]])


def test_measurements_are_kept_and_shown(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = read(run.path)
    measure(results, "cpu", BezierSettings(lr=0.1, max_steps=20, check_every=10))
    again = read(run.path)
    groups = again.measured["paths"]["groups"]
    asked = [(g["share"], g.get("prefix", "auto")) for g in groups]
    assert asked == [("m", "auto"), (None, "auto"), (None, [5, 17])]
    assert all(g["pairs"] == 1 for g in groups)
    lm = prototok.load("tiny-neox", device="cpu", dtype="float32")
    for group in groups:
        own = again.experiments["figure6"].where(subject=Subject.of(group), share=group["share"])
        fits = own.fits()
        direct = prototok.interpolate(lm, fit_of(again, fits, lm), [(0, 1)], 101)
        assert group["straight"]["accuracy"][0] == pytest.approx(
            direct.accuracy[0].tolist(), abs=1e-4
        )
        assert group["straight"]["straight"][0] == pytest.approx(
            float(direct.straight[0]), abs=1e-3
        )
    both = again.measured["solutions"]["groups"]  # a setting of each subject
    assert [Subject.of(g).name for g in both] == ["tiny-neox", "tiny-neox, behind token 5, 17"]
    for solutions in both:
        unchanged = next(w for w in solutions["withstood"] if w["what"] == "unchanged")
        assert unchanged["exact"] == solutions["solutions"] == 2
    # Where the tokenizer is not at hand, the page has the texts of tokens that were kept.
    monkeypatch.setattr(gallery_module, "tokens_of", lambda model: None)
    (first, *_) = gallery(again)
    assert "⟨" not in "".join(t.target for t in first.tokens)
    assert "".join(t.target for t in first.tokens) == fits[0]["target_text"]
    html = build(again, tmp_path / "r.html", files=False).page.read_text(encoding="utf-8")
    assert 'id="table-figure6"' in html and 'id="table-solutions-robustness"' in html
