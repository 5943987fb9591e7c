"""`verify --rescore`: differences that are put into a folder are found, and only those."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec import structs
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.sealed import SealedFolder, open_sealed, read_scores
from qpipe.pipeline.format.records import ScoredExample
from qpipe.stages.cli import cli
from qpipe.stages.folders import rescore as module
from qpipe.stages.folders.rescore import MANY_TIES, bucket_kl, rescore, tied_share
from qpipe.stages.score.from_demonstrations import score
from qpipe.tests.support.settings import score_settings
from safetensors.torch import load_file, save_file

from ...conftest import make_tiny_model
from ...support.commands import qpipe
from ...support.rows import write_chats


@pytest.fixture(scope="module")
def scores(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rescore")
    chats = write_chats(root / "chats.jsonl", 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qpipe.pipeline.folders.shards.BATCH_ROWS", 4
        )  # several record batches in a shard
        score(
            score_settings(
                model=str(tiny_model), demonstrations=(str(chats),), out=root / "scores", top_k=16,
                engine="transformers", shard_size=9,
            )
        )  # fmt: skip
    return root / "scores"


def test_scores_of_the_same_model_agree(scores: Path, tiny_model: Path) -> None:
    result = rescore(scores, str(tiny_model), examples=100)
    assert result.examples == 20
    assert result.same_weights is True
    assert result.positions == sum(len(one.positions) for one in read_scores(scores))
    assert result.observed < 1e-4
    assert result.entries < 1e-4
    assert (result.rank, result.modes_changed) == (0, 0)
    assert result.kl_max < 1e-6


def test_a_large_vocabulary_does_not_bias_the_reference(tmp_path: Path) -> None:
    """The sum of the scores is exact; torch's log-softmax is off by 4e-6 nats here."""
    model = make_tiny_model(tmp_path / "wide", vocab_size=50_000)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] *= 2  # logits as far apart as those of a trained model
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    settings = score_settings(
        model=str(model), demonstrations=(str(write_chats(tmp_path / "chats.jsonl", 5)),),
        out=tmp_path / "scores", top_k=16, engine="transformers",
    )  # fmt: skip
    score(settings)
    assert rescore(tmp_path / "scores", str(model), examples=5).observed_mean < 1.5e-6


def test_bfloat16_costs_something(scores: Path, tiny_model: Path, tmp_path: Path) -> None:
    score(
        score_settings(
            model=str(tiny_model), demonstrations=(str(scores.parent / "chats.jsonl"),),
            out=tmp_path / "low", engine="transformers", dtype="bfloat16",
        )
    )  # fmt: skip
    result = rescore(tmp_path / "low", str(tiny_model), examples=100)
    assert result.dtype == "bfloat16"
    assert 1e-3 < result.observed < 1
    assert result.ranks_changed > 0
    assert result.kl_max > 1e-6
    assert result.kl_max >= result.kl_mean > 0

    ties = [np.diff(row) == 0 for one in read_scores(tmp_path / "low") for row in by_position(one)]
    share = np.concatenate(ties).mean()
    assert share > MANY_TIES
    assert tied_share(open_sealed(tmp_path / "low", "score")) == pytest.approx(share)
    said = qpipe("verify", tmp_path / "low")
    assert f"note: {share:.0%} of neighbouring entries have equal log-probabilities" in said
    assert "note" not in qpipe("verify", scores)


def by_position(example: ScoredExample) -> list[Any]:
    """The entries of each position."""
    return np.split(example.topk_log_probs, np.cumsum(example.counts)[:-1])


def test_the_largest_differences_are_those_that_were_put_in(
    scores: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(example: ScoredExample) -> ScoredExample:
        observed, entries = example.observed_log_probs.copy(), example.topk_log_probs.copy()
        ranks, ids = example.observed_ranks.copy(), example.topk_ids.copy()
        observed[0] += 0.25
        entries[3] -= 0.5
        ranks[1] += 7
        ids[:2] = ids[1::-1]
        return replace(
            example, observed_log_probs=observed, topk_log_probs=entries, observed_ranks=ranks,
            topk_ids=ids,
        )  # fmt: skip

    examples = module.examples_at
    monkeypatch.setattr(
        module, "examples_at", lambda *given: (changed(one) for one in examples(*given))
    )
    result = rescore(scores, str(tiny_model), examples=3, seed=5)
    assert result.observed == pytest.approx(0.25, abs=1e-4)
    assert result.observed_mean == pytest.approx(0.25 * 3 / result.positions, abs=1e-4)
    assert result.entries >= 0.5 - 1e-4
    assert (result.ranks_changed, result.rank, result.modes_changed) == (3, 7, 3)


def test_kl_is_that_of_the_distributions() -> None:
    """Against sums over five outcomes worked out in full."""
    fresh = np.array([[0.5, 0.2, 0.1, 0.15, 0.05], [0.25, 0.25, 0.25, 0.125, 0.125]])
    stored = np.array([[0.4, 0.3, 0.1, 0.15, 0.05], [0.5, 0.25, 0.125, 0.0625, 0.0625]])
    example = ScoredExample(
        id="a", input_ids=np.zeros(3, np.int32), positions=np.array([1, 2], np.int32),
        observed_log_probs=np.zeros(2, np.float32), observed_ranks=np.ones(2, np.int32),
        counts=np.array([2, 3], np.int32), topk_ids=np.array([0, 1, 0, 1, 2], np.int32),
        topk_log_probs=np.log(np.array([0.4, 0.3, 0.5, 0.25, 0.125], np.float32)),
        tail_mass=np.array([0.3, 0.125], np.float32), token_weights=np.ones(2, np.float32),
    )  # fmt: skip
    entries = np.log(np.array([0.5, 0.2, 0.25, 0.25, 0.25]))
    found = bucket_kl(example, entries)
    for row, k in ((0, 2), (1, 3)):
        p = np.append(fresh[row, :k], fresh[row, k:].sum())
        q = np.append(stored[row, :k], stored[row, k:].sum())
        assert found[row] == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)


