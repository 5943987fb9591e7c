"""Hashes of models and tokenizers: what they depend on, and what not."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from qpipe.pipeline.folders.provenance import package_versions, tokenizer_hash, weights_hash
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PIECES = ["<unk>", "a", "b", "c", "d", "ab", "cd", "abc", "abcd"]
MERGES = [("a", "b"), ("c", "d"), ("ab", "c"), ("ab", "cd")]


def small_tokenizer(
    pieces: Iterable[str] = PIECES, merges: Iterable[tuple[str, str]] = MERGES
) -> PreTrainedTokenizerFast:
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    fast.pad_token = "<end>"
    return fast


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "model-00001.safetensors").write_bytes(b"first weights")
    (folder / "model-00002.safetensors").write_bytes(b"second weights")
    return folder


def test_a_tokenizer_has_the_same_hash_each_time() -> None:
    first, second = tokenizer_hash(small_tokenizer()), tokenizer_hash(small_tokenizer())

    assert first == second
    assert len(first) == 64


def test_saving_and_loading_a_tokenizer_leaves_its_hash(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    wanted = tokenizer_hash(tokenizer)
    for place in ("one", "two"):  # saved again from what was loaded
        tokenizer.save_pretrained(tmp_path / place)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / place)

        assert tokenizer_hash(tokenizer) == wanted


def test_calls_that_truncate_and_pad_leave_the_hash() -> None:
    tokenizer = small_tokenizer()
    wanted = tokenizer_hash(tokenizer)
    short = tokenizer("ab cd ab cd", truncation=True, max_length=2)["input_ids"]
    padded = tokenizer(["ab", "ab cd cd"], padding=True)["input_ids"]

    assert len(short) == 2
    assert len(padded[0]) == 3
    assert tokenizer.backend_tokenizer.padding is not None
    assert tokenizer_hash(tokenizer) == wanted


def test_a_chat_template_is_no_part_of_the_tokenizer_hash() -> None:
    tokenizer = small_tokenizer()
    wanted = tokenizer_hash(tokenizer)
    tokenizer.chat_template = "{{ messages }}"

    assert tokenizer_hash(tokenizer) == wanted


def test_one_token_renamed_changes_the_hash() -> None:
    pieces = [*PIECES, "e"]
    other = [*PIECES, "f"]

    assert tokenizer_hash(small_tokenizer(pieces)) != tokenizer_hash(small_tokenizer(other))


def test_two_tokens_that_change_places_change_the_hash() -> None:
    swapped = ["<unk>", "b", "a", *PIECES[3:]]

    assert tokenizer_hash(small_tokenizer(swapped)) != tokenizer_hash(small_tokenizer())


def test_one_merge_fewer_changes_the_hash() -> None:
    assert tokenizer_hash(small_tokenizer(merges=MERGES[:-1])) != tokenizer_hash(small_tokenizer())


def test_the_order_of_the_merges_changes_the_hash() -> None:
    reordered = [MERGES[1], MERGES[0], *MERGES[2:]]

    assert tokenizer_hash(small_tokenizer(merges=reordered)) != tokenizer_hash(small_tokenizer())


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", normalizers.Lowercase()),
        ("pre_tokenizer", pre_tokenizers.ByteLevel()),
        ("post_processor", processors.TemplateProcessing("<end> $A", None, [("<end>", 9)])),
    ],
)
def test_another_rule_changes_the_hash(part: str, value: Any) -> None:
    tokenizer = small_tokenizer()
    setattr(tokenizer.backend_tokenizer, part, value)

    assert tokenizer_hash(tokenizer) != tokenizer_hash(small_tokenizer())


def test_an_added_token_changes_the_hash() -> None:
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<tool>"], special_tokens=True)

    assert tokenizer_hash(tokenizer) != tokenizer_hash(small_tokenizer())


def test_a_models_hash_does_not_depend_on_its_place(model_folder: Path, tmp_path: Path) -> None:
    moved = Path(copytree(model_folder, tmp_path / "elsewhere" / "named otherwise"))

    assert weights_hash(moved) == weights_hash(model_folder)


@pytest.mark.parametrize("name", ["config.json", "model-00001.safetensors"])
def test_one_byte_of_a_model_changes_its_hash(model_folder: Path, name: str) -> None:
    before = weights_hash(model_folder)
    data = bytearray((model_folder / name).read_bytes())
    data[0] ^= 1
    (model_folder / name).write_bytes(data)

    assert weights_hash(model_folder) != before


def test_weights_that_change_names_change_the_hash(model_folder: Path) -> None:
    before = weights_hash(model_folder)
    (model_folder / "model-00002.safetensors").rename(model_folder / "model-00003.safetensors")

    assert weights_hash(model_folder) != before


@pytest.mark.parametrize("name", ["more.safetensors", "pytorch_model.bin", "a.gguf", "b.pth"])
def test_another_file_of_weights_changes_the_hash(model_folder: Path, name: str) -> None:
    before = weights_hash(model_folder)
    (model_folder / name).write_bytes(b"")

    assert weights_hash(model_folder) != before


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "generation_config.json"])
def test_what_is_no_weight_leaves_the_hash(model_folder: Path, name: str) -> None:
    before = weights_hash(model_folder)
    (model_folder / name).write_text("{}")

    assert weights_hash(model_folder) == before


def test_a_model_in_the_hubs_cache_has_the_hash_of_a_plain_copy(
    model_folder: Path, tmp_path: Path
) -> None:
    blobs = tmp_path / "cache" / "blobs"
    snapshot = tmp_path / "cache" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model_folder.iterdir():
        digest = hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1
        blob = blobs / digest(path.read_bytes()).hexdigest()  # as the hub names small files too
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blob)

    assert weights_hash(snapshot) == weights_hash(model_folder)


def test_a_link_to_weights_of_a_plain_name_is_hashed_by_content(
    model_folder: Path, tmp_path: Path
) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in model_folder.iterdir():
        (linked / path.name).symlink_to(path)

    assert weights_hash(linked) == weights_hash(model_folder)


def test_package_versions_lists_those_that_are_installed() -> None:
    found = package_versions("pytest", "no-such-package-at-all", "pyarrow")

    assert found == {"pytest": pytest.__version__, "pyarrow": __import__("pyarrow").__version__}
