"""Folders made to do harm, every hash, total and seal recomputed to fit.

One clear error each, no crash, no memory set aside for what is not there. What could end the
process is read in a child.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from qpipe.pipeline import read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.storage.json_files import sha256_of_json
from qpipe.stages.folders.verify import verify

from ...support.examples import random_scored
from ...support.folders import SCORES, build, reseal, rewrite, seal, seal_scores

pytestmark = pytest.mark.usefixtures("no_sync")

MOST_MEMORY = 300  # MB above what the interpreter takes

PEAK = """
from pathlib import Path

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024
"""
READ = """
import sys
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.sealed import open_sealed, read_scores, read_targets
from qpipe.stages.folders.verify import verify

before = peak()
for folder in map(Path, sys.argv[1:]):
    for read in (read_scores, read_targets, verify):
        try:
            said = [str(each) for each in read(folder)]
            print("read" if read is not verify else f"found {said}")
        except UserError as error:
            assert "\\n" not in str(error) and len(str(error)) < 700, str(error)
            print("refused", error)
print(peak() - before)
"""


def in_a_child(script: str, *arguments: object) -> list[str]:
    """The lines that a child prints."""
    command = [sys.executable, "-c", PEAK + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout.splitlines()


def read_in_a_child(*folders: Path) -> list[list[str]]:
    """What read_scores, read_targets and verify say of each folder; little memory is taken."""
    *said, memory = in_a_child(READ, *folders)
    assert int(memory) < MOST_MEMORY
    assert len(said) == 3 * len(folders)
    return [said[start : start + 3] for start in range(0, len(said), 3)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of scores/ and targets/. Not to be changed."""
    root = tmp_path_factory.mktemp("hostile")
    build(seal_scores(root / "scores"), root / "targets")
    return root


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """Targets to be damaged."""
    return Path(shutil.copytree(made / "targets", tmp_path / "targets"))


