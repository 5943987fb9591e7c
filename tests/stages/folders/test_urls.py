"""Every command on folders behind URLs: the same bytes as on local ones."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from qpipe.pipeline import decoder, read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.storage.remote import open_path
from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.examples import targeted
from qpipe.tests.support.folders import folder_of
from qpipe.tests.support.s3 import Bucket
from qpipe.tests.support.tiers import slow

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{n}?"},
            {"role": "assistant", "content": f"is {n}"},
        ]
    }
    for n in range(7)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def score(model: Path, demonstrations: object, out: object, *more: object, **how: bool) -> str:
    words = ("--engine", "transformers", "--top-k", "8", "--shard-size", "3", *more)
    return qpipe(
        "score", "--model", model, "--demonstrations", demonstrations, "--out", out, *words, **how
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folders of local runs: scores, teacher, targets, both."""
    root = tmp_path_factory.mktemp("local")
    (root / "chats.jsonl").write_bytes(LINES)
    score(tiny_model, root / "chats.jsonl", root / "scores")
    at = ("--at", root / "scores", "--engine", "transformers", "--top-k", "8")
    qpipe("score", "--model", tiny_model, *at, "--out", root / "teacher")
    qpipe("build-targets", "--scores", root / "scores", "--out", root / "targets")
    both = ("--scores", root / "scores", "--teacher", root / "teacher")
    qpipe("build-targets", *both, "--out", root / "both")
    return root


@pytest.mark.parametrize("root", ["s3://bucket/a b/ü%20#?", *slow("s3://bucket", "memory://x/y")])
def test_every_command_writes_the_same_bytes_behind_urls(
    s3: Bucket, local: Path, tiny_model: Path, tmp_path: Path, root: str
) -> None:
    chats = open_path(f"{root}/chats.jsonl")
    chats.parent.mkdir(parents=True, exist_ok=True)
    chats.write_bytes(LINES)  # the memory store lives in this process alone
    score(tiny_model, f"{root}/chats.jsonl", f"{root}/scores/")
    at = ("--at", f"{root}/scores", "--engine", "transformers", "--top-k", "8")
    qpipe("score", "--model", tiny_model, *at, "--out", f"{root}/teacher")
    qpipe("build-targets", "--scores", f"{root}/scores", "--out", f"{root}/targets")
    both = ("--scores", f"{root}/scores", "--teacher", f"{root}/teacher")
    qpipe("build-targets", *both, "--out", f"{root}/both")
    for name in ("scores", "teacher", "targets", "both"):
        assert contents(open_path(f"{root}/{name}")) == contents(local / name), name
        assert "all well" in qpipe("verify", f"{root}/{name}")
    assert "nothing to do" in score(tiny_model, f"{root}/chats.jsonl", f"{root}/scores/")
    # and what only reads
    there, here = f"{root}/targets", local / "targets"
    for words in (("inspect", "{}", "-n", "2", "--json"), ("compare-methods", "{}")):
        of = "targets" if words[0] == "inspect" else "scores"
        said = qpipe(*(word.format(f"{root}/{of}") for word in words))
        told = qpipe(*(word.format(local / of) for word in words))
        for place in (f"{root}/{of}", json.dumps(f"{root}/{of}").strip('"')):
            said = said.replace(place, str(local / of))
        assert said == told
    assert qpipe("lineage", there) == qpipe("lineage", here)
    qpipe("report", there, "--scores", f"{root}/scores", "--out", tmp_path / "page.html")
    assert len(qpipe("list", root).splitlines()) == 5
    ids = [example.id for example in read_targets(there)]
    assert ids == [example.id for example in read_targets(here)]
    assert len(ids) == 7


def test_a_local_folder_from_a_remote_one_and_file_urls(
    s3: Bucket, local: Path, tmp_path: Path
) -> None:
    for path in (local / "scores").iterdir():
        s3.put(f"scores/{path.name}", path.read_bytes())
    out = tmp_path / "a b"
    quoted = str(out).replace(" ", "%20")
    qpipe("build-targets", "--scores", "s3://bucket/scores", "--out", f"file://{quoted}")
    assert contents(out) == contents(local / "targets")


