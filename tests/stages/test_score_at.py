"""`qpipe score --at`: another model's scores at a score folder's own examples and ids."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.manifest import Identity, identity_schema, read_manifest
from qpipe.pipeline.records import Example, ScoredExample
from qpipe.pipeline.runner import Job, ShardRun, open_folder
from qpipe.pipeline.schema import schema_of
from qpipe.pipeline.shards import ShardContent, batches_of
from qpipe.stages.cli import cli
from qpipe.stages.lineage import described
from qpipe.stages.score_at import ScoreAtSettings, score_at
from qpipe.stages.scorers import base
from qpipe.stages.scorers.base import (
    GivenIds,
    Scorer,
    ScorerSettings,
    choose_engine,
    make_scorer,
    with_given,
)
from qpipe.stages.scorers.base import scored as pack
from qpipe.stages.scorers.transformers_model import TransformersScorer
from qpipe.trainer.models import find_model

QPIPE = Path(sys.executable).with_name("qpipe")
VOCAB = 320
TOLERANCE = 1e-4  # nats; float32 against float64

Dense = Callable[[Example], NDArray[np.float64]]


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


# --- a score folder, made by hand so that it holds what a test needs ---


def scored_by_hand(
    name: str, tokens: int, seed: int, largest: int = VOCAB - 1, k: int = 6
) -> ScoredExample:
    """An example with random ids, 1 to k at each position, and weights other than 1."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(0, VOCAB, tokens).astype(np.int32)
    positions = np.sort(rng.choice(np.arange(1, tokens), min(tokens - 1, 12), replace=False))
    N = len(positions)
    counts_N = rng.integers(1, k + 1, N)
    ids = [rng.choice(largest + 1, size, replace=False) for size in counts_N]
    return ScoredExample(
        id=name,
        input_ids=input_ids,
        positions=positions.astype(np.int32),
        observed_log_probs=np.full(N, -1.0, np.float32),
        observed_ranks=np.ones(N, np.int32),
        counts=counts_N.astype(np.int32),
        topk_ids=np.concatenate(ids).astype(np.int32),
        topk_log_probs=np.full(counts_N.sum(), -9.0, np.float32),
        tail_mass=np.full(N, 0.5, np.float32),
        token_weights=rng.random(N).astype(np.float32),
    )


def make_folder(
    folder: Path, model: Path, shards: Sequence[Sequence[ScoredExample]], **settings: Any
) -> Path:
    """Seal a score folder of these shards, as if made with the model's tokenizer."""
    own = {
        "weights_hash": "of the base",
        "tokenizer_hash": find_model(str(model)).tokenizer_hash,
        "vocab_size": VOCAB,
        "engine": "vllm",
        "dtype": "bfloat16",
        "top_k": 6,
        "max_length": 200,
        "too_long": "cut",
        "format": "alpaca",
        "template_hash": "of the template",
        "supervise": "last",
        "shard_size": 3,
    } | settings
    schema = schema_of("score", own["vocab_size"])
    identity = Identity("score", own, {"chats.jsonl": "0123"}, identity_schema(schema))
    job = Job(folder, schema, identity, parents={}, provenance={"model": "base"})
    assert open_folder(folder, identity) is None
    run = ShardRun(job)
    contents = [ShardContent(batches_of(schema, shard)) for shard in shards]
    for _ in run.shards([(i, lambda content=c: content) for i, c in enumerate(contents)]):
        pass
    run.seal()
    return folder


SHARDS = [
    [scored_by_hand("a", 40, 1), scored_by_hand("b", 2, 2), scored_by_hand("c", 200, 3)],
    [],  # all of its demonstrations were rejected
    [scored_by_hand("d", 17, 4), scored_by_hand("e", 90, 5)],
    [scored_by_hand("f", 33, 6)],
]


def another_model(folder: Path, like: Path, seed: int, vocab_size: int = VOCAB) -> Path:
    """A model of the same form and tokenizer, with weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(like, folder)
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(like, vocab_size=vocab_size)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return another_model(tmp_path_factory.mktemp("models") / "teacher", tiny_model, seed=1)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder of the base's scores. Not to be changed."""
    return make_folder(tmp_path_factory.mktemp("base") / "scores", tiny_model, SHARDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher: Path, scores: Path) -> Path:
    """The teacher's scores at that folder, made in one go. Not to be changed."""
    out = tmp_path_factory.mktemp("made") / "out"
    score_at(settings(teacher, scores, out))
    return out


