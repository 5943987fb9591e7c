"""Manifests, plans and sidecars made to do harm, every hash and seal recomputed."""

import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from qpipe.stages.folders.verify import verify

from .forged import copies, forge, one_line_each, read_in_a_child

pytestmark = pytest.mark.usefixtures("no_sync")

ABSURD = [2**31 - 1, 2**63, 10**400, -1, 1e300, True, "5", None, [], {}]


@pytest.mark.parametrize("value", ABSURD, ids=lambda each: str(each)[:9])
@pytest.mark.parametrize("name", ["rows", "tokens", "positions", "entries", "bytes"])
def test_absurd_counts_are_refused(own: Path, name: str, value: Any) -> None:
    forge(own, lambda manifest: manifest["shards"][0].update({name: value}))
    if name == "bytes" and value == 2**31 - 1:  # no reader relies on it
        assert any("bytes, 2,147,483,647 in the manifest" in each for each in verify(own))
    else:
        assert "manifest" in one_line_each(own)


def test_absurd_counts_everywhere_set_no_memory_aside(own: Path) -> None:
    names = ("rows", "tokens", "positions", "entries", "bytes")

    def change(manifest: dict[str, Any]) -> None:
        for entry in manifest["shards"]:
            entry.update(dict.fromkeys(names, 2**31 - 1))

    forge(own, change)
    (said,) = read_in_a_child(own)
    assert "manifest states 2,147,483,647" in said[1]
    assert "manifest states 2,147,483,647" in said[2]


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "shard-00001.arrow", "", None, 3, []])
def test_names_that_climb_out_are_refused(own: Path, name: Any) -> None:
    forge(own, lambda manifest: manifest["shards"][0].update(file=name))
    said = one_line_each(own)
    words = "shard-00000.arrow: file cannot be" if isinstance(name, str) else "`$.shards[0].file`"
    assert words in said


@pytest.mark.parametrize("value", [*ABSURD[1:], 2**31 + 1, 0], ids=lambda each: str(each)[:9])
def test_absurd_vocabularies_are_refused(own: Path, value: Any) -> None:
    forge(own, lambda manifest: manifest["identity"]["settings"].update(vocab_size=value))
    assert "manifest.json: damaged" in one_line_each(own)


def test_vocabularies_and_supports_that_are_not_the_shards_set_no_memory_aside(
    made: Path, tmp_path: Path
) -> None:
    forged = []
    for name in ("targets", "scores"):
        for vocab_size, max_support in product((2**31 - 1, 2**20, 1), (2**31 - 1, 2**52, 0, None)):
            own = Path(shutil.copytree(made / name, tmp_path / f"{name}{len(forged)}"))
            settings = {"vocab_size": vocab_size, "max_support": max_support}
            forge(own, lambda manifest, new=settings: manifest["identity"]["settings"].update(new))
            forged.append(own)
    for said in read_in_a_child(*forged):
        assert said[2] != "found []"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("precision", "int4"),
        ("precision", 8),
        ("precision", []),
        ("max_support", 1.5),
        ("max_support", "64"),
        ("max_support", True),
        ("method", 3),
        ("method", []),
        ("form", {}),
        ("parameters", [1]),
        ("parameters", {"lam": [1]}),
        ("tokenizer_hash", 5),
        ("tail_shape", "round"),
        ("tail_shape", []),
        ("top_p", "all"),
        ("temperature", None),
    ],
)
def test_settings_of_another_kind_are_refused(own: Path, name: str, value: Any) -> None:
    forge(own, lambda manifest: manifest["identity"]["settings"].update({name: value}))
    said = one_line_each(own)
    assert "manifest.json: damaged, not a manifest (" in said
    assert f"at `$.{name}" in said