def test_examples_are_drawn_from_all_shards(scores: Path) -> None:
    folder = open_sealed(scores, "score")
    everything = [one.id for one in read_scores(scores)]
    for rows in ([0], [5, 6], [19], [2, 7, 18], list(range(20))):
        found = [one.id for one in module.examples_at(folder, rows)]
        assert found == [everything[row] for row in rows]


def test_probabilities_above_one_are_not_hidden() -> None:
    example = ScoredExample(
        id="a", input_ids=np.zeros(2, np.int32), positions=np.array([1], np.int32),
        observed_log_probs=np.zeros(1, np.float32), observed_ranks=np.ones(1, np.int32),
        counts=np.array([2], np.int32), topk_ids=np.array([0, 1], np.int32),
        topk_log_probs=np.log(np.array([0.75, 0.5], np.float32)),
        tail_mass=np.zeros(1, np.float32), token_weights=np.ones(1, np.float32),
    )  # fmt: skip
    # 0.75 log(0.75/0.75) + 0.25 log(0.25/0.5)
    assert bucket_kl(example, np.log([0.75, 0.25]))[0] == pytest.approx(-0.25 * np.log(2), abs=1e-6)


def test_weights_that_the_name_has_meanwhile_are_refused_unless_they_are_asked_for(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a quantised model is compared with what it was made of."""
    other = make_tiny_model(tmp_path / "tiny", vocab_size=320, seed=1)
    result = rescore(scores, str(other), examples=2)
    assert result.same_weights is False
    assert result.kl_mean > 0.1
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"weights of hash .*, model tiny now has .*: give --model"):
        rescore(scores)


def test_a_model_without_rescoring_is_refused(scores: Path) -> None:
    for option in ("--model", "--revision"):
        said = qpipe("verify", scores, option, "x", fails=True)
        assert f"{option} x: requires --rescore N" in said


def test_other_tokens_are_refused(scores: Path, tmp_path: Path) -> None:
    larger = make_tiny_model(tmp_path / "larger", vocab_size=328)
    with pytest.raises(UserError, match="with a vocabulary of 320, model larger has 328"):
        rescore(scores, str(larger))
    tokenizer = json.loads((larger / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (larger / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"with tokenizer hash .*, model larger has"):
        rescore(scores, str(larger))


@pytest.mark.parametrize(
    ("settings", "engine"),
    [({"engine": "server", "weights_hash": None}, "server"), ({"imported": "axolotl"}, "import")],
)
def test_scores_whose_weights_nobody_knows_are_compared(
    scores: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    engine: str,
) -> None:
    """Those that a server made, and those of another tool."""
    folder = open_sealed(scores, "score")
    manifest = folder.manifest
    own = {key: manifest.settings[key] for key in ("tokenizer_hash", "vocab_size")}
    identity = structs.replace(manifest.identity, settings=own | settings)
    changed = SealedFolder(folder.path, structs.replace(manifest, identity=identity))
    monkeypatch.setattr(module, "open_sealed", lambda *_: changed)
    result = rescore(scores, str(tiny_model), examples=2)
    assert result.same_weights is None
    assert result.engine.startswith(engine)
    assert (result.dtype, result.observed < 1e-4) == ("unknown", True)


def test_the_command(scores: Path, tiny_model: Path, tmp_path: Path) -> None:
    words = ["verify", str(scores), "--rescore", "2"]
    log = tmp_path / "log.json"
    done = CliRunner().invoke(cli, [*words, "--model", str(tiny_model), "--log-json", str(log)])
    assert done.exit_code == 0, done.output
    assert "2 demonstrations" in done.output
    assert json.loads(log.read_text())["examples"] == 2
    unnamed = CliRunner().invoke(cli, words)
    assert "was scored with model tiny, which cannot be loaded by that name: give --model" in str(
        unnamed.exception
    )
    shutil.rmtree(tmp_path)
