"""What the page does and shows, without a browser and without Gradio."""

from __future__ import annotations

import importlib.util
import re
import threading

import pytest
import torch

import prototok
from prototok import FrozenLM
from prototok.cli import main
from prototok.demo import draw, play
from prototok.demo.play import Film, Walk
from prototok.geometry.paths import BezierSettings

TEXT = "Call <b>me</b> & Ishmael."


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return prototok.load("tiny-neox", device="cpu")


@pytest.fixture(scope="module")
def film(lm: FrozenLM) -> Film:
    seen = play.film_of(lm, "Call me Ishmael.")
    grown = [sum(map(len, one.looks)) for one in play.watch(seen)]
    assert grown == sorted(grown) and len(grown) > 1  # it is shown before it has ended
    return seen


@pytest.fixture(scope="module")
def way(film: Film) -> Walk:
    return play.walk(film)


def test_a_film_has_every_change_up_to_the_result(film: Film) -> None:
    assert film.fit is not None
    for s, looks in enumerate(film.looks):
        steps = [look.step for look in looks]
        right = [int(look.right.sum()) for look in looks]
        assert steps[0] == 0 and steps == sorted(set(steps))
        assert right == sorted(right)  # the best so far, never worse
        assert torch.equal(looks[-1].ids, film.targets) == bool(film.fit.exact[0, s])
        assert film.look_at(s, steps[1]).step == steps[1]
        assert film.look_at(s, steps[1] - 1).step == steps[0]
    assert bool(film.fit.exact.all())
    assert play.decoded(film) == ["Call me Ishmael."] * 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (" \n", "^Type a text first"),
        ("word " * 200, "tokens. Take one of at most 64: .*tiny-neox is small"),
        ("half \ud800", "cannot be fitted"),
    ],
)
def test_a_bad_text_gets_a_sentence(text: str, says: str, lm: FrozenLM) -> None:
    with pytest.raises(ValueError, match=says):
        play.film_of(lm, text)


def test_a_fit_ends_when_nobody_watches(lm: FrozenLM) -> None:
    film = play.film_of(lm, "It was the best of times, it was the worst of times, it was the age")
    before = set(threading.enumerate())
    watching = play.watch(film, pace=600.0)
    next(watching)
    (worker,) = set(threading.enumerate()) - before
    watching.close()
    assert not worker.is_alive() and film.fit is None


def test_what_fails_in_the_fit_is_raised_where_it_is_watched(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(play, "fast_fit", fail)
    with pytest.raises(MemoryError, match="none left"):
        list(play.watch(play.film_of(lm, "Call me")))


def test_a_walk_goes_from_one_solution_to_the_other(film: Film, way: Walk) -> None:
    for t, s in ((0.0, 0), (1.0, 1)):
        assert torch.equal(way.at(t, False).margin, film.looks[s][-1].margin)
    along = way.accuracy()["straight"]
    assert len(along) == play.POINTS and along[0] == along[-1] == 1.0
    # Decoded alone or in a batch, the same up to a token that rounding flips.
    middle = float(way.at(0.5, False).right.float().mean())
    assert abs(middle - along[play.POINTS // 2]) <= 1.01 / len(film.targets)
    assert way.at(0.5, True).ids.tolist() == way.at(0.5, False).ids.tolist()  # no curve yet


def test_a_curve_is_no_worse_than_the_segment(way: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play, "_CURVE", BezierSettings(max_steps=10, check_every=5, samples=4))
    bent = play.bend(way)
    straight, curve = bent.accuracy()["straight"], bent.accuracy()["curve"]
    assert sum(curve) >= sum(straight)
    assert torch.equal(bent.at(0.0, True).ids, way.at(0.0, False).ids)
    assert not torch.equal(bent.at(0.5, True).margin, bent.at(0.5, False).margin)
    assert draw.path(bent, 0.5, True).count("<polyline") == 2


def test_what_is_drawn_is_what_was_seen(film: Film, way: Walk) -> None:
    first = film.looks[0][0]
    drawn = draw.tokens(film, first)
    assert len(re.findall('<span class="t ', drawn)) == len(film.targets)
    assert drawn.count("wrong") == int((~first.right).sum()) > 0
    story = draw.story(film)
    widths = sum(map(int, re.findall(r'<rect [^>]*width="(\d+)"', story)))
    assert widths == 18 * len(film.targets) * sum(map(len, film.looks))
    assert "update 0 ·" in draw.solutions(film, 0)
    assert draw.margins(film).count("<polyline") == 3  # two solutions, and zero
    assert "t = 0.25 ·" in draw.path(way, 0.25, False)
    says, kind = draw.outcome(film)
    assert kind == "good" and "2 of 2" in says


def test_nothing_of_a_text_is_markup(lm: FrozenLM) -> None:
    film = play.film_of(lm, TEXT)
    next(watching := play.watch(film))
    watching.close()
    shown = draw.solutions(film, 0) + draw.sentence(TEXT)
    assert "<b>me" not in shown.replace("<small><b>", "") and "&lt;" in shown


def test_without_gradio_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gradio" else found(name)
    )
    with pytest.raises(SystemExit) as ended:
        main(["demo"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().endswith("pip install 'prototok[demo]'")
