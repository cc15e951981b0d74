"""The page in a real browser: its policy holds, tables sort, the gallery shows what it is told."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from prototok.report.build import BROWSERS, build
from prototok.report.gallery import gallery
from prototok.report.results import Results, read
from report import made_up


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs a Chromium on the path (apt-get install chromium)")
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return read(made_up.make_run(tmp_path_factory.mktemp("made") / "run").path)


@pytest.fixture(scope="module")
def page(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(results, tmp_path_factory.mktemp("page") / "r.html", files=False).page


def look(browser: str, url: str, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--enable-logging=stderr", "--hide-scrollbars", *flags, url,
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def violations(log: str) -> list[str]:
    lines = [line for line in log.splitlines() if "CONSOLE" in line]
    return [line for line in lines if "Content Security Policy" in line or "Error" in line]


def column(dom: str, table: str, index: int) -> list[str]:
    body = re.search(rf'id="{table}".*?<tbody>(.*?)</tbody>', dom, re.DOTALL)
    assert body is not None
    rows = re.findall(r"<tr>(.*?)</tr>", body[1], re.DOTALL)
    return [re.sub(r"<[^>]*>", "", re.findall(r"<td.*?</td>", row)[index]) for row in rows]


def test_the_policy_is_never_broken(browser: str, page: Path, tmp_path: Path) -> None:
    seen = look(browser, page.as_uri(), tmp_path / "a", "--dump-dom")
    assert violations(seen.stderr) == []
    assert seen.stdout.count("<script") == 1 and "<img" not in seen.stdout
    # The check can fail: the same page with one handler and one script more.
    broken = tmp_path / "broken.html"
    text = page.read_text(encoding="utf-8")
    broken.write_text(text.replace("<main>", '<main><script>document.title="x"</script>'))
    seen = look(browser, broken.as_uri(), tmp_path / "b", "--dump-dom")
    assert violations(seen.stderr) and "<title>x</title>" not in seen.stdout


def test_tables_sort_by_number(browser: str, page: Path, tmp_path: Path) -> None:
    plain = look(browser, page.as_uri(), tmp_path / "a", "--dump-dom").stdout
    before = column(plain, "table-table3-paper-nats", 4)
    url = f"{page.as_uri()}#sort=table-table3-paper-nats,4,desc"
    dom = look(browser, url, tmp_path / "b", "--dump-dom").stdout
    after = column(dom, "table-table3-paper-nats", 4)
    assert after == sorted(before, key=lambda text: -float(text.partition("±")[0])) != before
    assert len(re.findall('<th [^>]*aria-sort="descending"', dom)) == 1


def test_the_gallery_shows_the_text_that_is_asked_for(
    browser: str, results: Results, page: Path, tmp_path: Path
) -> None:
    wanted = gallery(results)[3]
    dom = look(
        browser, f"{page.as_uri()}#text={wanted.anchor}", tmp_path / "a", "--dump-dom"
    ).stdout
    articles = re.findall(r"<article [^>]*>", dom)
    open_ones = [a for a in articles if "hidden" not in a]
    assert len(articles) > 3 and len(open_ones) == 1
    assert f'data-anchor="{wanted.anchor}"' in open_ones[0]


def test_light_dark_and_print(browser: str, results: Results, page: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    corners = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        shot = tmp_path / f"{name}.png"
        flags = ("--window-size=1400,900", f"--blink-settings=preferredColorScheme={scheme}")
        look(browser, page.as_uri(), tmp_path / name, f"--screenshot={shot}", *flags)
        with image.open(shot) as seen:
            grey = seen.convert("L")
            corners[name] = grey.getpixel((1395, 895))
            colours = sum(count > 0 for count in grey.histogram())
        assert colours > 50, name  # text and rules, not a blank sheet
    assert corners["dark"] < 60 < 200 < corners["light"]
    written = build(results, tmp_path / "p.html", browser=browser)
    paper = next(path for path in written.files if path.name == "report.pdf")
    assert paper.read_bytes().startswith(b"%PDF-") and paper.stat().st_size > 50_000


@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_is_wider_than_the_window(browser: str, page: Path, width: int) -> None:
    driver = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    with driver.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        shown = chromium.new_page(viewport={"width": width, "height": 900})
        shown.goto(page.as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        # Tables of numbers scroll; what is read as sentences does not.
        sentences = shown.locator(".wide").evaluate_all(
            "all => all.map(one => one.scrollWidth - one.clientWidth)"
        )
        chromium.close()
    assert len(sentences) == 2 and max(sentences) <= 0