# The manifest


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest as someone who knows the format: all that can be recomputed is."""
    value = json.loads((folder / "manifest.json").read_text())
    value.pop("seal", None)
    change(value)
    try:
        value["fingerprint"] = sha256_of_json(value["identity"])
        for entry in value["shards"]:
            entry["fingerprint"] = value["fingerprint"]
        for name in ("rows", "tokens", "positions", "entries", "bytes"):
            value["totals"][name] = sum(entry[name] for entry in value["shards"])
        value["totals"]["read"] = value["totals"]["rows"] + value["totals"]["rejected"]
        value["seal"] = sha256_of_json(value)
    except (TypeError, KeyError, AttributeError, RecursionError, UnicodeEncodeError):
        value["seal"] = ""  # the change broke what the others are computed from
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / "manifest.json").write_text(text + "\n", errors="surrogatepass")


def one_line_each(folder: Path) -> str:
    """Reader and verify refuse a folder; what the reader said."""
    with pytest.raises(UserError) as refused:
        list(read_targets(folder))
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 700
    with suppress(UserError):
        assert list(verify(folder))
    return said


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


def copies(own: Path, count: int) -> list[Path]:
    return [Path(shutil.copytree(own, own.with_name(f"copy{index}"))) for index in range(count)]


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


# The shards


def forged_shard(folder: Path, data: bytes) -> None:
    """Put other bytes in place of the first shard."""
    (folder / "shard-00000.arrow").write_bytes(data)
    reseal(folder)


@pytest.mark.parametrize("cut", [1, 6, 9, 10, 11, 200, 10**9])
def test_truncated_footers_are_refused(own: Path, cut: int) -> None:
    data = (own / "shard-00000.arrow").read_bytes()
    forged_shard(own, data[: max(0, len(data) - cut)])
    assert "shard-00000.arrow: damaged" in one_line_each(own)


@pytest.mark.parametrize("size", [-1, -(2**31), 0, 1, 2**31 - 1])
def test_footers_of_absurd_sizes_are_refused(own: Path, size: int) -> None:
    data = bytearray((own / "shard-00000.arrow").read_bytes())
    data[-10:-6] = struct.pack("<i", size)
    forged_shard(own, bytes(data))
    assert "shard-00000.arrow: damaged" in one_line_each(own)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["input_ids"][3].__setitem__(0, 300), "row 3 ('chats:3'): column input_ids is"),
        (lambda c: c["rank_steps_high"][3].__setitem__(0, 2), "row 3 ('chats:3'): column rank_st"),
        (lambda c: c["counts"][3].append(1), "row 3 ('chats:3'): column counts differs"),
        (lambda c: c["weights"][2].pop(), "row 2 ('chats:2'): column weights differs"),
        (lambda c: c["positions"][1].__setitem__(0, 99), "row 1 ('chats:1'): column positions is"),
        (lambda c: c["counts"][1].__setitem__(0, 0), "row 1 ('chats:1'): column counts does not"),
        (lambda c: c["trust"].__setitem__(4, None), "row 4 ('chats:4'): column trust has null"),
        (lambda c: c["trust"][4].__setitem__(0, None), "row 4 ('chats:4'): column trust has null"),
        (lambda c: c["id"].__setitem__(4, None), "row 4 ('None'): column id has null"),
        (lambda c: c.update(more=c["id"]), "its columns are not those of this format"),
        (lambda c: c.pop("trust"), "its columns are not those of this format"),
        (lambda c: [each.clear() for each in c.values()], "holds 0 rows, its manifest states 5"),
        (lambda c: [each.pop() for each in c.values()], "holds 4 rows, its manifest states 5"),
    ],
)
def test_rows_that_cannot_be_are_refused_by_name(
    own: Path, change: Callable[[dict[str, list[Any]]], Any], words: str
) -> None:
    rewrite(own, 0, change, more=pa.string())
    reseal(own)
    assert words in one_line_each(own)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 2.0])
@pytest.mark.parametrize("name", ["trust", "weights"])
def test_numbers_that_are_none_are_found(own: Path, name: str, value: float) -> None:
    rewrite(own, 0, lambda columns: columns[name][3].__setitem__(0, value))
    reseal(own)
    if (name, value) != ("weights", 2.0):
        (found,) = verify(own)
        assert f"shard-00000.arrow, row 3 ('chats:3'): column {name} is no" in found


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("trust", pa.list_(pa.float64())),
        ("id", pa.large_string()),
        ("counts", pa.large_list(pa.uint8())),
        ("counts", pa.list_(pa.uint8(), 3)),
        ("id", pa.binary()),
    ],
)
def test_columns_of_other_types_are_refused(own: Path, name: str, other: pa.DataType) -> None:
    def change(columns: dict[str, list[Any]]) -> None:
        if pa.types.is_fixed_size_list(other):
            columns[name] = [[1, 1, 1]] * 5

    rewrite(own, 0, change, **{name: other})
    reseal(own)
    assert "its columns are not those of this format" in one_line_each(own)


def test_ids_are_not_read_of_a_shard_without_them(own: Path) -> None:
    rewrite(own, 0, lambda columns: columns.pop("id"))
    with pytest.raises(UserError, match="its columns are not those of this format"):
        open_sealed(own).ids(0)


def test_dictionaries_are_refused_before_they_are_read(own: Path) -> None:
    table = pa.table({"id": pa.array(["a", "b"]).dictionary_encode()})
    with pa.ipc.new_file(own / "shard-00000.arrow", table.schema) as writer:
        writer.write_table(table)
    reseal(own)
    assert "it holds dictionaries, unlike any shard" in one_line_each(own)


def test_batches_of_no_rows_are_read(own: Path) -> None:
    wanted = [each.id for each in read_targets(own)]
    path = own / "shard-00000.arrow"
    batch = pa.ipc.open_file(path.read_bytes()).get_batch(0)
    with pa.OSFile(str(path), "w") as file, pa.ipc.new_file(file, batch.schema) as writer:
        for each in (batch.slice(0, 0), batch, batch.slice(0, 0)):
            writer.write_batch(each)
    reseal(own)
    assert [each.id for each in read_targets(own)] == wanted
    assert list(verify(own)) == []


def bomb(folder: Path, megabytes: int) -> int:
    """Put so many zeros into a column of the first shard; the bytes of the file."""
    table = pa.ipc.open_file((folder / "shard-00000.arrow").read_bytes()).read_all()
    schema, rows = table.schema, 16
    size = megabytes * 10**6 // rows // 4
    zeros = pa.array(np.zeros(size, np.float32))
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    path = folder / "shard-00000.arrow"
    with (
        pa.OSFile(str(path), "w") as file,
        pa.ipc.new_file(file, schema, options=options) as writer,
    ):
        columns = []
        for field in schema:
            if field.name == "id":
                columns.append(pa.array(["a"] * rows))
            elif field.name == "trust":
                values = pa.concat_arrays([zeros] * rows)
                offsets = pa.array(np.arange(rows + 1) * size, pa.int32())
                columns.append(pa.ListArray.from_arrays(offsets, values))
            else:
                empty = pa.array([], field.type.value_type)
                columns.append(
                    pa.ListArray.from_arrays(pa.array([0] * (rows + 1), pa.int32()), empty)
                )
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    reseal(folder)
    return path.stat().st_size


def test_a_bomb_is_not_set_off(own: Path) -> None:
    """Zeros, ten thousand times smaller packed; the one of gigabytes is in a `slow` test."""
    assert bomb(own, 400) < 10**5
    (said,) = read_in_a_child(own)
    assert "unpacks to 400,000," in said[1]
    assert "unpacks to 400,000," in said[2]


def test_buffers_that_declare_absurd_sizes_are_refused(own: Path) -> None:
    """The eight bytes before each zstd frame (28 b5 2f fd) say how large it will be."""
    data = (own / "shard-00000.arrow").read_bytes()
    places = [place for place in range(8, len(data)) if data[place : place + 4] == b"(\xb5/\xfd"]
    assert len(places) > 3
    declared = (2**40, 2**62, -2, -(2**63), 10**10)
    folders = copies(own, 4 * len(declared))
    for (place, size), folder in zip(product(places[:4], declared), folders, strict=True):
        changed = bytearray(data)
        changed[place - 8 : place] = struct.pack("<q", size)
        forged_shard(folder, bytes(changed))
    for said in read_in_a_child(*folders):
        assert "shard-00000.arrow: damaged" in said[1]
        assert "shard-00000.arrow: damaged" in said[2]


BUILD = """
import sys
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets

