"""Files and web servers made to do harm: bombs, long lines, changed content, secrets in names."""

import gzip
import json
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import zstandard
from qpipe.pipeline.errors import UserError, redacted
from qpipe.pipeline.format.records import Reject
from qpipe.pipeline.storage.remote import fetch
from qpipe.stages.demonstrations.formats import parse_row
from qpipe.stages.demonstrations.readers import compressed, text
from qpipe.stages.demonstrations.sources import RowReader, open_sources

ROW = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
LINE = json.dumps(ROW).encode() + b"\n"

READ = """
import resource, sys, time
from pathlib import Path
from qpipe.stages.demonstrations.sources import open_sources

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024

before = peak()
(source,) = open_sources(sys.argv[1:])
rows = sum(1 for _ in source.rows())
print(rows, peak() - before)
"""


def read_in_a_child(path: Path) -> tuple[int, int]:
    """The number of rows, and the megabytes of memory that reading them took."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-1000:]
    rows, megabytes = map(int, done.stdout.split())
    return rows, megabytes


@pytest.mark.parametrize("kind", ["x.jsonl.zst", "x.jsonl.gz"])
def test_a_bomb_of_valid_rows_is_read_in_little_memory(tmp_path: Path, kind: str) -> None:
    rows = 2_000_000
    content = LINE * rows
    pack = zstandard.compress if kind.endswith("zst") else gzip.compress
    (tmp_path / kind).write_bytes(pack(content))
    assert (tmp_path / kind).stat().st_size < len(content) // 200
    assert read_in_a_child(tmp_path / kind) == (rows, pytest.approx(30, abs=70))


@pytest.mark.parametrize("kind", ["x.jsonl", "x.jsonl.zst", "x.jsonl.gz"])
def test_a_long_line_is_rejected_with_a_reason(tmp_path: Path, kind: str) -> None:
    pack: Callable[[bytes], bytes] = {
        "x.jsonl": bytes,
        "x.jsonl.zst": zstandard.compress,
        "x.jsonl.gz": gzip.compress,
    }[kind]
    (tmp_path / kind).write_bytes(pack(LINE + b'{"a": "' + b"x" * (1 << 26) + b'"}\n' + LINE))
    (source,) = open_sources([str(tmp_path / kind)])
    parsed = [parse_row(source, line, raw, "auto") for line, raw in source.rows()]
    assert [isinstance(each, Reject) for each in parsed] == [False, True, False]
    assert isinstance(parsed[1], Reject)
    assert parsed[1].reason == "longer than 33,554,432 bytes, the most of one row"
    assert [line for line, _ in source.rows()] == [1, 2, 3]
    assert source.facts.rows == 3


def test_lines_are_the_same_however_the_chunks_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\n\n' + b"".join(b'{"n": %d}\n' % n for n in range(99)) + b"{}"
    expected = None
    for size in (1 << 20, 7, 64):
        monkeypatch.setattr(compressed, "CHUNK_BYTES", size)
        for name, pack in (("x", bytes), ("x.gz", gzip.compress), ("x.zst", zstandard.compress)):
            path = tmp_path / name.replace("x", "x.jsonl")
            path.write_bytes(pack(content))
            (source,) = open_sources([str(path)])
            found = list(source.rows()), source.facts
            expected = expected or found
            assert found == expected
    assert expected is not None
    assert len(expected[0]) == 101


def test_a_json_array_on_one_line_has_no_longest_line(tmp_path: Path) -> None:
    rows = [ROW | {"id": "x" * 1000}] * 40_000
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert (tmp_path / "x.json").stat().st_size > 1 << 25
    (source,) = open_sources([str(tmp_path / "x.json")])
    assert source.facts.rows == len(rows)


def test_a_json_array_is_read_value_by_value(tmp_path: Path) -> None:
    """Small values take thirty times their text."""
    content = b"[" + b'{"a":[]},' * 400_000 + b"{}]"
    (tmp_path / "x.json.zst").write_bytes(zstandard.compress(content))
    assert read_in_a_child(tmp_path / "x.json.zst") == (400_001, pytest.approx(30, abs=70))


def test_a_value_of_an_array_that_is_too_long_ends_the_reading(tmp_path: Path) -> None:
    content = b'[{}, {"a": "' + b"x" * (1 << 26) + b'"}]'
    (tmp_path / "x.json.zst").write_bytes(zstandard.compress(content))
    (source,) = open_sources([str(tmp_path / "x.json.zst")])
    with pytest.raises(UserError, match="value 2 of the array: longer than 33,554,432 characters"):
        list(source.rows())


def test_a_row_of_a_table_may_not_have_any_number_of_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "LONGEST_LINE", 999)
    table = b"prompt,completion\n" + b"a,b\n" * 999 + b'a,"' + b"%s\n" + b'"\n'
    for size, is_refused in ((900, False), (999, True)):
        (tmp_path / "x.csv").write_bytes(table % (b"\n" * size))
        (source,) = open_sources([str(tmp_path / "x.csv")])
        with pytest.raises(UserError, match="longer than 999") if is_refused else nullcontext():
            assert len(list(source.rows())) == 1000


def test_the_rows_of_a_shard_are_not_all_held(tmp_path: Path) -> None:
    """Rows of 32 MiB, of which a small file may hold hundreds."""
    line = LINE[:-1] + b" " * (1 << 24) + b"\n"
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(line * 12))
    (source,) = open_sources([str(tmp_path / "x.jsonl.zst")])
    tracemalloc.start()
    assert sum(1 for _ in RowReader([source]).read(0, 12)) == 12
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * (1 << 24)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_many_frames_that_hold_nothing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    """A frame takes time however little it holds; those of a row each are read."""
    monkeypatch.setattr(compressed, "MANY_FRAMES", 500)
    path = tmp_path / ("x.jsonl.gz" if pack is gzip.compress else "x.jsonl.zst")
    path.write_bytes(pack(LINE) + pack(b"") * 499 + pack(LINE))
    with pytest.raises(UserError, match="than 500 compressed frames with fewer than 64 bytes each"):
        _ = open_sources([str(path)])[0].facts
    path.write_bytes(pack(LINE) * 501)
    assert open_sources([str(path)])[0].facts.rows == 501


def test_zeros_may_follow_the_members_of_a_gzip_file(tmp_path: Path) -> None:
    """As the gzip program reads them; anything else that follows is damage."""
    member, path = gzip.compress(LINE), tmp_path / "x.jsonl.gz"
    for padding in (b"\0" * 9, b"\0" * (1 << 15)):
        path.write_bytes(member + padding + member + padding)
        assert open_sources([str(path)])[0].facts.rows == 2
    for damage in (member + b"more", member + member[:-1], member[:-8] + bytes(8)):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="cannot be read"):
            _ = open_sources([str(path)])[0].facts


def test_a_long_window_is_for_large_files(tmp_path: Path) -> None:
    """The window is memory that a small file makes the reader take."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=29)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "x.jsonl.zst").write_bytes(packer.compress(LINE * 9) + packer.flush())
    with pytest.raises(UserError, match="too much memory"):
        open_sources([str(tmp_path / "x.jsonl.zst")])


