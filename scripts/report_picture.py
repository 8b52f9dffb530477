"""Draw docs/report.png and docs/report-dark.png: the top of a real run's report in a browser, by day and by night.

python scripts/report_picture.py runs/comments docs/report.png [--width 1200] [--whole] [--browser /usr/bin/chromium]
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

MOST_BYTES = 200_000
"""Of a picture that a README shows."""
HEIGHT = 1330
SCALE = 1.5
"""Pixels of a picture for each of the page, so that letters are sharp on dense screens."""
COLOURS = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--whole", action="store_true", help="the whole page, to look at")
    parser.add_argument("--browser", help="where Playwright brought none: the program")
    given = parser.parse_args()
    page = (given.run / "report.html").resolve().as_uri()
    too_large = False
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=given.browser, args=["--no-sandbox"])
        for scheme, mark in (("light", ""), ("dark", "-dark")):
            path = given.target.with_stem(given.target.stem + mark)
            size = {"width": given.width, "height": HEIGHT}
            tab = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=SCALE)
            tab.goto(page)
            picture = Image.open(io.BytesIO(tab.screenshot(full_page=given.whole)))
            # Few colours in a palette of their own: the page has hardly more, and a quarter of the bytes.
            picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
            num_bytes = path.stat().st_size
            print(f"{path}: {picture.width} × {picture.height}, {num_bytes:,} bytes")
            too_large |= num_bytes > MOST_BYTES and not given.whole
    return int(too_large)


if __name__ == "__main__":
    sys.exit(main())
