"""`qpipe verify` from the command line: sound folders pass, every kind of damage is named."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from qpipe.pipeline import read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import Manifest, read_manifest, totals_of, write_manifest
from qpipe.pipeline.folders.row_index import INDEX, read_index, write_index
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.folders.shards import read_sidecar, write_sidecar
from qpipe.pipeline.format.packing import PRECISIONS
from qpipe.pipeline.methods import choose
from qpipe.pipeline.storage.json_files import write_json
from qpipe.stages import cli

from ...support.examples import TOP_K, VOCAB, random_scored
from ...support.folders import SCORES, build, reseal, rewrite, seal, seal_scores

pytestmark = pytest.mark.usefixtures("no_sync")

Verify = Callable[[Path], tuple[int, str]]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, of five examples and four. Not to be changed."""
    return seal_scores(tmp_path_factory.mktemp("made") / "scores")


@pytest.fixture(scope="module")
def targets(scores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return build(scores, tmp_path_factory.mktemp("made") / "targets")


@pytest.fixture
def own(targets: Path, tmp_path: Path) -> Path:
    """Targets to be damaged."""
    return Path(shutil.copytree(targets, tmp_path / "targets"))


@pytest.fixture
def own_scores(scores: Path, tmp_path: Path) -> Path:
    """Scores to be damaged."""
    return Path(shutil.copytree(scores, tmp_path / "scores"))


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Verify:
    """Runs `qpipe verify`: the exit status, and what was printed."""

    def run(folder: Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["qpipe", "verify", str(folder)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out + err

    return run


def test_a_sound_score_folder_passes(verify: Verify, scores: Path) -> None:
    status, said = verify(scores)

    assert status == 0
    assert "all well: 9 demonstrations, 36 supervised tokens, 2 shard(s)" in said


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sound_targets_of_any_precision_pass(
    verify: Verify, scores: Path, tmp_path: Path, precision: Any
) -> None:
    assert verify(build(scores, tmp_path / "out", precision=precision))[0] == 0


@pytest.mark.parametrize(
    ("method", "form"),
    [
        ("sft", "live"),
        ("dft", "frozen-target"),
        ("dft", "frozen-weight"),
        ("sft+kl", "frozen-target"),
        ("label-smoothing", "frozen-target"),
        ("iw-sft", "live"),
        ("gem", "live"),
        ("target-sft", "live"),
    ],
)
def test_sound_targets_of_any_method_pass(
    verify: Verify, scores: Path, tmp_path: Path, method: str, form: str
) -> None:
    choice = choose(method, form)
    teacher = (scores,) if choice.needs_teacher else ()
    folder = build(scores, tmp_path / "out", choice, teacher=teacher)
    status, said = verify(folder)
    assert (status, "all well" in said) == (0, True), said


def test_a_folder_that_may_only_be_read_passes(verify: Verify, own: Path) -> None:
    for path in (*own.iterdir(), own):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(own.iterdir())
    assert verify(own)[0] == 0
    assert sorted(own.iterdir()) == before
    own.chmod(0o755)


def refused(verify: Verify, folder: Path, *words: str) -> str:
    status, said = verify(folder)
    assert status == 2
    for each in words:
        assert each in said
    return said


def test_what_is_no_sealed_folder_is_refused_in_one_line(
    verify: Verify, own: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    refused(verify, tmp_path / "gone", "gone: no such folder")
    refused(verify, tmp_path / "file", "file: is a file, not a folder")
    refused(verify, tmp_path / "empty", "it has no manifest.json")
    identity = read_manifest(own).identity
    (own / "manifest.json").unlink()
    write_json(own / "plan.json", identity)
    said = refused(verify, own, "not finished yet: run `qpipe build-targets`")
    assert said.count("\n") == 1


def test_a_flipped_bit_of_a_shard_is_named(verify: Verify, own: Path) -> None:
    path = own / "shard-00001.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    refused(verify, own, "shard-00001.arrow: its hash is not the manifest's")


def test_a_missing_or_shortened_shard_is_named_and_the_rest_is_checked(
    verify: Verify, own: Path
) -> None:
    (own / "shard-00000.arrow").unlink()
    path = own / "shard-00001.arrow"
    path.write_bytes(path.read_bytes()[:-9])
    said = refused(verify, own, "shard-00000.arrow: missing", "shard-00001.arrow: its hash is not")
    assert "shard-00001.arrow: damaged: it does not end as an Arrow file" in said


@pytest.mark.parametrize("content", [None, b"", b"{}\n"])
def test_missing_or_changed_sidecars_are_named(
    verify: Verify, own: Path, content: bytes | None
) -> None:
    sidecar = own / "shard-00001.json"
    sidecar.unlink()
    if content is not None:
        sidecar.write_bytes(content)
    what = (
        "missing"
        if content is None
        else "differs from the entry of shard-00001.arrow in the manifest"
    )
    refused(verify, own, f"shard-00001.json: {what}", "1 problem(s)")


def test_missing_or_changed_rejects_are_named(verify: Verify, own_scores: Path) -> None:
    path = own_scores / "rejects.jsonl"
    path.write_text(path.read_text().replace("3", "4"))
    refused(verify, own_scores, "rejects.jsonl: differs from the rejects in the manifest")
    path.unlink()
    refused(verify, own_scores, "rejects.jsonl: missing")


def test_strays_are_named(verify: Verify, own: Path) -> None:
    shutil.copy(own / "shard-00000.arrow", own / "shard-00002.arrow")
    refused(verify, own, "shard-00002.arrow: not in the manifest", "1 problem(s)")


def test_a_manifest_changed_by_hand_is_refused(verify: Verify, own: Path) -> None:
    text = (own / "manifest.json").read_text()
    (own / "manifest.json").write_text(text.replace('"made": "up"', '"made": "UP"'))
    assert text != (own / "manifest.json").read_text()
    refused(verify, own, "its seal does not match its content")
    (own / "manifest.json").write_text(text + "\n")
    refused(verify, own, "its seal does not match its content")


def change_first(name: str, row: int, value: Any) -> Callable[[dict[str, list[Any]]], Any]:
    def change(columns: dict[str, list[Any]]) -> None:
        columns[name][row][0] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("topk_log_probs", 0.5, "column topk_log_probs is not a log-probability"),
        ("topk_log_probs", float("nan"), "column topk_log_probs is not a log-probability"),
        ("tail_mass", 0.9, "column tail_mass does not add up to 1"),
        ("observed_ranks", 0, "column observed_ranks is not a rank"),
        ("token_weights", float("inf"), "column token_weights is not a weight"),
        ("positions", 3, "column positions does not ascend"),
        ("positions", 99, "column positions is outside"),
        ("topk_ids", 65_000, "column topk_ids is outside the vocabulary"),
        ("input_ids", VOCAB, "column input_ids is outside the vocabulary"),
        ("counts", TOP_K - 1, "column counts does not add up"),
        ("counts", None, "column counts has null values"),
    ],
)
def test_a_wrong_value_is_named_with_shard_row_and_column(
    verify: Verify, own_scores: Path, name: str, value: Any, words: str
) -> None:
    """Row 2 of the second shard is example 7; hashes and seal are made to fit."""
    rewrite(own_scores, 1, change_first(name, 2, value))
    reseal(own_scores)
    said = refused(verify, own_scores, words)
    (line,) = [each for each in said.splitlines() if words in each]
    assert "shard-00001.arrow" in line
    assert "row 2 ('chats:7')" in line


def test_rows_are_counted_over_the_record_batches_of_a_shard(
    verify: Verify, tmp_path: Path
) -> None:
    examples = [dataclasses.replace(random_scored(3), id=f"e{number}") for number in range(70)]
    examples[66].token_weights[1] = -1
    folder = seal(tmp_path / "scores", "score", SCORES, [examples])
    refused(verify, folder, "row 66 ('e66'): column token_weights is not a weight")


@pytest.mark.parametrize("name", ["rows", "tokens", "positions", "entries"])
def test_counts_that_the_shard_does_not_hold_are_named(
    verify: Verify, own: Path, name: str
) -> None:
    def more(manifest: Manifest) -> Manifest:
        first, *rest = manifest.shards
        return replace(manifest, shards=[replace(first, **{name: getattr(first, name) + 1}), *rest])

    reseal(own, more)
    refused(verify, own, "shard-00000.arrow: holds", f"{name}, its manifest states", "1 problem(s)")


def test_a_size_that_the_shard_does_not_have_is_named(verify: Verify, own: Path) -> None:
    manifest = read_manifest(own)
    first, *rest = manifest.shards
    entries = [replace(first, bytes=first.bytes + 1), *rest]
    write_sidecar(own, 0, entries[0])
    write_manifest(own, replace(manifest, shards=entries, totals=totals_of(entries)))
    refused(verify, own, "shard-00000.arrow: has", "in the manifest", "1 problem(s)")


def test_a_schema_that_is_not_that_of_the_settings_is_named(verify: Verify, own: Path) -> None:
    def change(manifest: Manifest) -> Manifest:
        schema = manifest.identity.schema | {"id": "int32"}
        return replace(manifest, identity=replace(manifest.identity, schema=schema))

    reseal(own, change)
    refused(verify, own, "manifest.json: its schema does not match its settings", "1 problem(s)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parents: parents.pop("scores"), "parents: not the same names as in inputs"),
        (
            lambda parents: parents.update(teacher=parents["scores"]),
            "not the same names as in inputs",
        ),
        (
            lambda parents: parents["scores"]["identity"]["settings"].update(top_k=13),
            "parents, 'scores': its fingerprint is not the one in inputs",
        ),
        (lambda parents: parents.update(scores=3), "parents: not the identities of folders"),
        (lambda parents: parents["scores"].pop("parents"), "parents: not the identities"),
        (lambda parents: parents["scores"].update(parents=[3]), "parents: not the identities"),
        (lambda parents: parents["scores"]["identity"].pop("stage"), "not the identities"),
        (
            lambda parents: parents["scores"]["parents"].update(
                at=json.loads(json.dumps(parents["scores"]))
            ),
            "parents, 'at': its fingerprint is not the one in inputs",
        ),
    ],
)
def test_a_chain_of_parents_that_does_not_hold_is_named(
    verify: Verify, own: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    def with_parents(manifest: Manifest) -> Manifest:
        parents = json.loads(json.dumps(manifest.parents))
        change(parents)
        return replace(manifest, parents=parents)

    reseal(own, with_parents)
    refused(verify, own, "manifest.json: ", words)


def test_no_more_than_twenty_lines_are_printed_and_all_are_counted(
    verify: Verify, own: Path
) -> None:
    for index in range(30):
        (own / f"shard-1{index:04d}.arrow").write_bytes(b"")
    said = refused(verify, own, "30 problem(s): restore it, or make it again")
    assert said.count("not in the manifest") == 20


# Folders of other versions


@pytest.mark.parametrize(
    ("stage", "version"),
    [
        ("score", 2),
        *(("build-targets", each) for each in (0, 1, 2, 3, 5, "4", None, [], 2.5, True)),
    ],
)
def test_a_folder_of_another_version_is_refused_with_the_way_out(
    verify: Verify, own: Path, own_scores: Path, stage: str, version: Any
) -> None:
    folder, present = (own_scores, "3 and 4") if stage == "score" else (own, 4)
    reseal(folder, lambda m: replace(m, identity=replace(m.identity, format_version=version)))
    words = (
        f"manifest.json: format version {version!r}, this qpipe reads {present}: make it again "
        f"with `qpipe {stage}`, or use the qpipe that made it"
    )
    assert refused(verify, folder, words).count("\n") == 1


def test_a_sidecar_without_a_seal_is_named(verify: Verify, own: Path) -> None:
    write_json(own / "shard-00000.json", read_manifest(own).shards[0])
    refused(verify, own, "shard-00000.json: differs from the entry of", "1 problem(s)")


# Readers


def test_readers_compare_hashes_unless_they_are_told_not_to(own: Path) -> None:
    """The metadata's padding is no row's: a bit there changes nothing but the hash."""
    from qpipe.trainer.data.stream import open_streams

    wanted = [each.id for each in read_targets(own)]
    path = own / "shard-00000.arrow"
    data = bytearray(path.read_bytes())
    assert data[6:8] == b"\0\0"
    data[7] = 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00000\.arrow: damaged, its hash is not"):
        list(read_targets(own))
    stream, _ = open_streams(open_sealed(own), 0.0)
    with pytest.raises(UserError, match=r"shard-00000\.arrow: damaged, its hash is not"):
        next(stream.in_order())
    assert [each.id for each in read_targets(own, verify=False)] == wanted
    stream, _ = open_streams(open_sealed(own), 0.0, verify=False)
    assert len(stream) == 8


def test_what_moves_a_cursor_is_not_printed(verify: Verify, own: Path) -> None:
    folder = own.rename(own.with_name("a\x1b[31m\nb"))
    (folder / "manifest.json").unlink()
    said = refused(verify, folder, r"a\x1b[31m b: not a qpipe folder")
    assert said.count("\n") == 1


def test_an_index_or_an_outline_that_is_not_that_of_the_rows_is_named(
    verify: Verify, own: Path
) -> None:
    manifest = read_manifest(own)
    (rows,) = read_index(own, manifest)
    lied = dataclasses.replace(rows, id_hashes=rows.id_hashes[::-1])
    write_manifest(own, replace(manifest, index=write_index(own, [lied])))
    refused(verify, own, "index.arrow: differs from the rows of the shards", "1 problem(s)")
    (own / INDEX).write_bytes(b"")
    refused(verify, own, "index.arrow: damaged, its hash is not the manifest's", "1 problem(s)")
    write_manifest(own, replace(manifest, index=write_index(own, [rows])))
    entry, outline = read_sidecar(own, 0)
    assert outline is not None
    write_sidecar(own, 0, entry, dataclasses.replace(outline, tokens=outline.tokens + 1))
    refused(verify, own, "shard-00000.json: its outline differs from the rows", "1 problem(s)")
