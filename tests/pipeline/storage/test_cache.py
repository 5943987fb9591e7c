"""Local copies of remote files: whole, under a limit, and fetched again where they are not."""

import errno
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.storage import cache
from qpipe.pipeline.storage.cache import kept_copies, local_copy, local_version, opened_copy
from qpipe.pipeline.storage.remote import open_path
from qpipe.tests.support.s3 import Bucket


def put(s3: Bucket, name: str, content: bytes) -> tuple[Path, str]:
    s3.put(name, content)
    return open_path(f"s3://bucket/{name}"), hashlib.sha256(content).hexdigest()


def age(path: Path, seconds: float) -> None:
    """Make as if a copy had been used so long ago."""
    os.utime(path, (time.time() - seconds, path.stat().st_mtime))


def test_a_copy_is_fetched_once(s3: Bucket) -> None:
    path, sha256 = put(s3, "a", b"content")
    copy = local_copy(path, sha256)
    assert copy.read_bytes() == b"content"
    s3.remove("a")
    assert local_copy(path, sha256) == copy


def test_a_local_file_is_its_own_copy(tmp_path: Path) -> None:
    assert local_copy(tmp_path / "a", "") == tmp_path / "a"
    assert local_version(tmp_path / "a") == tmp_path / "a"


def test_damage_of_the_store_is_an_error_and_not_kept(s3: Bucket, tmp_path: Path) -> None:
    path, sha256 = put(s3, "a", b"content")
    s3.put("a", b"kontent")
    with pytest.raises(UserError, match="s3://bucket/a: damaged, its hash is not the manifest's"):
        local_copy(path, sha256)
    assert [each for each in (tmp_path / "cache").rglob("*") if each.is_file()] == []


@pytest.mark.parametrize("known", [False, True], ids=["by another process", "by this one"])
def test_damage_of_the_copy_is_mended(s3: Bucket, known: bool) -> None:
    path, sha256 = put(s3, "a", b"content")
    copy = local_copy(path, sha256)
    if not known:
        cache._checked.clear()
    copy.write_bytes(b"kontent")
    assert local_copy(path, sha256).read_bytes() == b"content"


