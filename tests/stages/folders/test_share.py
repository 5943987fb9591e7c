"""`qpipe share`: copied whole, checked there, with a card; and what it refuses."""

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec.structs import replace
from qpipe.pipeline import decoder
from qpipe.pipeline.folders.manifest import Manifest, read_manifest
from qpipe.pipeline.storage.remote import open_path
from qpipe.stages.folders import share as sharing
from qpipe.stages.folders.card import card, plain
from qpipe.stages.folders.lineage import generations
from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.examples import scored, targeted
from qpipe.tests.support.folders import folder_of
from qpipe.tests.support.s3 import Bucket
from qpipe.tests.support.tiers import slow


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def scores(folder: Path, chance: float = 0.5) -> Path:
    rows = [scored(f"chat:{n}", [1, 2, n], [{n: chance, 9: 0.25}]) for n in range(3, 9)]
    return folder_of(folder, rows, shards=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scores(tmp_path_factory.mktemp("made") / "scores")


@pytest.fixture(params=["local", "s3"])
def source(request: pytest.FixtureRequest, s3: Bucket, made: Path) -> str:
    if request.param == "local":
        return str(made)
    for name, content in contents(made).items():
        s3.put(f"source/{name}", content)
    return "s3://bucket/source"


@pytest.mark.parametrize("target", ["{}/copy", "s3://bucket/copy", "file://{}/copy"])
def test_a_copy_has_the_same_bytes_and_a_card(
    source: str, made: Path, target: str, tmp_path: Path
) -> None:
    url = target.format(tmp_path)
    assert "3 shard(s) copied: 6 demonstrations" in qpipe("share", source, url)
    copy = contents(open_path(url))
    assert "license: other" in copy.pop("README.md").decode()
    assert copy == contents(made)
    assert "all well" in qpipe("verify", url)
    assert "was there already" in qpipe("share", source, url)


KILLED = """
import os, sys
from qpipe.stages.folders import share
from qpipe.stages.cli import main
when, left = sys.argv.pop(1), int(sys.argv.pop(1))
def dies(name):
    inner = getattr(share, name)
    def call(*given):
        global left
        left -= 1
        if left == 0 and when == "before":
            os._exit(9)
        result = inner(*given)
        if left == 0:
            os._exit(9)
        return result
    setattr(share, name, call)
dies(sys.argv.pop(1))
main()
"""


@pytest.mark.parametrize(
    ("root", "when", "number", "function", "copied"),
    [
        ("{}", "after", 2, "copy_shard", 1),
        *slow(
            # it is there, nobody has looked at it
            ("s3://bucket", "before", 2, "sha256_there", 2),
            ("s3://bucket", "after", 2, "copy_shard", 1),
            ("s3://bucket", "before", 4, "write_bytes", 0),  # all but the manifest
            ("s3://bucket", "before", 1, "tidy", 0),
        ),
    ],
)
def test_a_killed_copy_goes_on(
    s3: Bucket, made: Path, tmp_path: Path, root: str, when: str, number: int, function: str,
    copied: int,
) -> None:  # fmt: skip
    url = f"{root.format(tmp_path)}/copy"
    words = [sys.executable, "-c", KILLED, when, str(number), function, "share", str(made), url]
    assert subprocess.run(words, env=os.environ, check=False).returncode == 9
    said = qpipe("share", made, url)
    assert (f"{copied} shard(s) copied" if function != "tidy" else "was there already") in said
    copy = contents(open_path(url))
    del copy["README.md"]
    assert copy == contents(made)


def test_what_arrives_damaged_is_noticed(
    s3: Bucket, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    put_file = S3FileSystem.put_file

    def damaging(self: Any, local: str, place: str, **more: Any) -> None:
        if place.endswith("shard-00001.arrow"):
            Path(local).write_bytes(Path(local).read_bytes()[:-1] + b"?")
        put_file(self, local, place, **more)

    monkeypatch.setattr(S3FileSystem, "put_file", damaging)
    said = qpipe("share", made, "s3://bucket/copy", fails=True)
    assert said == (
        "Error: s3://bucket/copy/shard-00001.arrow: arrived damaged: run the same command again"
    )
    assert "copy/manifest.json" not in s3.names()
    assert "copy/shard-00001.json" not in s3.names()
    monkeypatch.undo()
    os.environ["QPIPE_CACHE"] = str(made.parent / "cache")
    assert "2 shard(s) copied" in qpipe("share", made, "s3://bucket/copy")
    assert "all well" in qpipe("verify", "s3://bucket/copy")


@pytest.mark.parametrize("name", ["shard-00001.arrow", "manifest.json", "README.md"])
def test_a_failing_upload_leaves_no_object(
    s3: Bucket, made: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from s3fs import S3FileSystem

    put_file = S3FileSystem.put_file

    def failing(self: Any, local: str, place: str, **more: Any) -> None:
        if place.endswith(name):
            raise ConnectionResetError("gone")
        put_file(self, local, place, **more)

    monkeypatch.setattr(S3FileSystem, "put_file", failing)
    said = qpipe("share", made, "s3://bucket/copy", fails=True)
    assert said == f"Error: s3://bucket/copy/{name}: cannot be written: gone"
    assert f"copy/{name}" not in s3.names()
    assert s3.names("copy/.lease") == []
    monkeypatch.setattr(S3FileSystem, "put_file", put_file)
    qpipe("share", made, "s3://bucket/copy")
    assert "all well" in qpipe("verify", "s3://bucket/copy")


# What it refuses


@pytest.mark.parametrize("root", ["{}", "s3://bucket"])
def test_it_refuses_what_is_not_sealed_or_not_its_own(
    s3: Bucket, made: Path, tmp_path: Path, root: str
) -> None:
    root = root.format(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "not a qpipe folder" in qpipe("share", tmp_path / "empty", f"{root}/copy", fails=True)
    note = open_path(f"{root}/foreign/note.txt")
    note.parent.mkdir(parents=True)
    note.write_bytes(b"mine")
    said = qpipe("share", made, f"{root}/foreign", fails=True)
    assert "holds something else (note.txt)" in said
    assert contents(note.parent) == {"note.txt": b"mine"}
    other = folder_of(tmp_path / "other", [targeted("a", [1, 2], [0.5], [{2: 0.5}])])
    qpipe("share", other, f"{root}/taken")
    before = contents(open_path(f"{root}/taken"))
    said = qpipe("share", made, f"{root}/taken", fails=True)
    assert "already holds `qpipe build-targets` output made differently" in said
    assert contents(open_path(f"{root}/taken")) == before


def test_the_same_work_made_another_time_is_no_copy(s3: Bucket, made: Path, tmp_path: Path) -> None:
    again = scores(tmp_path / "again", chance=0.5001)  # another GPU's
    qpipe("share", made, "s3://bucket/copy")
    said = qpipe("share", again, "s3://bucket/copy", fails=True)
    assert said.startswith("Error: s3://bucket/copy: holds the same folder, made another time")


def test_a_damaged_source_is_refused(s3: Bucket, tmp_path: Path) -> None:
    folder = scores(tmp_path / "scores")
    shard = folder / "shard-00002.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"?")
    said = qpipe("share", folder, "s3://bucket/copy", fails=True)
    assert said == f"Error: {shard}: missing or damaged: restore it, or make it again"
    shard.unlink()
    assert qpipe("share", folder, "s3://bucket/copy", fails=True) == said
    assert "copy/manifest.json" not in s3.names()
    shard.write_bytes(content)
    assert "1 shard(s) copied" in qpipe("share", folder, "s3://bucket/copy")


# Stores that do not answer


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A server that answers everything with a status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    S3FileSystem.clear_instance_cache()


def test_refused_credentials_are_one_line(
    s3: Bucket, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(403) as address:
        point_to(address, monkeypatch)
        for words in (("verify", "s3://bucket/copy"), ("share", made, "s3://bucket/copy")):
            said = qpipe(*words, fails=True)
            assert said.startswith("Error: s3://bucket/copy: cannot be used: ")
            assert "Forbidden" in said


def test_a_closed_port_is_one_line_and_soon(
    s3: Bucket, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")  # as a rule five, seconds apart
    point_to("http://127.0.0.1:9", monkeypatch)
    said = qpipe("share", made, "s3://bucket/copy", fails=True)
    assert said.startswith("Error: s3://bucket/copy: cannot be used: Could not connect")


def test_a_store_that_goes_away_in_the_middle_is_one_line(
    s3: Bucket, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = sharing.committed_shard

    def gone(folder: Any, index: int, fingerprint: str) -> Any:
        if index == 1:
            target_fs = folder.fs

            def refuse(*_: object, **__: object) -> None:
                raise OSError("connection lost")

            monkeypatch.setattr(target_fs, "info", refuse)
            monkeypatch.setattr(target_fs, "exists", refuse)
        return committed(folder, index, fingerprint)

    monkeypatch.setattr(sharing, "committed_shard", gone)
    said = qpipe("share", made, "s3://bucket/copy", fails=True)
    assert said.startswith("Error: s3://bucket/copy/shard-00001.json: cannot be used: connection")
    assert "copy/manifest.json" not in s3.names()


def test_the_hub_out_of_reach_is_one_line(made: Path) -> None:
    said = qpipe("share", made, "hf://datasets/name/targets", fails=True)
    assert said.startswith("Error: hf://datasets/name/targets: the repository cannot be created: ")
    assert "`hf auth login`" in said


# The card


def front_and_body(text: str) -> tuple[Any, str]:
    start, front, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), body


def test_the_card_says_what_the_folder_holds(tmp_path: Path) -> None:
    row = targeted("a", [1, 2, 3], [0.5, 0.5], [{2: 0.5, 7: 0.2}, {3: 0.5}])
    folder = folder_of(tmp_path / "targets", [row])
    qpipe("share", folder, tmp_path / "copy", "--license", "cc-by-4.0", "--title", "A title")
    front, body = front_and_body((tmp_path / "copy" / "README.md").read_text())
    assert front == {
        "license": "cc-by-4.0",
        "tags": ["qpipe", "soft-targets", "distillation"],
        "configs": [{"config_name": "default", "data_files": "shard-*.arrow"}],
    }
    size = (folder / "shard-00000.arrow").stat().st_size
    fingerprint = read_manifest(folder).fingerprint
    for line in (
        "# A title",
        "| demonstrations | 1 |",
        "| tokens | 3, 2 of them supervised |",
        f"| bytes a supervised token | {size / 2:.1f} |",
        "| entries a supervised token | 1.5 |",
        "| mean probability outside the entries | 0.4000 |",
        "| base model | made-up |",
        "| vocabulary | 320 tokens |",
        f"| fingerprint | {fingerprint} |",
        f"- build-targets {fingerprint[:12]}: gift (frozen-target, beta=20)",
        "from qpipe.pipeline import read_targets",
    ):
        assert line in body.splitlines()


def test_a_card_of_an_unknown_model_says_so(tmp_path: Path) -> None:
    row = targeted("a", [1, 2, 3], [0.5], [{3: 0.5}])
    manifest = read_manifest(folder_of(tmp_path / "targets", [row]))
    for made_by in ({}, {"teacher": 3}):
        assert "| base model | not known |" in card(replace(manifest, provenance=made_by), "t", "")


def test_the_card_lets_datasets_find_the_rows(tmp_path: Path) -> None:
    from datasets import load_dataset

    row = targeted("a", [1, 2, 3], [0.5, 0.5], [{2: 0.5, 7: 0.2}, {3: 0.5}])
    folder = folder_of(tmp_path / "targets", [row])
    qpipe("share", folder, tmp_path / "copy")
    rows: Any = load_dataset(str(tmp_path / "copy"), split="train", cache_dir=str(tmp_path / "c"))
    assert rows.with_transform(decoder(tmp_path / "copy"))[0]["support_ids"] == [[2, 7], [3]]


HOSTILE = "a|b\n# c [d](javascript:e) <script>f</script> `g` *h* _i_ ![j](k) ---\r\n| l | m |"


def hostile(manifest: Manifest) -> Manifest:
    """A manifest whose every string is somebody else's."""
    settings = manifest.settings | {"method": HOSTILE, "form": HOSTILE, "tokenizer_hash": HOSTILE}
    settings["parameters"] = {HOSTILE: HOSTILE}
    identity = replace(manifest.identity, settings=settings, inputs={HOSTILE: HOSTILE})
    provenance = {"model": HOSTILE, "revision": HOSTILE, "teacher": {"model": HOSTILE}}
    return replace(manifest, identity=identity, provenance=provenance)


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    row = targeted("a", [1, 2, 3], [0.5], [{3: 0.5}])
    manifest = read_manifest(folder_of(tmp_path / "targets", [row]))
    tame = card(manifest, "title", "mit")
    text = card(hostile(manifest), HOSTILE, HOSTILE)
    front, body = front_and_body(text)
    assert front["license"] == HOSTILE
    assert (
        len(body.splitlines()) == len(tame.split("---\n", 2)[2].splitlines()) + 2
    )  # teacher, input
    assert "<" not in body
    for line in body.splitlines():
        bare = line.replace("\\|", "")
        assert bare.count("|") == (3 if line.startswith("|") else 0)
        assert line.count("](") == line.count("\\](")
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## How it was made", "## Loading it"]


def test_plain_words_render_as_they_are() -> None:
    """By a Markdown reader of another make, where one is there."""
    markdown = pytest.importorskip("markdown_it")
    import html

    shown = markdown.MarkdownIt("commonmark").enable("table").renderInline(plain(HOSTILE))
    assert html.unescape(shown) == " ".join(HOSTILE.split())


# Lineage


def test_the_chain_goes_back_to_the_demonstrations(tmp_path: Path) -> None:
    base, teacher = scores(tmp_path / "base"), scores(tmp_path / "teacher")
    out = tmp_path / "targets"
    qpipe("build-targets", "--scores", base, "--teacher", teacher, "--out", out)
    said = qpipe("lineage", out).splitlines()
    manifests = [read_manifest(folder) for folder in (out, base, teacher)]
    first, *others = (manifest.fingerprint[:12] for manifest in manifests)
    assert said[0].startswith(f"build-targets {first}: kd")
    assert [line.split(": top ")[0] for line in said[1:]] == [
        f"  {role}: score {other}"
        for role, other in zip(("scores", "teacher"), others, strict=True)
    ]


def test_parents_that_cannot_be_are_one_error(tmp_path: Path) -> None:
    from qpipe.pipeline.errors import UserError

    manifest = read_manifest(scores(tmp_path / "scores"))
    identity = replace(manifest.identity, inputs={"scores": "0123"})
    for parent in ("words", {}, {"identity": {"stage": "score"}, "parents": {}}):
        with pytest.raises(UserError, match="damaged parents"):
            list(generations(replace(manifest, identity=identity, parents={"scores": parent})))