before = peak()
build_targets(BuildSettings(Path(sys.argv[1]), Path(sys.argv[2]), choose("gift")))
print(peak() - before)
"""


def test_building_for_the_largest_vocabulary_takes_little_memory(tmp_path: Path) -> None:
    settings = SCORES | {"vocab_size": 2**31 - 1}
    scores = seal(tmp_path / "scores", "score", settings, [[random_scored(5)]])
    (memory,) = in_a_child(BUILD, scores, tmp_path / "targets")
    assert int(memory) < MOST_MEMORY
    (target,) = read_targets(tmp_path / "targets")
    assert len(target.positions) == 5


@pytest.mark.parametrize("shards", [[], [[]], [[random_scored(0)]]])
def test_scores_of_nothing_are_refused(tmp_path: Path, shards: list[list[Any]]) -> None:
    scores = seal(tmp_path / "scores", "score", SCORES, shards)
    with pytest.raises(UserError, match="scores: has no supervised token"):
        build(scores, tmp_path / "targets")


MUTATE = """
import sys
import numpy as np
from pathlib import Path
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.format.row_checks import violations

folder, count, seed = open_sealed(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
shard = folder.shards[-1]
path = folder.shard_path(shard)
whole = path.read_bytes()
rng = np.random.default_rng(seed)
before = peak()
refused = read = 0
special = np.array([0, 1, 0x7F, 0x80, 0xFF], np.uint8)
for number in range(count):
    data = np.frombuffer(whole, np.uint8).copy()
    kind = number % 4
    for _ in range(int(rng.integers(1, 8))):
        place = int(rng.integers(len(data)))
        if kind == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place : place + 8] = rng.choice(special, len(data[place : place + 8]))
        elif kind == 2:  # the tables at the end
            place = len(data) - 1 - int(rng.integers(min(len(data), 2500)))
            data[place] = rng.integers(256)
        else:
            size = int(rng.integers(1, 64))
            source = int(rng.integers(len(data) - size))
            place = int(rng.integers(len(data) - size))
            data[place : place + size] = data[source : source + size]
    path.write_bytes(data.tobytes())
    for reads_ids_alone in (False, True):
        try:
            if reads_ids_alone:
                folder.ids(shard)
            else:
                for batch in folder.batches(shard, verify=False):
                    list(violations(folder.stage, batch, folder.settings["vocab_size"]))
            read += 1
        except UserError as error:
            assert path.name in str(error) and len(str(error)) < 700, error
            refused += 1
