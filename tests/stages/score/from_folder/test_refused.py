"""What `qpipe score --at` refuses: folders, models, options."""

import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.shard_run import open_folder
from qpipe.stages.cli import cli
from qpipe.stages.engines.choose import make_scorer
from qpipe.stages.score.from_folder import score_at
from qpipe.trainer.models.files import find_model

from ....support.folders import seal_shards
from .folders import VOCAB, make_folder, scored_by_hand, settings


def test_a_token_that_the_model_lacks_is_refused(
    teacher: Path, tiny_model: Path, tmp_path: Path
) -> None:
    one = scored_by_hand("a", 60, 1)
    one.input_ids[5] = VOCAB
    at = make_folder(tmp_path / "at", tiny_model, [[one]], vocab_size=400)
    with pytest.raises(
        UserError, match=r"at: its examples hold token 320, .* teacher has 320 tokens: give"
    ):
        score_at(settings(teacher, at, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_example_that_is_too_long_is_refused(
    teacher: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model takes 256 tokens. The folder's limit alone, with shorter examples, is none."""
    for longest in (256, 257):
        shards = [[scored_by_hand("a", 30, 1)], [scored_by_hand("b", longest, 2)]]
        make_folder(tmp_path / f"at{longest}", tiny_model, shards, max_length=1000)
    with pytest.raises(UserError, match=r"at257: .* has 257 tokens, model teacher takes 256: .*"):
        score_at(settings(teacher, tmp_path / "at257", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    limits: list[int] = []
    monkeypatch.setattr(
        "qpipe.stages.score.stage.make_scorer",
        lambda model, started: limits.append(started.max_length) or make_scorer(model, started),
    )
    made = score_at(settings(teacher, tmp_path / "at256", tmp_path / "out")).manifest
    assert limits == [256]  # an engine is not started for more than its model takes
    assert (made.totals["tokens"], made.settings["max_length"]) == (286, 1000)


def test_another_tokenizer_is_refused(scores: Path, teacher: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    tokenizer = find_model(str(teacher)).tokenizer
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError) as refused:
        score_at(settings(other, scores, tmp_path / "out"))
    ours, theirs = find_model(str(other)).tokenizer_hash, find_model(str(teacher)).tokenizer_hash
    assert ours != theirs
    words = str(refused.value)
    assert f"tokenizer hash {theirs}, model other has {ours}: give a model" in words
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_refused_and_the_others_are_kept(
    scores: Path, teacher: Path, tmp_path: Path
) -> None:
    at = Path(shutil.copytree(scores, tmp_path / "at"))
    shard = at / "shard-00002.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"shard-00002\.arrow: damaged"):
        score_at(settings(teacher, at, tmp_path / "out"))
    assert (tmp_path / "out" / "shard-00000.json").exists()
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00002\.arrow: missing"):
        score_at(settings(teacher, at, tmp_path / "out"))
    shard.write_bytes(whole)
    assert score_at(settings(teacher, at, tmp_path / "out")).manifest.totals["rows"] == 6


def test_a_folder_that_is_no_sealed_score_folder_is_refused(
    scores: Path, teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="missing: no such folder"):
        score_at(settings(teacher, tmp_path / "missing", out))
    unsealed = Path(shutil.copytree(scores, tmp_path / "unsealed"))
    (unsealed / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a qpipe folder"):
        score_at(settings(teacher, unsealed, out))
    begun = read_manifest(scores).identity
    open_folder(tmp_path / "begun", begun)
    with pytest.raises(UserError, match="begun: not finished yet"):
        score_at(settings(teacher, tmp_path / "begun", out))
    described = begun.settings | {
        "method": "gift",
        "form": "live",
        "parameters": {},
        "residual": "base",
        "tail_shape": "student",
        "top_p": None,
    }
    seal_shards(tmp_path / "targets", "build-targets", described, [])
    with pytest.raises(UserError, match="targets: made by `qpipe build-targets`, but the output"):
        score_at(settings(teacher, tmp_path / "targets", out))
    assert not out.exists()


def test_the_folder_itself_is_no_place_for_the_output(
    scores: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is the folder of --at: give another --out"):
        settings(teacher, scores, scores / ".." / scores.name)


def words_of(*words: object) -> str:
    """What the command says when it refuses these words."""
    arguments = ["score", "--model", "no/such/model/at-all", "--out", "o", *map(str, words)]
    with pytest.raises(click.UsageError) as refused:
        cli.main(arguments, standalone_mode=False)
    return refused.value.format_message()


@pytest.mark.parametrize(
    "option",
    [
        ("--demonstrations", "chats.jsonl"),
        ("--max-length", 100),
        ("--too-long", "reject"),  # the default, but given
        ("--format", "alpaca"),
        ("--template", "none"),
        ("--supervise", "assistant"),
        ("--strict",),
        ("--shard-size", 512),
    ],
)
def test_how_rows_are_read_is_no_option_beside_at(
    option: tuple[object, ...], scores: Path, tmp_path: Path
) -> None:
    expected = f"{option[0]} requires --demonstrations and excludes --at: leave one out"
    assert words_of("--at", scores, *option) == expected
    config = tmp_path / "config.yaml"
    value = option[1] if len(option) > 1 else "true"
    config.write_text(f"{str(option[0]).removeprefix('--')}: {value}\n")
    assert words_of("--at", scores, "--config", config) == expected


def test_the_command_needs_demonstrations_or_a_folder() -> None:
    assert words_of() == "give either --demonstrations FILE or --at DIR"


@pytest.mark.parametrize("option", [{"top_k": 0}, {"gpu_memory_utilization": 1.5}])
def test_options_out_of_range_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is out of range"):
        settings(tmp_path, tmp_path / "at", tmp_path / "out", **option)


def test_more_gpus_for_an_engine_of_one_are_refused(
    teacher: Path, scores: Path, tmp_path: Path
) -> None:
    options = settings(teacher, scores, tmp_path / "out", tensor_parallel_size=4)
    with pytest.raises(
        UserError, match=r"--tensor-parallel-size 4: goes with vLLM, but --engine is transformers"
    ):
        score_at(options)