@pytest.mark.parametrize("kind", ["jsonl.zst", *slow("jsonl.gz", "parquet", "json")])
def test_demonstrations_behind_urls(
    s3: Bucket, tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    import pyarrow.parquet
    import zstandard

    path = tmp_path / f"chats.{kind}"
    match kind:
        case "jsonl.gz":
            path.write_bytes(gzip.compress(LINES))
        case "jsonl.zst":
            path.write_bytes(zstandard.compress(LINES))
        case "parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
        case _:
            path.write_text(json.dumps(ROWS))
    s3.put(f"in/{path.name}", path.read_bytes())
    score(tiny_model, path, tmp_path / "here")
    score(tiny_model, f"s3://bucket/in/{path.name}", tmp_path / "there")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_changed_demonstrations_are_fetched_again(
    s3: Bucket, tiny_model: Path, tmp_path: Path
) -> None:
    s3.put("chats.jsonl", LINES)
    score(tiny_model, "s3://bucket/chats.jsonl", tmp_path / "scores")
    s3.put("chats.jsonl", LINES.replace(b"is 3", b"is 4"))  # of the same size
    said = score(tiny_model, "s3://bucket/chats.jsonl", tmp_path / "scores", fails=True)
    assert "made differently: inputs.chats.jsonl" in said


def test_train_streams_through_the_cache(
    s3: Bucket, local: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for path in (local / "targets").iterdir():
        s3.put(f"targets/{path.name}", path.read_bytes())
    models = []
    for targets in (local / "targets", "s3://bucket/targets"):
        out = tmp_path / f"run-{len(models)}"
        words = ("--model", tiny_model, "--max-steps", "2", "--batch-size", "2")
        qpipe("train", "--targets", targets, "--out", out, *words)
        models.append((out / "model.safetensors").read_bytes())
    assert models[0] == models[1]
    kept = list((tmp_path / "cache" / "shards").iterdir())
    assert len(kept) == 4  # the shards and the index
    said = qpipe("train", "--targets", "s3://bucket/targets", "--out", "s3://bucket/run",
                 "--model", tiny_model, fails=True)  # fmt: skip
    assert said.startswith("Error: --out s3://bucket/run: a model is trained in a local folder")
    assert s3.names("run") == []


@pytest.mark.slow
def test_what_goes_in_and_out_by_file_may_be_behind_urls(
    s3: Bucket, local: Path, tiny_model: Path, tmp_path: Path
) -> None:
    score(tiny_model, local / "chats.jsonl", tmp_path / "scores", "--top-k", "320")
    there, here = "s3://bucket/logs.parquet", tmp_path / "logs.parquet"
    for file in (there, here):
        qpipe("export", tmp_path / "scores", "--format", "axolotl", "--out", file)
    assert s3.get("logs.parquet") == here.read_bytes()
    for file, out in ((there, "s3://bucket/imported"), (here, tmp_path / "imported")):
        words = ("--format", "axolotl", "--model", tiny_model, "--out", out)
        qpipe("import", file, *words)
    assert s3.folder("imported") == contents(tmp_path / "imported")
    s3.put("ids.txt", b"chats.jsonl:2\nchats.jsonl:5\n")
    few = ("--ids", "s3://bucket/ids.txt", "--out", "s3://bucket/few")
    qpipe("subset", local / "targets", *few)
    assert [example.id for example in read_targets("s3://bucket/few")] == [
        "chats.jsonl:2",
        "chats.jsonl:5",
    ]


@pytest.mark.slow
def test_a_mixture_of_folders_behind_urls(
    s3: Bucket, local: Path, tiny_model: Path, tmp_path: Path
) -> None:
    qpipe("build-targets", "--scores", local / "scores", "--out", tmp_path / "gift", "--method",
          "gift")  # fmt: skip
    parts = (local / "targets", tmp_path / "gift")
    for part in parts:
        qpipe("share", part, f"s3://bucket/{part.name}")
    shares = ("s3://bucket/targets=3", "s3://bucket/gift=1")
    for mixed in ("s3://bucket/mixed", tmp_path / "mixed"):
        qpipe("mix", *shares, "--out", mixed)
        assert "all well" in qpipe("verify", mixed)
    said = qpipe("mix", f"{parts[0]}=3", shares[1], "--out", "s3://bucket/more", fails=True)
    assert f"{parts[0]} cannot be read on other machines" in said
    assert s3.names("more") == []
    # the same samples as of the local folders, in our trainer and in that of others
    words = ("--model", tiny_model, "--max-steps", "2", "--batch-size", "2", "--out")
    given = ("--targets", *parts, "--mixture-weights", "3,1")
    qpipe("train", *given, *words, tmp_path / "one")
    qpipe("train", "--targets", "s3://bucket/mixed", *words, tmp_path / "other")
    models = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("one", "other")]
    assert models[0] == models[1]


def test_other_trainers_read_behind_urls(s3: Bucket, local: Path) -> None:
    from qpipe.trainer.integrations import TargetDataset, target_objective

    for path in (local / "targets").iterdir():
        s3.put(f"targets/{path.name}", path.read_bytes())
    url = "s3://bucket/targets"
    there, here = TargetDataset(url), TargetDataset(local / "targets")
    assert [row["id"] for row in there] == [row["id"] for row in here]
    assert target_objective(url) == target_objective(local / "targets")
    shard = pa.ipc.open_file(s3.get("targets/shard-00000.arrow")).read_all().to_pydict()
    assert decoder(url)(shard) == decoder(local / "targets")(shard)


# Interrupted, and half made


INTERRUPTED = """
import os, sys
from qpipe.pipeline.folders import shard_run
from qpipe.stages.cli import main
left = int(sys.argv.pop(1))
commit = shard_run.commit_shard
def commit_shard(*given):
    global left
    left -= 1
    entry = commit(*given)
    if left == 0:
        os._exit(9)  # as kill -9 does
    return entry
shard_run.commit_shard = commit_shard
main()
"""


def test_a_killed_run_goes_on(s3: Bucket, local: Path) -> None:
    words = ["build-targets", "--scores", str(local / "scores"), "--out", "s3://bucket/targets"]
    killed = subprocess.run([sys.executable, "-c", INTERRUPTED, "2", *words], env=os.environ)
    assert killed.returncode == 9
    assert len([key for key in s3.names("targets/shard") if key.endswith(".arrow")]) == 2
    assert "targets/manifest.json" not in s3.names()
    assert s3.names("targets/.lease")
    times = {key: s3.client.head_object(Bucket="bucket", Key=key)["LastModified"]
             for key in s3.names("targets/shard")}  # fmt: skip
    qpipe(*words)  # at once: the one that held the folder is dead
    assert s3.folder("targets") == contents(local / "targets")
    for key, time in times.items():
        assert s3.client.head_object(Bucket="bucket", Key=key)["LastModified"] == time


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost", ["shard-00001.json", "shard-00001.arrow", "manifest.json", "rejects.jsonl"]
)
def test_half_a_shard_is_made_again(s3: Bucket, local: Path, lost: str) -> None:
    words = ["build-targets", "--scores", str(local / "scores"), "--out", "s3://bucket/targets"]
    subprocess.run([sys.executable, "-c", INTERRUPTED, "3", *words], env=os.environ, check=False)
    s3.remove(f"targets/{lost}")
    qpipe(*words)
    assert s3.folder("targets") == contents(local / "targets")