path.write_bytes(whole)
print(refused)
print(read)
print(peak() - before)
"""


@pytest.mark.parametrize("folder", ["targets", "scores"])
def test_mutated_shards_crash_nothing(made: Path, tmp_path: Path, folder: str) -> None:
    own = Path(shutil.copytree(made / folder, tmp_path / folder))
    refused, read, memory = map(int, in_a_child(MUTATE, own, 600, 0))
    assert refused > 300
    assert refused + read == 1200
    assert memory < MOST_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["targets", "scores"])
def test_tens_of_thousands_of_mutated_shards_crash_nothing(
    made: Path, tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(made / folder, tmp_path / folder))
    refused, read, memory = map(int, in_a_child(MUTATE, own, 20_000, 1))
    with capsys.disabled():
        print(f"\n{folder}: {refused} refused, {read} read, {memory} MB")
    assert refused + read == 40_000
    assert memory < MOST_MEMORY


@pytest.mark.slow
def test_a_bomb_of_seven_gigabytes_is_not_set_off(own: Path) -> None:
    bomb(own, 7_000)
    (said,) = read_in_a_child(own)
    assert "unpacks to 7,0" in said[2]


def expanding(folder: Path, megabytes: int) -> int:
    """Scores whose entries are one byte wide and compress less than a hundredfold."""
    schema = open_sealed(folder).schema.arrow
    rng = np.random.default_rng(0)
    rows, size = 16, megabytes * 10**6 // 16
    noise = np.zeros(rows * size, np.uint8)
    noise[::100] = rng.integers(0, 255, len(noise[::100]))
    offsets = pa.array(np.arange(rows + 1) * size, pa.int32())
    columns = []
    for field in schema:
        if field.name == "id":
            columns.append(pa.array(["a"] * rows))
            continue
        wide = field.type.value_type.bit_width == 8
        values = pa.array(noise if wide else [], field.type.value_type)
        places = offsets if wide else pa.array([0] * (rows + 1), pa.int32())
        columns.append(pa.ListArray.from_arrays(places, values))
    path = folder / "shard-00000.arrow"
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(path), "w") as file,
        pa.ipc.new_file(file, schema, options=options) as writer,
    ):
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    reseal(folder)
    return path.stat().st_size


def test_a_batch_that_decodes_to_gigabytes_is_refused(own: Path) -> None:
    """Below the ratio that is refused: its bytes become wider numbers."""
    assert 3 * 110 * 10**6 / expanding(own, 110) < 100
    (said,) = read_in_a_child(own)
    assert "decodes to 4,4" in said[1]
    assert "decodes to 4,4" in said[2]


def test_more_rows_than_the_manifest_states_are_refused_at_once(own: Path) -> None:
    """There may be any number of record batches: they are not read to the last."""
    folder = open_sealed(own)
    path = folder.shard_path(0)
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    with pa.OSFile(str(path), "w") as file, pa.ipc.new_file(file, table.schema) as writer:
        for _ in range(50):
            writer.write_table(table)
    reseal(own)
    read: list[int] = []
    batches = open_sealed(own).batches(0)
    with pytest.raises(UserError, match="its manifest states"):
        read.extend(len(batch.ids) for batch in batches)
    assert len(read) == 1
