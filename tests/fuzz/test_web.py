"""Demonstrations behind a web address, whose server changes them, breaks off or lies.

Read are the rows of one version: the present one, unless its server says that it is one of before.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st
from qpipe.stages.demonstrations.sources import open_sources

from .inputs import Draw, fuzz, made_or_refused

Rows = list[bytes]


@dataclass(frozen=True)
class Version:
    """A state of the file, and how it is answered."""

    rows: int
    number: int = 0
    etag: str = ""
    modified: str = ""
    status: int = 200
    missing: int = 0  # bytes that are announced and not sent
    length: int | None = None  # announced in place of the right one
    encoding: str = ""

    @property
    def content(self) -> bytes:
        return b"".join(b'{"prompt": "%d-%d"}\n' % (self.number, row) for row in range(self.rows))

    @property
    def values(self) -> Rows:
        """The lines that arrive; the file may be announced as shorter than it is."""
        return self.content[: self.length].splitlines()

    @property
    def is_honest(self) -> bool:
        return (self.status, self.missing, self.length, self.encoding) == (200, 0, None, "")

    @property
    def validator(self) -> tuple[Any, ...] | None:
        """By which a cache knows it again."""
        is_known = self.etag or self.modified
        return (self.etag, self.modified, len(self.content)) if is_known else None


class Handler(BaseHTTPRequestHandler):
    present = Version(1)

    def do_HEAD(self) -> None:
        now = Handler.present
        self.send_response(now.status)
        length = len(now.content) if now.length is None else now.length
        for name, value in (
            ("Content-Length", str(length)),
            ("ETag", now.etag),
            ("Last-Modified", now.modified),
            ("Content-Encoding", now.encoding),
            ("Location", "http://127.0.0.1:9/x" if now.status == 302 else ""),
        ):
            if value:
                self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(
            Handler.present.content[: len(Handler.present.content) - Handler.present.missing]
        )
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@cache
def address() -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/x.jsonl"


@contextmanager
def empty_cache() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, patch.dict("os.environ", QPIPE_CACHE=folder):
        yield


def read() -> Rows | None:
    """The rows, read as often as a command does; None if they are refused."""

    def rows() -> Rows:
        (source,) = open_sources([address()])
        facts = source.facts
        found = [raw.rstrip() for _, raw in source.rows()]
        assert facts.rows == len(found)
        return found

    return made_or_refused(rows)


@st.composite
def histories(draw: Draw) -> list[Version]:
    version = st.builds(
        Version,
        rows=st.integers(1, 4),
        etag=st.sampled_from(["", '"a"', '"b"', 'W/"a"']),
        modified=st.sampled_from(["", "Fri, 27 Nov 2026 10:00:00 GMT"]),
        status=st.sampled_from([200] * 6 + [404, 403, 500, 302, 206]),
        missing=st.sampled_from([0] * 6 + [1, 9]),
        length=st.sampled_from([None] * 6 + [0, 5, 9**9]),
        encoding=st.sampled_from([""] * 6 + ["gzip", "identity", "unheard"]),
    )
    drawn = draw(st.lists(version, min_size=1, max_size=4))
    return [Version(**(vars(each) | {"number": number})) for number, each in enumerate(drawn)]


@fuzz(25, history=histories())
def test_files_that_change(history: list[Version]) -> None:
    kept: dict[tuple[Any, ...], Rows] = {}  # by what they are known again
    with empty_cache():
        for version in history:
            Handler.present = version
            found = read()
            before = kept.get(version.validator) if version.validator else None
            if version.is_honest:
                assert found == (before or version.values)
            else:
                assert found in (None, before, version.values)
            if found is not None and version.validator:
                kept[version.validator] = found