# Behind web addresses


@dataclass
class Web:
    """A web server with one file."""

    content: bytes
    headers: dict[str, str] = field(default_factory=dict)
    url: str = ""
    cut: int = 0  # bytes at the end that are announced and not sent


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("QPIPE_CACHE", str(tmp_path / "cache"))
    served = Web(LINE * 3)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404 if "missing" in self.path else 200)
            self.send_header("Content-Length", str(len(served.content)))
            for name, value in served.headers.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(served.content[: len(served.content) - served.cut])
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        served.url = f"http://127.0.0.1:{server.server_port}/x.jsonl"
        yield served
        server.shutdown()


def rows(url: str) -> int | None:
    return open_sources([url])[0].facts.rows


@pytest.mark.parametrize("kept", ["ETag", "Last-Modified", None])
def test_a_file_that_changed_is_read_anew(
    web: Web, kept: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the size is the same, and always where the server tells no version."""
    for version, count in (("1", 3), ("2", 3), ("3", 5)):
        web.content = LINE.replace(b"4", version.encode()) * count
        web.headers = {} if kept is None else {kept: f'"{version}"'}
        (source,) = open_sources([web.url])
        assert source.facts.rows == count
        assert all(json.loads(raw)["messages"][1]["content"] == version for _, raw in source.rows())
    fetched: list[Path] = []

    def count_and_fetch(path: Path, local: Path) -> None:
        fetched.append(local)
        fetch(path, local)

    monkeypatch.setattr("qpipe.pipeline.storage.cache.fetch", count_and_fetch)
    assert rows(web.url) == 5
    assert bool(fetched) == (kept is None)


def test_a_cached_copy_that_was_changed_is_fetched_again(web: Web, tmp_path: Path) -> None:
    web.headers = {"ETag": '"1"'}
    assert rows(web.url) == 3
    (copy,) = (tmp_path / "cache" / "files").iterdir()
    copy.write_bytes(LINE * 4)
    assert rows(web.url) == 3


def test_secrets_in_an_address_stay_out_of_names_and_messages(web: Web) -> None:
    signed = web.url.replace("http://", "http://me:PASS@") + "?X-Signature=SECRET&x=1"
    (source,) = open_sources([signed])
    assert source.name == "x.jsonl"
    reject = parse_row(source, 1, b"{}", "auto")
    assert isinstance(reject, Reject)
    assert reject.source == "x.jsonl"
    for url in (
        signed.replace("x.jsonl", "missing.jsonl"),
        signed.replace("x.jsonl", "x.exe"),
        signed.replace(":" + signed.split(":")[3].split("/")[0], ":1"),
    ):
        with pytest.raises(UserError) as raised:
            open_sources([url])
        assert "SECRET" not in str(raised.value)
        assert "PASS" not in str(raised.value)


def test_what_is_left_out_of_a_message() -> None:
    assert redacted("s3://a/b?c: x@y") == "s3://a/b?c: x@y"
    assert redacted("'https://u:p@h/x?sig=1', http://h/y?z") == "'https://…@h/x?…', http://h/y?…"
    assert (
        redacted("say what? https://h/x: is it me@home?") == "say what? https://h/x: is it me@home?"
    )


@pytest.mark.parametrize("missing", [1, 100])
def test_half_an_answer_of_a_web_server_is_not_the_file(web: Web, missing: int) -> None:
    web.headers, web.cut = {"ETag": '"1"'}, missing
    with pytest.raises(UserError, match=r"cannot be (read|used)"):
        rows(web.url)
    web.cut = 0
    assert rows(web.url) == 3