def test_a_copy_is_hashed_once_a_process(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sha256 = put(s3, "a", b"content")
    local_copy(path, sha256)
    monkeypatch.setattr(cache, "sha256_of_file", lambda path: pytest.fail("hashed again"))
    for _ in range(3):
        local_copy(path, sha256)


def test_the_longest_unused_goes_first(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPIPE_CACHE_GB", "3e-6")  # 3000 bytes
    copies = [local_copy(*put(s3, f"{each}", bytes([each]) * 1000)) for each in range(3)]
    for number, seconds in ((0, 300), (1, 500), (2, 400)):
        age(copies[number], seconds)
    local_copy(*put(s3, "0", bytes(1000)))  # used again
    age(copies[0], 300)
    local_copy(*put(s3, "3", bytes([3]) * 1500))
    assert [copy.exists() for copy in copies] == [True, False, False]


def test_the_cache_is_listed_again_before_it_can_be_full(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once at first, then after an eighth of what was free: 100 kB, 87.5 kB, 76.6 kB …"""
    monkeypatch.setenv("QPIPE_CACHE_GB", "8e-4")  # 800 kB
    monkeypatch.setattr(cache, "FRESH", 0.0)
    listed: list[int] = []
    glob = Path.glob

    def noting(folder: Path, pattern: str) -> Iterator[Path]:
        listed.append(sum(each.stat().st_size for each in folder.rglob("*") if each.is_file()))
        return glob(folder, pattern)

    monkeypatch.setattr(Path, "glob", noting)
    for number in range(40):
        copy = local_copy(*put(s3, f"{number}", bytes([number]) * 40_000))
        assert sum(each.stat().st_size for each in copy.parent.iterdir()) <= 800_000
    assert listed[:4] == [40_000, 160_000, 280_000, 360_000]
    assert len(listed) > 20  # each time, once it is full


def test_the_latest_stays_however_large(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPIPE_CACHE_GB", "0")
    first = local_copy(*put(s3, "a", b"a" * 1000))
    age(first, 60)
    second = local_copy(*put(s3, "b", b"b" * 1000))
    assert second.exists()
    assert not first.exists()


def test_what_was_given_out_just_now_stays(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may be about to open it."""
    monkeypatch.setenv("QPIPE_CACHE_GB", "0")
    first = local_copy(*put(s3, "a", b"a"))
    local_copy(*put(s3, "b", b"b"))
    assert first.exists()


def test_demonstrations_in_use_stay(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPIPE_CACHE_GB", "0")
    path, _ = put(s3, "chats.jsonl.gz", b"content")
    held = local_version(path)
    assert held.name.endswith(".jsonl.gz")
    assert held.read_bytes() == b"content"
    age(held, 1000)
    local_copy(*put(s3, "b", b"b"))
    assert held.exists()
    for descriptor in cache._held:
        os.close(descriptor)
    cache._held.clear()
    age(held, 1000)
    local_copy(*put(s3, "c", b"c"))
    assert not held.exists()


def test_another_version_is_another_copy(s3: Bucket) -> None:
    path, _ = put(s3, "chats.jsonl", b"one")
    first = local_version(path)
    assert local_version(path) == first
    put(s3, "chats.jsonl", b"two")
    assert local_version(path).read_bytes() == b"two"
    assert first.read_bytes() == b"one"


def test_what_a_killed_process_left_goes(s3: Bucket, tmp_path: Path) -> None:
    shards = tmp_path / "cache" / "shards"
    for name, seconds in ((".fetch-old", 2 * 86400), (".fetch-new", 60)):
        (shards / name).mkdir(parents=True)
        (shards / name / "half").write_bytes(b"h")
        os.utime(shards / name, (time.time() - seconds,) * 2)
    local_copy(*put(s3, "a", b"a"))
    assert [each.name for each in shards.glob(".fetch-*")] == [".fetch-new"]


@pytest.mark.parametrize("words", ["abc", "-1", "nan", "inf", ""])
def test_a_size_that_is_none(s3: Bucket, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("QPIPE_CACHE_GB", words)
    with pytest.raises(UserError, match=f"QPIPE_CACHE_GB={words}: give the size"):
        local_copy(*put(s3, "a", b"a"))


def test_a_cache_that_cannot_be_written(
    s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("QPIPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cache cannot be written.*give another folder in QPIPE_"):
        local_copy(*put(s3, "a", b"a"))


FETCH = """
import sys
from qpipe.pipeline.storage.cache import local_copy
from qpipe.pipeline.storage.remote import open_path
print(len(local_copy(open_path("s3://bucket/a"), sys.argv[1]).read_bytes()))
"""


def test_an_opened_copy_is_read_after_the_cache_has_let_it_go(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is removed before it is opened."""
    path, sha256 = put(s3, "a", b"content")
    with opened_copy(path, sha256) as opened:
        local_copy(path, sha256).unlink()
        assert opened.read_bytes() == b"content"
    removed = [True]

    def copy_and_remove(path: Path, sha256: str) -> Path:
        copy = local_copy(path, sha256)
        if removed:
            removed.pop()
            copy.unlink()
        return copy

    monkeypatch.setattr(cache, "local_copy", copy_and_remove)
    with opened_copy(path, sha256) as opened:
        assert opened.read_bytes() == b"content"
    assert not removed


@pytest.mark.slow
def test_processes_fetch_the_same_at_once(s3: Bucket, tmp_path: Path) -> None:
    _, sha256 = put(s3, "a", os.urandom(4_000_000))
    processes = [
        subprocess.Popen([sys.executable, "-c", FETCH, sha256], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [process.communicate()[0] for process in processes] == [b"4000000\n"] * 3
    assert [each.name for each in (tmp_path / "cache" / "shards").iterdir()] == [sha256]


def test_shards_that_are_alike_are_one_copy(s3: Bucket) -> None:
    """Those without rows."""
    one, other = (put(s3, name, b"no rows") for name in ("a", "b"))
    with kept_copies(open_path("s3://bucket")) as copy:
        assert copy(*one) == copy(*other)
        assert copy(*other).read_bytes() == b"no rows"


def test_all_of_a_folder_stays_while_it_is_needed(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """More than the cache holds, and for longer than a copy is left alone."""
    monkeypatch.setenv("QPIPE_CACHE_GB", "1e-6")
    monkeypatch.setattr(cache, "FRESH", 0.0)
    files = [put(s3, f"{each}", bytes([each]) * 1000) for each in range(3)]
    with kept_copies(open_path("s3://bucket")) as copy:
        kept = [copy(path, sha256) for path, sha256 in files]
        assert [each.read_bytes()[0] for each in kept] == [0, 1, 2]
        assert not local_copy(*files[0]).samefile(kept[0])  # the cache had let go of it
    assert not any(each.exists() for each in kept)

    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with kept_copies(open_path("s3://bucket")) as copy:
        assert copy(*files[1]).read_bytes() == bytes([1]) * 1000
    with kept_copies(tmp_path) as copy:
        assert copy(tmp_path / "a", "") == tmp_path / "a"
