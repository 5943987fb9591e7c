"""A headless browser for the tests of the pages.

    python tests/support/browser.py .cache/chromium

puts Chromium, its libraries and a font into a folder, from the npm package @sparticuz/chromium
(the browser stands in the package itself, nothing else is downloaded). Needs npm and node.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = "@sparticuz/chromium@153.0.0"
SHA512 = "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
FOLDER = Path(__file__).parents[2] / ".cache" / "chromium"
_INFLATE = """
const [from, to] = process.argv.slice(1);
const fs = require("fs");
fs.writeFileSync(to, require("zlib").brotliDecompressSync(fs.readFileSync(from)));
"""
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
<dir>{folder}</dir><dir>/usr/share/fonts</dir><cachedir>{folder}/cache</cachedir>
<alias binding="same"><family>system-ui</family><prefer><family>Open Sans</family></prefer></alias>
<alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
"""


def fetch(folder: Path) -> None:
    """Put the browser into a folder, whole or not at all."""
    under_work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(under_work, ignore_errors=True)
    under_work.mkdir(parents=True)
    listing = subprocess.run(
        ["npm", "pack", PACKAGE, "--json", "--pack-destination", under_work],
        check=True,
        stdout=subprocess.PIPE,
    )
    archive = under_work / json.loads(listing.stdout)[0]["filename"]
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    assert found == SHA512, f"{PACKAGE} is not the package that was pinned"
    with tarfile.open(archive) as package:
        package.extractall(under_work, filter="data")
    for name in ("chromium", "al2023.tar", "fonts.tar"):
        source = under_work / "package" / "bin" / f"{name}.br"
        subprocess.run(["node", "-e", _INFLATE, source, under_work / name], check=True)
    for name in ("al2023.tar", "fonts.tar"):
        with tarfile.open(under_work / name) as inner:
            inner.extractall(under_work, filter="data")
        (under_work / name).unlink()
    (under_work / "chromium").chmod(0o755)
    (under_work / "fonts.conf").write_text(_FONTS.format(folder=folder.resolve() / "fonts"))
    shutil.rmtree(under_work / "package")
    archive.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    under_work.rename(folder)


def missing() -> str | None:
    """Why there is no browser here, None where there is one."""
    if not (FOLDER / "chromium").exists():
        return "no browser: run `python tests/support/browser.py .cache/chromium`, which needs npm"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    return None


@contextmanager
def browser() -> Iterator[Any]:
    """A running browser, as Playwright has it."""
    from playwright.sync_api import sync_playwright

    libraries = f"{FOLDER / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    environment = os.environ | {
        "LD_LIBRARY_PATH": libraries,
        "FONTCONFIG_FILE": str(FOLDER / "fonts.conf"),
    }
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=FOLDER / "chromium",
            env=environment,
            # no sandbox: containers have none to give, and the pages are our own
            args=[
                "--no-sandbox",
                "--headless=shell",
                "--disable-gpu",
            ],
        )
        try:
            yield running
        finally:
            running.close()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not (target / "chromium").exists():
        fetch(target)
