"""What a folder says of itself, and what is said of a folder that cannot be used."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from msgspec.structs import replace
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import (
    Identity,
    first_difference,
    identity_schema,
    read_manifest,
)
from qpipe.pipeline.folders.sealed import SealedFolder
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.storage.json_files import json_bytes, parse_json, sha256_of_json

IDENTITY = Identity(
    stage="build-targets",
    settings={"method": "gift", "parameters": {"beta": 5.0}, "template_hash": None},
    inputs={"scores": "aa"},
    schema={"id": "string"},
)


@pytest.fixture
def sealed(undisturbed: Path, tmp_path: Path) -> Path:
    """A sealed folder of the toy's, to be damaged."""
    return Path(copytree(undisturbed, tmp_path / "sealed"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest by hand."""
    value = json.loads((folder / "manifest.json").read_text())
    change(value)
    (folder / "manifest.json").write_text(json.dumps(value))


def test_the_manifest_describes_the_folder(sealed: Path, toy: Any) -> None:
    manifest = read_manifest(sealed, "score")
    job = toy(sealed).job

    assert manifest.identity == job.identity
    assert manifest.fingerprint == job.identity.fingerprint
    assert manifest.settings == {"vocab_size": 100, "top_k": 5, "tokenizer_hash": "3fa9"}
    assert manifest.provenance == {"model": "toy"}
    assert manifest.parents == {}
    assert [entry.file for entry in manifest.shards] == [f"shard-0000{i}.arrow" for i in range(3)]
    assert [entry.rows for entry in manifest.shards] == [2, 1, 2]
    assert {entry.fingerprint for entry in manifest.shards} == {manifest.fingerprint}
    assert SealedFolder(sealed, manifest).schema == schema_of("score", 100)


def test_an_identity_has_one_fingerprint_whatever_the_order_of_its_names() -> None:
    settings = dict(reversed(IDENTITY.settings.items()))

    assert replace(IDENTITY, settings=settings).fingerprint == IDENTITY.fingerprint
    assert len(IDENTITY.fingerprint) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "score"},
        {"settings": {}},
        {"settings": IDENTITY.settings | {"parameters": {"beta": 5.5}}},
        {"inputs": {"scores": "ab"}},
        {"inputs": {"other": "aa"}},
        {"schema": {"id": "int32"}},
        {"format_version": 1},
    ],
)
def test_everything_in_an_identity_counts_in_its_fingerprint(change: dict[str, Any]) -> None:
    assert replace(IDENTITY, **change).fingerprint != IDENTITY.fingerprint


def test_the_vocabulary_of_four_byte_ids_has_another_schema() -> None:
    narrow, wide = (identity_schema(schema_of("score", size)) for size in (2**16, 2**16 + 1))

    assert {name for name in narrow if narrow[name] != wide[name]} == {"input_ids", "topk_ids"}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"stage": "score"}, 'stage is "score" there and "build-targets" now'),
        ({"inputs": {"scores": "bb"}}, 'inputs.scores is "bb" there and "aa" now'),
        ({"inputs": {"more": "bb", "scores": "aa"}}, 'inputs.more is "bb" there and absent now'),
        (
            {"settings": IDENTITY.settings | {"parameters": {"beta": 20.0}}},
            "settings.parameters.beta is 20.0 there and 5.0 now",
        ),
        (
            {"settings": IDENTITY.settings | {"parameters": {"lam": 0.1, "beta": 5.0}}},
            "settings.parameters.lam is 0.1 there and absent now",
        ),
        (
            {"settings": IDENTITY.settings | {"template_hash": "cc"}},
            'settings.template_hash is "cc" there and null now',
        ),
        ({}, "nothing differs"),
    ],
)
def test_the_first_difference_is_named_with_both_values(found: dict[str, Any], words: str) -> None:
    assert first_difference(IDENTITY, replace(IDENTITY, **found)) == words


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"beta": 5}, {"beta": 5.0}),
        ({"beta": True}, {"beta": 1}),
        ({"beta": None}, {}),
        ({"beta": {}}, {}),
    ],
    ids=["int and float", "bool and int", "None and absent", "empty and absent"],
)
def test_identities_of_different_fingerprints_have_a_difference(
    wanted: dict[str, Any], found: dict[str, Any]
) -> None:
    left, right = replace(IDENTITY, settings=wanted), replace(IDENTITY, settings=found)

    assert left.fingerprint != right.fingerprint
    assert first_difference(left, right) != "nothing differs"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such folder"):
        read_manifest(tmp_path / "gone")
    with pytest.raises(UserError, match="gone: no such folder"):
        list(read_scores(tmp_path / "gone"))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match="file: is a file, not a folder"):
        read_manifest(tmp_path / "file")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")

    with pytest.raises(UserError, match=r"not a qpipe folder, it has no manifest\.json"):
        read_manifest(tmp_path)


def test_an_unsealed_folder_says_what_to_run(toy: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path / "scores", fail_at=1).run()

    with pytest.raises(
        UserError, match="scores: not finished yet: run `qpipe score` with the same options again"
    ):
        list(read_scores(tmp_path / "scores"))


def test_the_wrong_stage_is_refused_with_both_named(sealed: Path) -> None:
    with pytest.raises(
        UserError,
        match="made by `qpipe score`, but the output of `qpipe build-targets` is needed here",
    ):
        read_manifest(sealed, "build-targets")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"{}", b"null", b"7", b'"text"', b"\xff\xfe\x00", b'{"identity": {}}'],
)
def test_a_damaged_manifest_is_refused_by_name(sealed: Path, data: bytes) -> None:
    (sealed / "manifest.json").write_bytes(data)

    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        read_manifest(sealed)


@pytest.mark.parametrize(
    "field", ["identity", "fingerprint", "totals", "shards", "parents", "provenance"]
)
def test_a_manifest_without_one_of_its_fields_is_refused(sealed: Path, field: str) -> None:
    edit(sealed, lambda manifest: manifest.pop(field))

    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        read_manifest(sealed)


def test_frequent_ids_are_missed_under_a_seal_that_fits(sealed: Path) -> None:
    path = sealed / "manifest.json"
    value = json.loads(path.read_bytes())
    del value["frequent_ids"], value["seal"]
    path.write_bytes(json_bytes(value | {"seal": sha256_of_json(value)}))

    with pytest.raises(UserError, match="frequent_ids"):
        read_manifest(sealed)


@pytest.mark.parametrize("field", ["identity", "fingerprint", "shards"])
@pytest.mark.parametrize("value", [None, 3, [3], {"a": 1}])
def test_a_manifest_with_a_field_of_another_kind_is_refused(
    sealed: Path, field: str, value: Any
) -> None:
    edit(sealed, lambda manifest: manifest.update({field: value}))

    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        read_manifest(sealed)


def test_an_unknown_field_of_a_manifest_is_refused(sealed: Path) -> None:
    edit(sealed, lambda manifest: manifest.update(extra=1))

    with pytest.raises(UserError, match=r"manifest\.json: damaged, not a manifest"):
        read_manifest(sealed)


def test_a_setting_changed_by_hand_is_noticed(sealed: Path) -> None:
    edit(sealed, lambda manifest: manifest["identity"]["settings"].update(top_k=7))

    with pytest.raises(
        UserError, match="damaged or changed, its fingerprint does not match its settings"
    ):
        read_manifest(sealed)


@pytest.mark.parametrize("version", [0, 1, 2, 5, "3", None, [3], 3.0, True])
def test_another_format_version_is_refused_with_both_named(sealed: Path, version: Any) -> None:
    edit(sealed, lambda manifest: manifest["identity"].update(format_version=version))

    with pytest.raises(
        UserError,
        match=re.escape(f"format version {version!r}, this qpipe reads 3 and 4: make it again"),
    ):
        read_manifest(sealed)


def test_a_format_version_of_any_length_is_one_short_line(sealed: Path) -> None:
    edit(sealed, lambda manifest: manifest["identity"].update(format_version=[["v" * 1000] * 9]))

    with pytest.raises(UserError, match="this qpipe reads 3 and 4") as refused:
        read_manifest(sealed)
    assert len(str(refused.value)) < 400


def test_an_unfinished_folder_of_another_format_version_is_refused(
    toy: Any, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path / "scores", fail_at=1).run()
    plan = tmp_path / "scores" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"format_version": 1}))

    with pytest.raises(
        UserError,
        match="format version 1, this qpipe reads 3 and 4: make it again with `qpipe score`",
    ):
        toy(tmp_path / "scores").run()


def test_half_a_character_is_damage(tmp_path: Path) -> None:
    """It could be neither printed nor written again."""
    path = tmp_path / "shard-00000.json"
    for spelt in (rb'{"a": "\ud800"}', rb'{"a": "\\\uDBff"}'):
        with pytest.raises(UserError, match="half a character"):
            parse_json(path, spelt)
    assert parse_json(path, rb'{"a": "C:\\ud800 \u000a"}') == {"a": "C:\\ud800 \n"}