@pytest.mark.slow
def test_a_shard_of_another_size_is_made_again(s3: Bucket, local: Path) -> None:
    words = ["build-targets", "--scores", str(local / "scores"), "--out", "s3://bucket/targets"]
    subprocess.run([sys.executable, "-c", INTERRUPTED, "2", *words], env=os.environ, check=False)
    s3.put("targets/shard-00000.arrow", b"half")
    qpipe(*words)
    assert s3.folder("targets") == contents(local / "targets")


@pytest.mark.slow
def test_tasks_share_a_remote_folder(s3: Bucket, local: Path) -> None:
    code = "from qpipe.stages.cli import main; main()"
    words = ["build-targets", "--scores", str(local / "scores"), "--out", "s3://bucket/targets"]
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words, "--rank", str(rank), "--world-size", "3"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [task.communicate() for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], said
    assert s3.folder("targets") == contents(local / "targets")


# What cannot be used


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://", "names no bucket"),
        ("s3:///targets", "names no bucket"),
        ("s3://missing/targets", "no such folder"),
        ("s3://bucket/nothing", "no such folder"),
        ("s3://bucket/chats.jsonl", "is a file"),
        ("gs://bucket/targets", "gcsfs"),
        ("gone://bucket/targets", "gone"),
        ("file://machine/targets", "names the machine machine"),
        ("memory://nothing", "no such folder"),
    ],
)
def test_a_url_that_cannot_be_read(s3: Bucket, url: str, words: str) -> None:
    s3.put("chats.jsonl", LINES)
    said = qpipe("verify", url, fails=True)
    assert said.startswith(f"Error: {url}")
    assert words in said


@pytest.mark.parametrize("name", ["a\0b", "\0", "file:///a%00b", "file:a\0b"])
def test_a_name_with_a_nul_names_nothing(name: str) -> None:
    with pytest.raises(UserError, match="a name cannot hold the character NUL"):
        open_path(name)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://missing/targets", "bucket does not exist"),
        ("s3://bucket/chats.jsonl", "is a file"),
        ("s3://bucket/foreign", "holds something else (note.txt)"),
    ],
)
def test_a_url_that_cannot_be_written(s3: Bucket, local: Path, url: str, words: str) -> None:
    s3.put("chats.jsonl", LINES)
    s3.put("foreign/note.txt", b"mine")
    before = s3.names()
    said = qpipe("build-targets", "--scores", local / "scores", "--out", url, fails=True)
    assert said.startswith(f"Error: {url}")
    assert words in said
    assert s3.names() == before


def test_a_folder_that_a_console_made_is_empty(s3: Bucket, local: Path) -> None:
    s3.put("targets/", b"")
    assert list(open_path("s3://bucket/targets").iterdir()) == []
    qpipe("build-targets", "--scores", local / "scores", "--out", "s3://bucket/targets")
    assert "all well" in qpipe("verify", "s3://bucket/targets")


@pytest.mark.parametrize("name", ["nothing.jsonl", "folder", "chats.xml"])
def test_demonstrations_that_cannot_be_read(
    s3: Bucket, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    s3.put("folder/chats.jsonl", LINES)
    s3.put("chats.xml", b"<a>\n")
    said = score(tiny_model, f"s3://bucket/{name}", tmp_path / "scores", fails=True)
    assert f"s3://bucket/{name}" in said
    assert "no such file" in said or "unknown kind of file" in said


def test_a_target_folder_is_read_from_python(s3: Bucket, tmp_path: Path) -> None:
    example = targeted("a", [1, 2, 3], [0.5], [{3: 0.5, 4: 0.25}])
    folder_of(open_path("s3://bucket/made"), [example])  # pyright: ignore[reportArgumentType]
    (found,) = read_targets("s3://bucket/made")
    assert found.id == "a"
