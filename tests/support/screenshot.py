"""Pictures of a page, as the README shows them: of 256 colours, which take a third of the bytes.

python tests/support/screenshot.py PAGE.html OUT.png [--dark] [--width 1120] [--height 900]
                           [--scroll CSS] [--token N] [--colour MEASURE]
"""

import argparse
from pathlib import Path

from PIL import Image
from qpipe.tests.support.browser import browser


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1120)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--scroll", help="element to bring to the top")
    parser.add_argument("--token", type=int, help="supervised token to point at, from 0")
    parser.add_argument("--colour", help="measure to colour by")
    given = parser.parse_args()
    with browser() as running:
        context = running.new_context(
            viewport={"width": given.width, "height": given.height},
            color_scheme="dark" if given.dark else "light",
        )
        page = context.new_page()
        page.on("console", lambda message: print("console:", message.text))
        page.on("pageerror", lambda error: print("error:", error))
        page.goto(given.page.resolve().as_uri())
        page.wait_for_selector("html[data-ready]")
        if given.colour:
            page.check(f"input[name=colour][value={given.colour}]", force=True)
        if given.scroll:
            page.evaluate("css => document.querySelector(css).scrollIntoView()", given.scroll)
        page.wait_for_timeout(500)
        if given.token is not None:
            page.locator(".tokens u").nth(given.token).hover()
            page.wait_for_timeout(200)
        page.screenshot(path=given.out)
    picture = Image.open(given.out).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=8, dither=Image.Dither.NONE).save(
        given.out, optimize=True
    )


if __name__ == "__main__":
    main()
