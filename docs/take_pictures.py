"""Take the pictures of the demo and of the report in docs/pictures/, in a headless Chromium.

    pip install '.[demo]' playwright pillow && apt-get install chromium
    python docs/take_pictures.py

Both at 1400 and 420 pixels, light and dark. Nothing is measured: the demo fits one text, the report
is the one in benchmarks/results/.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

import prototok
from prototok.demo.page import serve
from prototok.report.build import BROWSERS

HERE = Path(__file__).resolve().parent
REPORT = HERE.parent / "benchmarks" / "results" / "paper-small.html"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
MINUTE = 60_000


def show_demo(page: Page, url: str) -> None:
    """Fit a text, decode it, and walk a part of the way."""
    page.goto(url)
    page.click("#fit")
    page.wait_for_selector("#says .good", timeout=5 * MINUTE)
    page.click("#decode")
    page.wait_for_selector("#came pre", timeout=MINUTE)
    page.fill("#t input[type=number]", "0.3")
    page.keyboard.press("Enter")
    page.wait_for_selector("#path :text('t = 0.30')", timeout=MINUTE)
    page.mouse.move(0, 0)


def keep(page: Page, name: str, whole: bool) -> None:
    """Write docs/pictures/NAME.png, in few colours: text and flat areas need no more."""
    shot = Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB")
    path = HERE / "pictures" / f"{name}.png"
    shot.quantize(256).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Take all pictures."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    blocks = serve(prototok.load("tiny-neox", device="cpu"), None, False)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        for width, height in ((1400, 1000), (420, 1400)):
            for scheme in ("light", "dark"):
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )
                show_demo(page, blocks.local_url)
                keep(page, f"demo-{width}-{scheme}", whole=True)
                page.goto(f"{REPORT.as_uri()}#e6")
                keep(page, f"report-{width}-{scheme}", whole=False)
                page.close()
        browser.close()
    blocks.close()


if __name__ == "__main__":
    main()