def settings(model: Path, at: Path, out: Path, **options: Any) -> ScoreAtSettings:
    given = {"engine": "transformers", "top_k": 5} | options
    return ScoreAtSettings(model=str(model), at=at, out=out, **given)


@pytest.fixture(scope="module")
def dense(teacher: Path) -> Dense:
    """The teacher's log-probabilities [N, V], in float64 throughout."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()

    @torch.inference_mode()
    def log_probs(one: Example) -> NDArray[np.float64]:
        logits_TV = model(torch.from_numpy(one.input_ids.astype(np.int64))[None]).logits[0]
        return logits_TV[one.positions - 1].log_softmax(-1).numpy()

    return log_probs


def by_position(values: NDArray[Any], counts: NDArray[np.int32]) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(counts)[:-1])


def check_union(
    result: ScoredExample,
    counts: NDArray[np.int32],
    ids: NDArray[np.int32],
    dense_NV: NDArray[np.float64],
    top_k: int,
) -> None:
    """The entries are the top k and the given ids, in order, each with its own probability."""
    assert len(result.counts) == len(dense_NV) == len(counts)
    entries = zip(
        by_position(result.topk_ids, result.counts),
        by_position(result.topk_log_probs, result.counts),
        by_position(ids, counts),
        result.tail_mass,
        dense_NV,
        strict=True,
    )
    for stored, log_probs, given, tail, dense_V in entries:
        top = np.argsort(-dense_V)[:top_k]
        assert len(set(stored.tolist())) == len(stored)
        assert set(stored.tolist()) == set(top.tolist()) | set(given.tolist())
        assert (np.diff(log_probs) <= 0).all()
        np.testing.assert_allclose(log_probs, dense_V[stored], atol=TOLERANCE)
        assert tail == pytest.approx(1 - np.exp(dense_V[stored]).sum(), abs=1e-5)
        assert tail >= 0


# --- the folder ---


def test_the_folder_holds_the_union_at_the_very_examples(
    made: Path, scores: Path, dense: Dense
) -> None:
    results, examples = list(read_scores(made)), list(read_scores(scores))
    assert [one.id for one in results] == list("abcdef")
    for result, one in zip(results, examples, strict=True):
        np.testing.assert_array_equal(result.input_ids, one.input_ids)
        np.testing.assert_array_equal(result.positions, one.positions)
        np.testing.assert_array_equal(result.token_weights, one.token_weights)
        dense_NV = dense(one)
        check_union(result, one.counts, one.topk_ids, dense_NV, top_k=5)
        observed_N = dense_NV[np.arange(len(dense_NV)), one.observed_ids]
        np.testing.assert_allclose(result.observed_log_probs, observed_N, atol=TOLERANCE)
    counts = np.concatenate([result.counts for result in results])
    assert counts.min() < 11 == counts.max()  # from some that overlap to none that does


def test_the_manifest_says_what_it_was_made_of(made: Path, scores: Path, teacher: Path) -> None:
    manifest, at = read_manifest(made), read_manifest(scores)
    model = find_model(str(teacher))
    assert manifest.settings == at.settings | {
        "weights_hash": model.weights_hash(),
        "engine": "transformers",
        "dtype": "float32",
        "top_k": 5,
    }
    assert manifest.identity.inputs == {"at": at.fingerprint}
    assert manifest.parents["at"]["identity"]["inputs"] == {"chats.jsonl": "0123"}
    assert [shard.rows for shard in manifest.shards] == [3, 0, 2, 1]
    results = list(read_scores(made))
    assert (manifest.totals["read"], manifest.totals["rejected"]) == (6, 0)
    for name, column, sign in (
        ("observed_nll", "observed_log_probs", -1),
        ("tail_mass", "tail_mass", 1),
    ):
        total = sign * sum(getattr(one, column).sum(dtype=np.float64) for one in results)
        assert manifest.totals["sums"][name] == pytest.approx(total, rel=1e-9)


def test_the_support_becomes_common_when_the_base_is_scored_at_it(
    made: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """A folder made with --at is one that another may be made at; the gathered ids come along."""
    score_at(settings(tiny_model, made, tmp_path / "out", top_k=1))
    for back, there in zip(read_scores(tmp_path / "out"), read_scores(made), strict=True):
        pairs = zip(
            by_position(back.topk_ids, back.counts),
            by_position(there.topk_ids, there.counts),
            strict=True,
        )
        assert all(set(ids.tolist()) <= set(own.tolist()) for own, ids in pairs)
        assert (back.counts - there.counts).max() <= 1  # its own mode, where that is new


def test_targets_are_built_of_it(made: Path, tmp_path: Path) -> None:
    words = ["build-targets", "--scores", str(made), "--out", str(tmp_path / "targets")]
    cli.main(words, standalone_mode=False)
    built = read_manifest(tmp_path / "targets", "build-targets").totals
    assert built["positions"] == read_manifest(made).totals["positions"]


def test_a_second_run_changes_nothing(made: Path, scores: Path, teacher: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert score_at(settings(teacher, scores, made)).was_done
    assert files == {path: path.stat().st_mtime_ns for path in made.iterdir()}
    with pytest.raises(UserError, match="top_k is 5 there and 6 now"):
        score_at(settings(teacher, scores, made, top_k=6))


def test_another_folder_of_the_same_settings_is_another_input(
    made: Path, teacher: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = make_folder(tmp_path / "other", tiny_model, SHARDS, supervise="all")
    with pytest.raises(UserError, match=r"inputs\.at is"):
        score_at(settings(teacher, other, made))


def test_a_run_that_breaks_off_goes_on_where_it_was(
    made: Path, scores: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    scored: list[str] = []
    score_batch = TransformersScorer._score_batch

    def break_off(self: Any, batch: Any, *rest: Any) -> Any:
        if "d" in [one.id for one in batch] and "d" not in scored:
            scored.append("d")
            raise KeyboardInterrupt
        scored.extend(one.id for one in batch)
        return score_batch(self, batch, *rest)

    monkeypatch.setattr(TransformersScorer, "_score_batch", break_off)
    with pytest.raises(KeyboardInterrupt):
        score_at(settings(teacher, scores, out))
    assert {path.name for path in out.glob("shard-*.json")} == {
        "shard-00000.json",
        "shard-00001.json",
    }
    scored[:] = ["d"]
    score_at(settings(teacher, scores, out))
    assert sorted(scored) == ["d", "d", "e", "f"]  # nothing of the first two shards
    assert bytes_of(out) == bytes_of(made)


def test_a_killed_command_goes_on_and_ends_the_same(
    teacher: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shards = [[scored_by_hand(f"{i}", 200, i)] for i in range(12)]
    at = make_folder(tmp_path / "at", tiny_model, shards)
    score_at(settings(teacher, at, tmp_path / "undisturbed"))
    out = tmp_path / "out"
    options = {"--model": teacher, "--at": at, "--out": out, "--engine": "transformers"}
    words = [str(word) for pair in options.items() for word in pair] + ["--top-k", "5"]
    process = subprocess.Popen([QPIPE, "score", *words], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("shard-*.json"))) < 2:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    first = (out / "shard-00000.arrow").stat().st_mtime_ns
    done = subprocess.run([QPIPE, "score", *words], capture_output=True, text=True, check=True)
    assert "12 read, 12 scored, 0 rejected" in done.stdout
    assert (out / "shard-00000.arrow").stat().st_mtime_ns == first
    assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- vocabularies, lengths, tokenizers ---


def test_ids_beyond_the_vocabulary_are_left_out(
    teacher: Path, tiny_model: Path, dense: Dense, tmp_path: Path
) -> None:
    """A base whose vocabulary is padded further: one position holds nothing but padding."""
    one = scored_by_hand("a", 60, 1, largest=399)
    ids = by_position(one.topk_ids, one.counts)
    ids[3][:] = np.arange(399, 399 - len(ids[3]), -1)
    one = replace(one, topk_ids=np.concatenate(ids))
    at = make_folder(tmp_path / "at", tiny_model, [[one]], vocab_size=400)
    score_at(settings(teacher, at, tmp_path / "out"))
    (result,) = read_scores(tmp_path / "out")
    in_vocabulary = [each[each < VOCAB] for each in ids]
    counts = ints(*map(len, in_vocabulary))
    assert counts[3] == 0 < (one.counts - counts)[0:3].sum()
    assert result.counts[3] == 5
    check_union(result, counts, np.concatenate(in_vocabulary), dense(one), top_k=5)
    assert read_manifest(tmp_path / "out").settings["vocab_size"] == VOCAB


def test_a_larger_vocabulary_than_the_folders_is_scored_whole(
    tiny_model: Path, scores: Path, tmp_path: Path
) -> None:
    """Its top k may lie where the folder has no ids."""
    model = another_model(tmp_path / "padded", tiny_model, seed=3, vocab_size=400)
    score_at(settings(model, scores, tmp_path / "out", top_k=400))
    results = list(read_scores(tmp_path / "out"))
    assert all((one.counts == 400).all() and not one.tail_mass.any() for one in results)


def test_a_token_that_the_model_lacks_is_refused(
    teacher: Path, tiny_model: Path, tmp_path: Path
) -> None:
    one = scored_by_hand("a", 60, 1)
    one.input_ids[5] = VOCAB
    at = make_folder(tmp_path / "at", tiny_model, [[one]], vocab_size=400)
    with pytest.raises(UserError, match=r"at: token 320 .* teacher ends before 320: give"):
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
        "qpipe.stages.score_stage.make_scorer",
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


# --- folders that will not do ---


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
    schema = schema_of("build-targets", VOCAB)
    described = begun.settings | {
        "method": "gift",
        "form": "live",
        "parameters": {},
        "residual": "base",
        "tail_shape": "student",
        "top_p": None,
    }
    targets = Identity("build-targets", described, {}, identity_schema(schema))
    open_folder(tmp_path / "targets", targets)
    ShardRun(Job(tmp_path / "targets", schema, targets, {}, {})).seal()
    with pytest.raises(UserError, match="targets: made by `qpipe build-targets`, but the output"):
        score_at(settings(teacher, tmp_path / "targets", out))
    assert not out.exists()


def test_the_folder_itself_is_no_place_for_the_output(
    scores: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is the folder of --at: give another --out"):
        settings(teacher, scores, scores / ".." / scores.name)


# --- the command line ---


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
    expected = f"{option[0]} goes with --demonstrations, not with --at: leave one of them out"
    assert words_of("--at", scores, *option) == expected
    config = tmp_path / "config.yaml"
    value = option[1] if len(option) > 1 else "true"
    config.write_text(f"{str(option[0]).removeprefix('--')}: {value}\n")
    assert words_of("--at", scores, "--config", config) == expected


def test_the_command_needs_demonstrations_or_a_folder() -> None:
    assert words_of() == "give --demonstrations FILE, or --at DIR"


@pytest.mark.parametrize("option", [{"top_k": 0}, {"gpu_memory_utilization": 1.5}])
def test_options_out_of_range_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is out of range"):
        settings(tmp_path, tmp_path / "at", tmp_path / "out", **option)


# --- the scorers ---


def test_entries_are_joined_in_order_and_once() -> None:
    """Three positions: one with ties, one with nothing given, one with nothing new."""
    example = Example("e", ints(0, 0, 0, 0), ints(1, 2, 3))
    log = np.log(np.array([[0.4, 0.2], [0.5, 0.3], [0.6, 0.1]], np.float32))
    ids = np.array([[5, 3], [1, 2], [8, 9]])
    top = pack(example, log[:, 0], np.ones(3, np.int32), ids, log, vocab_size=10)
    np.testing.assert_allclose(top.tail_mass, [0.4, 0.2, 0.3], atol=1e-6)
    given = GivenIds(ints(5, 0, 2), ints(3, 9, 7, 1, 4, 9, 8))
    gathered = np.log(np.array([0.2, 0.05, 0.2, 0.01, 0.05, 0.1, 0.6], np.float32))
    result = with_given(top, given, gathered, vocab_size=10)
    assert result.counts.tolist() == [6, 2, 2]
    assert result.topk_ids.tolist() == [5, 3, 7, 9, 4, 1, 1, 2, 8, 9]
    expected = [0.4, 0.2, 0.2, 0.05, 0.05, 0.01, 0.5, 0.3, 0.6, 0.1]
    np.testing.assert_allclose(np.exp(result.topk_log_probs), expected, rtol=1e-6)
    np.testing.assert_allclose(result.tail_mass, [0.09, 0.2, 0.3], atol=1e-6)
    assert (result.topk_ids.dtype, result.topk_log_probs.dtype) == (np.int32, np.float32)


def test_entries_that_are_the_whole_vocabulary_leave_no_tail() -> None:
    """Whatever rounding leaves of 1."""
    example = Example("e", ints(0, 0, 0), ints(1, 2))
    log = np.log(np.full((2, 1), 0.5, np.float32))
    top = pack(example, log[:, 0], np.ones(2, np.int32), np.array([[2], [2]]), log, vocab_size=3)
    gathered = np.log(np.array([0.25, 0.125, 0.25], np.float32))
    result = with_given(top, GivenIds(ints(2, 1), ints(0, 1, 1)), gathered, vocab_size=3)
    assert result.topk_ids.tolist() == [2, 0, 1, 2, 1]
    np.testing.assert_allclose(result.tail_mass, [0, 0.25], atol=1e-7)
    assert result.tail_mass[0] == 0


def test_what_is_no_number_is_refused() -> None:
    example = Example("e7", ints(0, 0), ints(1))
    log = np.log(np.full((1, 1), 0.5, np.float32))
    top = pack(example, log[:, 0], np.ones(1, np.int32), np.zeros((1, 1), int), log, vocab_size=9)
    nan = np.full(1, np.nan, np.float32)
    with pytest.raises(UserError, match=r"example e7: .* no numbers"):
        with_given(top, GivenIds(ints(1), ints(4)), nan, vocab_size=9)
    nothing = np.full(1, -np.inf, np.float32)
    never = with_given(top, GivenIds(ints(1), ints(4)), nothing, vocab_size=9)
    assert never.counts.tolist() == [2]  # probability 0 is one
    assert never.tail_mass[0] == pytest.approx(0.5)


def test_given_ids_are_cut_to_a_vocabulary_and_laid_out_in_columns() -> None:
    given = GivenIds(ints(2, 0, 3), ints(4, 9, 8, 0, 7))
    assert given.padded().tolist() == [[4, 9, -1], [-1, -1, -1], [8, 0, 7]]
    assert given.padded()[given.padded() >= 0].tolist() == [4, 9, 8, 0, 7]
    below = given.below(8)
    assert (below.counts.tolist(), below.ids.tolist()) == ([1, 0, 2], [4, 0, 7])
    assert GivenIds(ints(0, 0), ints()).padded().shape == (2, 0)


EXAMPLES = [one for shard in SHARDS for one in shard] + [scored_by_hand("g", 256, 7)]
AT = [GivenIds(one.counts, one.topk_ids) for one in EXAMPLES]
AT[1] = GivenIds(ints(0), ints())  # none at all
AT[3] = GivenIds(np.full(12, VOCAB, np.int32), np.tile(np.arange(VOCAB, dtype=np.int32), 12))


@pytest.fixture(scope="module")
def vllm(teacher: Path) -> Any:
    """The real engine, in its CPU build, which has no token-id scoring."""
    scorer = make_scorer(
        find_model(str(teacher)), ScorerSettings("vllm", "float32", max_length=256)
    )
    assert not scorer.takes_ids
    return scorer


def run(scorer: Scorer, top_k: int) -> list[ScoredExample]:
    by_place = dict(scorer.score(EXAMPLES, top_k, AT))
    return [by_place[place] for place in range(len(EXAMPLES))]


def check_all(results: list[ScoredExample], dense: Dense, top_k: int) -> None:
    for result, one, given in zip(results, EXAMPLES, AT, strict=True):
        dense_NV = dense(one)
        check_union(result, given.counts, given.ids, dense_NV, top_k)
        observed_N = dense_NV[np.arange(len(dense_NV)), one.observed_ids]
        np.testing.assert_allclose(result.observed_log_probs, observed_N, atol=TOLERANCE)
    assert (results[3].counts == VOCAB).all()
    assert not results[3].tail_mass.any()


@pytest.mark.parametrize("top_k", [1, 7, VOCAB])
def test_transformers_gathers_what_the_dense_reference_has(
    teacher: Path, dense: Dense, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 5 rows a chunk, so that the positions of an example fall into several
    monkeypatch.setattr("qpipe.trainer.fused._CHUNK_VALUES", 5 * VOCAB)
    model = find_model(str(teacher))
    scorer = TransformersScorer(model, ScorerSettings("transformers", "float32", max_length=256))
    check_all(run(scorer, top_k), dense, top_k)


@pytest.mark.parametrize("top_k", [1, 7])
def test_vllm_gathers_from_whole_distributions_of_a_few_tokens_at_a_time(
    vllm: Any,
    dense: Dense,
    top_k: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base.say_once.cache_clear()
    monkeypatch.setattr("qpipe.stages.scorers.vllm_engine._WINDOW_BYTES", 8 * VOCAB)
    waiting: list[int] = []
    add_request = vllm.engine.add_request

    def count(*request: Any) -> Any:
        waiting.append(vllm.engine.get_num_unfinished_requests())
        return add_request(*request)

    monkeypatch.setattr(vllm.engine, "add_request", count)
    check_all(run(vllm, top_k), dense, top_k)
    assert waiting == [0] * len(EXAMPLES)
    assert (
        capsys.readouterr().err.count("0.0 MB for each token of an example: --engine transf") == 1
    )


def test_vllm_without_ids_to_gather_still_fills_its_window(
    vllm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[int] = []
    submit = vllm._submit

    def count(example: Example, sampling: Any) -> str:
        assert sampling.prompt_logprobs == 3
        waiting.append(vllm.engine.get_num_unfinished_requests())
        return submit(example, sampling)

    monkeypatch.setattr(vllm, "_submit", count)
    assert all((one.counts == 3).all() for _, one in vllm.score(EXAMPLES, 3))
    assert waiting == list(range(len(EXAMPLES)))


class TokenIdEngine:
    """The CPU engine with the token-id scoring that only the GPU's model runner has.

    The scoring is vLLM's own: its checks of the request, and its worker, which here gets whole
    log-probabilities for logits, in chunks of 37 tokens.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.asked: dict[str, Any] = {}

    def add_request(self, request_id: str, prompt: Any, sampling: Any) -> None:
        from vllm import SamplingParams

        config = self.engine.vllm_config
        sampling.verify(config.model_config, None, None, None)
        rows, start = sampling.prompt_logprob_token_ids, sampling.prompt_logprob_start
        assert len(rows) == len(prompt["prompt_token_ids"]) - 1 - start  # the input processor's
        self.asked[request_id] = sampling
        whole = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=-1, flat_logprobs=True, detokenize=False
        )
        self.engine.add_request(request_id, prompt, whole)

    def step(self) -> list[Any]:
        outputs = self.engine.step()
        for output in outputs:
            sampling, flat = self.asked[output.request_id], output.prompt_logprobs
            dense_TV = torch.full((len(output.prompt_token_ids), VOCAB), torch.nan)
            for row, start in enumerate(flat.start_indices[1:]):
                ids = flat.token_ids[start + 1 : start + 1 + VOCAB]
                dense_TV[row, ids] = torch.tensor(flat.logprobs[start + 1 : start + 1 + VOCAB])
            output.prompt_token_id_logprobs = worker_scores(sampling, dense_TV)
            output.prompt_logprobs = type(flat)()  # as it would be with prompt_logprobs alone
            for row in range(len(flat.start_indices)):
                self._append_top(output.prompt_logprobs, flat, row, sampling.prompt_logprobs)
        return outputs

    @staticmethod
    def _append_top(top: Any, flat: Any, row: int, k: int) -> None:
        start = flat.start_indices[row]
        entries = slice(start, min(start + k + 1, flat.end_indices[row]))
        top.append_fast(
            flat.token_ids[entries], flat.logprobs[entries], flat.ranks[entries], [None] * (k + 1)
        )


