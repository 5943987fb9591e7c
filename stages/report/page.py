"""Assembles a page: one HTML file with its style, scripts and data.

Data is embedded as base64, so it cannot close an element. The Content-Security-Policy of the page
forbids loading anything and allows its own scripts only, by their hashes.
"""

import base64
import hashlib
import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from ...pipeline.storage.files import write_bytes

_BLOB = '<script type="application/octet-stream" id="{name}">{content}</script>\n'


def page_html(title: str, scripts: Sequence[str], blobs: dict[str, str]) -> str:
    """The HTML of a page; `scripts` are files in this folder, `blobs` base64 text by element id."""
    style = asset("page.css")
    script = "\n".join(asset(name) for name in ("page.js", *scripts))
    filled = {
        "title": html.escape(title),
        "policy": (
            f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
        "style": style,
        "script": script,
        "blobs": "".join(
            _BLOB.format(name=name, content=content) for name, content in blobs.items()
        ),
    }
    parts = asset("page.html").split("@@")  # text and names alternate
    return "".join(filled[part] if place % 2 else part for place, part in enumerate(parts))


def write_page(path: Path, text: str) -> int:
    """Write the page atomically and return its size in bytes."""
    content = text.encode()
    write_bytes(path, content)
    return len(content)


def asset(name: str) -> str:
    """The text of a file in this folder."""
    return (files(__name__.rpartition(".")[0]) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
