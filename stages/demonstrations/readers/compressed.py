"""Reads gzip and zstd files in bounded memory and time.

Both consist of frames, which gzip calls members. A frame costs some 15 µs, however little it holds.
"""

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

CHUNK_BYTES = 1 << 20
MANY_FRAMES, LITTLE = 100_000, 64  # bytes a frame; a row has more
_USUAL_WINDOW, _ANY_WINDOW = 1 << 27, 1 << 31  # bytes; zstd itself asks for --long above the first
_LARGE_FILE = 1 << 24


def chunks_of(file: IO[bytes], compression: str, size: int) -> Iterator[bytes]:
    """The content of a file of `size` bytes, in chunks of at most CHUNK_BYTES.

    `compression` is ".gz", ".zst" or "". Raises ValueError for a file of many frames that hold next
    to nothing, and EOFError if the last one is cut.
    """
    match compression:
        case ".gz":  # 16 KiB are at most 16 MiB of content
            yield from _unpacked(file, 1 << 14, partial(zlib.decompressobj, wbits=31), b"\0")
        case ".zst":  # 1 KiB is at most 32 MiB of content
            yield from _unpacked(file, 1 << 10, _zstd_frames(size), b"")
        case _:
            yield from iter(partial(file.read, CHUNK_BYTES), b"")


def _zstd_frames(size: int) -> Callable[[], Any]:
    """Makes the decompressors of frames.

    Files large enough to profit from it may use windows as long as the format allows, which take
    that much memory.
    """
    from zstandard import ZstdDecompressor

    window = _ANY_WINDOW if size > _LARGE_FILE else _USUAL_WINDOW
    return ZstdDecompressor(max_window_size=window).decompressobj


def _unpacked(
    file: IO[bytes], at_once: int, new_frame: Callable[[], Any], padding: bytes
) -> Iterator[bytes]:
    """The content of all frames, which `padding` may separate; `at_once` bytes are unpacked."""
    frame, frames, total = None, 0, 0
    while chunk := file.read(at_once):
        while chunk := chunk if frame else chunk.lstrip(padding):
            frame = frame or new_frame()
            content = frame.decompress(chunk)
            for start in range(0, len(content), CHUNK_BYTES):
                yield content[start : start + CHUNK_BYTES]
            chunk = frame.unused_data if frame.eof else b""
            total += len(content)
            if frame.eof:
                frame, frames = None, frames + 1
                _refuse_tiny(frames, total)
    if frame is not None:
        raise EOFError("the compressed file ends too early")


def _refuse_tiny(frames: int, total: int) -> None:
    if frames > MANY_FRAMES and total < frames * LITTLE:
        raise ValueError(
            f"more than {MANY_FRAMES:,} compressed frames with fewer than {LITTLE} bytes each: "
            "compress it again as a whole"
        )
