"""The page in a real browser: it fits, plays back, decodes, walks, and asks nobody but its server.

pip install '.[demo]' playwright && apt-get install chromium
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

import prototok
from prototok.report.build import BROWSERS

gradio = pytest.importorskip("gradio", reason="needs gradio (pip install 'prototok[demo]')")
playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")

SECONDS = 60_000  # milliseconds to wait at most; nothing here is timed
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    from prototok.demo.page import serve

    blocks = serve(prototok.load("tiny-neox", device="cpu"), None, False)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs a Chromium on the path (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1000, "height": 900})
    opened.set_default_timeout(SECONDS)
    opened.asked, opened.said = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.goto(url)
    opened.wait_for_selector("#fit")
    yield opened
    opened.close()


def fit(page: Any, text: str) -> str:
    """Fit a text, and return what is said of it in the end."""
    page.fill("#text textarea", text)
    page.click("#fit")
    page.wait_for_selector("#says :text-matches('Ended|Neither')")
    return str(page.inner_text("#says"))


def test_a_text_is_fitted_played_back_decoded_and_walked(page: Any, url: str) -> None:
    text = "Call me Ishmael."
    assert "2 of 2 give the whole text back" in fit(page, text)
    tiles = "".join(page.locator("#now .tokens").first.locator(".t").all_text_contents())
    assert tiles == text
    assert page.locator("#story svg").count() == 2

    page.focus("#step input[type=range]")
    page.keyboard.press("Home")
    page.wait_for_selector("#now :text('update 0 ·')")
    assert page.locator("#now .wrong").count() > 0

    page.click("#decode")
    page.wait_for_selector("#came pre")
    assert page.locator("#came pre").all_inner_texts() == [text] * 2

    assert "t = 0.00" in page.inner_text("#path")
    assert page.locator("#path .wrong").count() == 0
    slider = page.locator("#t input[type=range]")
    slider.scroll_into_view_if_needed()
    handle = slider.bounding_box()
    page.mouse.move(handle["x"] + 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + 4, steps=8)
    page.mouse.up()
    page.wait_for_selector("#path :text-matches('t = 0[.](4[5-9]|5[0-5])')")
    page.click("#way >> text=Bezier curve")
    page.wait_for_selector("#path :text('Bezier curve')")
    assert page.locator("#path polyline").count() == 2

    others = [one for one in page.asked if not one.startswith((url, "data:", "blob:"))]
    assert page.asked and others == []
    assert not [line for line in page.said if "Content Security Policy" in line]
    page.evaluate("fetch('http://localhost:9/elsewhere').catch(() => 0)")
    assert [line for line in page.said if "Content Security Policy" in line]


def test_bad_input_gets_a_sentence_and_spoils_nothing(page: Any) -> None:
    page.fill("#text textarea", "  ")
    page.click("#fit")
    page.wait_for_selector("#says .bad")
    assert page.inner_text("#says").strip() == "Type a text first."
    page.fill("#text textarea", "word " * 200)
    page.click("#fit")
    page.wait_for_selector("#says :text-matches('at most 64')")
    assert "2 of 2" in fit(page, "Call me")


def test_a_fit_can_be_stopped_and_another_begun(page: Any) -> None:
    page.fill(
        "#text textarea", "It was the age of wisdom, it was the age of foolishness, it was so"
    )
    page.click("#fit")
    page.wait_for_selector("#says :text-matches('Update [0-9]+')")
    page.click("#stop")
    page.wait_for_selector("#says :text('Stopped.')")
    assert "2 of 2" in fit(page, "Call me")


@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_is_cut_off(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    fit(page, "To be, or not to be: that is the question.")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".prototok").count() > 4
    right = page.evaluate(
        "Math.max(...[...document.querySelectorAll('.prototok svg, .prototok .t')]"
        ".map(one => one.getBoundingClientRect().right))"
    )
    assert 0 < right <= width