@pytest.mark.parametrize(
    "name", ["vocab_size", "tokenizer_hash", "method", "form", "parameters", "max_support"]
)
def test_settings_that_are_missing_are_named(own: Path, name: str) -> None:
    forge(own, lambda manifest: manifest["identity"]["settings"].pop(name))
    assert f"setting {name} is missing" in one_line_each(own)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(frequent_ids="1 1"),
        lambda m: m.update(frequent_ids="-1"),
        lambda m: m.update(frequent_ids="300"),
        lambda m: m.update(frequent_ids="9" * 5000),
        lambda m: m.update(frequent_ids=[1, 2]),
        lambda m: m.update(shards={}),
        lambda m: m.update(shards=[3]),
        lambda m: m.update(shards="x"),
        lambda m: m.update(totals=[]),
        lambda m: m.update(identity=[]),
        lambda m: m.update(parents=3),
        lambda m: m.update(provenance=None),
        lambda m: m["identity"].update(stage="no such"),
        lambda m: m["identity"].update(stage=[]),
        lambda m: m["identity"].update(settings=[]),
        lambda m: m["identity"].update(settings=None),
        lambda m: m["identity"].update(inputs=[]),
        lambda m: m["identity"].update(inputs={"scores": 3}),
        lambda m: m["identity"].update(schema={"id": {}}),
        lambda m: m["shards"][0].update(sums=[]),
        lambda m: m["shards"][0].update(sums={"trust": "x"}),
        lambda m: m["shards"][0].update(rejects=3),
        lambda m: m["shards"][0].update(rejects=[{"line": 1}]),
        lambda m: m["shards"][0].update(rejects=[{"line": "1", "source": "a", "reason": "b"}]),
        lambda m: m["shards"][0].update(sha256=3),
        lambda m: m["shards"][0].update(sha256="/dev/zero"),
        lambda m: m["shards"][0].update(sha256="0" * 64),
        lambda m: m["shards"].append(dict(m["shards"][0])),
        lambda m: m["shards"].reverse(),
        lambda m: m["identity"]["settings"].update(method="\ud800"),
    ],
)
def test_manifests_of_another_shape_are_refused(
    own: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    forge(own, change)
    one_line_each(own)


def test_settings_too_deep_to_be_hashed_are_refused(own: Path) -> None:
    text = (own / "manifest.json").read_text()
    deep = '"deep": ' + "[" * 600 + "]" * 600 + ', "method": "gift"'
    (own / "manifest.json").write_text(text.replace('"method": "gift"', deep))
    assert "manifest.json: damaged" in one_line_each(own)


GIGANTIC = {
    "lists": b"[" * 10**6,
    "maps": b'{"a":' * 10**6,
    "nested": b"[" * 900 + b"]" * 900,
    "many lists": b"[" + b"[]," * 10**7 + b"[]]",
    "many maps": b"[" + b"{}," * 10**7 + b"{}]",
    "long number": b"9" * 10**7,
    "NaN": b'{"identity": NaN}',
    "zeros": b"\0" * 10**6,
}


def test_nested_and_gigantic_json_is_refused(tmp_path: Path) -> None:
    folders = []
    for (name, content), file in product(GIGANTIC.items(), ("manifest.json", "plan.json")):
        folder = tmp_path / f"{name} {file}"
        folder.mkdir()
        (folder / file).write_bytes(content)
        folders.append(folder)
    for said in read_in_a_child(*folders):
        assert [line.split()[0] for line in said] == ["refused"] * 3


def test_files_of_gigabytes_are_not_read(own: Path) -> None:
    names = ("manifest.json", "shard-00000.json", "rejects.jsonl")
    folders = copies(own, len(names))
    for name, folder in zip(names, folders, strict=True):
        with open(folder / name, "r+b") as file:
            file.truncate(20 * 2**30)  # sparse: it takes no room
    for name, said in zip(names, read_in_a_child(*folders), strict=True):
        assert name in said[2]


def test_what_is_no_file_is_not_waited_for(own: Path) -> None:
    """A pipe that nobody writes to; a folder; a link to a device without an end."""
    names = ("manifest.json", "shard-00000.arrow", "shard-00000.json", "rejects.jsonl")
    makers = (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path))
    folders = copies(own, len(names) * len(makers))
    for (name, make), folder in zip(product(names, makers), folders, strict=True):
        (folder / name).unlink()
        make(folder / name)
    said = read_in_a_child(*folders)
    for (name, _), each in zip(product(names, makers), said, strict=True):
        assert name in each[2]