def worker_scores(sampling: Any, dense_TV: torch.Tensor) -> NDArray[np.float32]:
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    worker = PromptLogprobsWorker(1, torch.device("cpu"), "raw_logits")
    worker.add_request("r", 0, sampling)
    T = len(dense_TV)
    answer: dict[str, torch.Tensor] = {}
    for start in range(0, T, 37):
        chunk = dense_TV[start : start + 37]
        batch: Any = SimpleNamespace(
            req_ids=["r"],
            idx_mapping_np=np.array([0]),
            num_computed_prefill_tokens_np=np.array([start]),
            num_scheduled_tokens=np.array([len(chunk)]),
            prefill_len_np=np.array([T]),
            query_start_loc_np=np.array([0, len(chunk)]),
        )
        assert not answer
        answer = worker.compute_prompt_token_id_logprobs(
            lambda rows: rows, chunk, batch, np.array([T])
        )
    return answer["r"].numpy()


@pytest.mark.parametrize("top_k", [1, 7])
def test_vllms_own_token_id_scoring_gives_the_same(
    vllm: Any, dense: Dense, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(vllm, top_k)
    monkeypatch.setattr(vllm, "engine", TokenIdEngine(vllm.engine))
    monkeypatch.setattr(vllm, "takes_ids", True)
    monkeypatch.setattr(vllm, "keeps_tensors", False)  # its answers are flat lists
    results = run(vllm, top_k)
    check_all(results, dense, top_k)
    for one, other in zip(results, whole, strict=True):
        np.testing.assert_array_equal(one.topk_ids, other.topk_ids)
        np.testing.assert_array_equal(one.topk_log_probs, other.topk_log_probs)


def test_an_engine_that_drops_the_ids_is_told(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(TokenIdEngine):
        def step(self) -> list[Any]:
            outputs = super().step()
            for output in outputs:
                output.prompt_token_id_logprobs = None
            return outputs

    monkeypatch.setattr(vllm, "engine", Dropping(vllm.engine))
    monkeypatch.setattr(vllm, "takes_ids", True)
    monkeypatch.setattr(vllm, "keeps_tensors", False)
    with pytest.raises(UserError, match="example a: vLLM gave no log-probabilities at the ids"):
        list(vllm.score(EXAMPLES[:1], 2, AT[:1]))


def test_auto_is_vllm_only_where_it_takes_ids(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base.say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_engine("auto") == "vllm"
    assert [choose_engine("auto", gathers=True) for _ in range(2)] == ["transformers"] * 2
    assert choose_engine("vllm", gathers=True) == "vllm"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "engine transformers: vLLM cannot score given ids here" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_engine("auto", gathers=True) == "vllm"
    import vllm

    monkeypatch.setattr(vllm, "SamplingParams", object)  # an older version's
    assert choose_engine("auto", gathers=True) == "transformers"


def test_what_scored_the_base_is_not_said_of_the_teacher(
    tiny_model: Path, teacher: Path, tmp_path: Path
) -> None:
    of_the_base = {"imported": "axolotl", "mass": "k", "server_model": "base"}
    folder = make_folder(tmp_path / "base", tiny_model, SHARDS[:1], **of_the_base)
    score_at(settings(teacher, folder, tmp_path / "out"))
    manifest = read_manifest(tmp_path / "out")
    assert not of_the_base.keys() & manifest.settings.keys()
    assert described(manifest.identity).endswith("transformers in float32")


def test_more_gpus_for_an_engine_of_one_are_refused(
    teacher: Path, scores: Path, tmp_path: Path
) -> None:
    options = settings(teacher, scores, tmp_path / "out", tensor_parallel_size=4)
    with pytest.raises(UserError, match=r"--tensor-parallel-size 4: .* --engine is transformers"):
        score_at(options)
