"""`score --plan` against what scoring then does, and against sizes worked out by hand."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.progress import say_once
from qpipe.stages.cli import cli
from qpipe.stages.score.from_demonstrations import score
from qpipe.stages.score.plan import Throughput, Workload, costs, folder_bytes, plan
from qpipe.stages.score.settings import ScoreSettings
from qpipe.tests.support.rows import write_chats
from qpipe.tests.support.settings import score_settings
from qpipe.trainer.models.files import find_model
from qpipe.trainer.models.size import count_weights, forward_flop

GIB = 2**30


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


def settings(model: Path, chats: Path, out: Path, **options: Any) -> ScoreSettings:
    given = {"engine": "transformers", "max_length": 100, "shard_size": 7} | options
    return score_settings(model=str(model), demonstrations=(str(chats),), out=out, **given)


def test_the_plan_counts_what_scoring_counts(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    options = settings(tiny_model, chats, tmp_path / "out", too_long="cut")
    planned = plan(options)
    assert not (tmp_path / "out").exists()
    made = score(options).manifest.totals
    work = planned.workload
    assert (work.read, work.rejected, work.examples) == (42, 2, made["rows"])
    assert (work.tokens, work.positions) == (made["tokens"], made["positions"])
    assert work.cut == made["sums"]["cut"] > 0
    assert work.first_reject is not None
    assert work.first_reject.line == 4
    assert max(work.lengths) == 100


def test_strict_rows_are_counted_too(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    options = settings(tiny_model, chats, tmp_path, strict=True, too_long="cut")
    assert plan(options).workload.rejected == 2


def test_quantiles_of_lengths() -> None:
    work = Workload(lengths=Counter({10: 50, 20: 40, 30: 9, 99: 1}))
    assert work.quantiles == {0.0: 10, 0.5: 10, 0.9: 20, 0.99: 30, 1.0: 99}
    same = Workload(lengths=Counter({7: 1}))
    assert same.quantiles == dict.fromkeys((0.0, 0.5, 0.9, 0.99, 1.0), 7)
    assert Workload().quantiles == {}


def test_size_of_the_folder() -> None:
    work = Workload(tokens=1000, positions=500)
    assert folder_bytes(work, 64, 49_152) == 500 * (9 + 64 * 5.2) + 2000
    packed = folder_bytes(work, 64, 49_152, is_packed=True)
    assert packed == int(500 * (4 + 64 * 2.2) + 2000)
    assert folder_bytes(work, 64, 152_000) == int(500 * (9 + 64 * 5.6) + 2000)


def test_memory_of_a_gpu(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    options = settings(tiny_model, chats, tmp_path, dtype="bfloat16", engine="auto")
    memory = plan(options, gpu_memory=16).memory
    assert memory.engine is not None
    assert memory.engine.scheduled_tokens == 8192
    assert memory.engine.added == 1024 * (320 * 8 + 64 * 28)  # a float32 head
    assert memory.peak == int(0.92 * 16 * GIB) + memory.engine.added
    assert memory.fits
    assert not plan(options, gpu_memory=1.2).memory.fits


# of the tiny model: the head, and in each of two layers queries, keys, values, output, three
# matrices of the MLP and two norms; the last norm
MULTIPLIED = 320 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64


def test_the_work_of_a_forward_pass(tiny_model: Path) -> None:
    model = find_model(str(tiny_model))
    counts = count_weights(model)
    assert counts is not None
    assert counts.multiplied == MULTIPLIED
    assert counts.stored == MULTIPLIED + 320 * 64  # the embedding
    # token t attends to t tokens: a product with each key and value, in 2 layers of 2 heads of 32
    attended = sum(range(1, 11))
    one = 10 * 2 * MULTIPLIED + attended * 2 * (2 * 2 * 2 * 32)
    assert forward_flop(model, MULTIPLIED, {10: 3}) == 3 * one


def test_a_token_meets_some_of_the_experts(tiny_model: Path) -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    counts = count_weights(replace(find_model(str(tiny_model)), config=config))
    assert counts is not None
    expert = 3 * 64 * 16
    assert counts.stored - counts.multiplied == 6 * expert


def test_hours_and_bytes(tiny_model: Path) -> None:
    model = find_model(str(tiny_model))
    flop = forward_flop(model, MULTIPLIED, {100: 1000})
    reckoned = costs(model, {100: 1000}, 50_000, Throughput(tflops=flop / 0.4e12 / 3600))
    assert reckoned is not None
    assert (reckoned.score_hours, reckoned.epoch_hours) == pytest.approx((1, 3))
    assert reckoned.targets_bytes == 50 * 50_000
    assert reckoned.training_bytes == 16 * (MULTIPLIED + 320 * 64)
    measured = costs(model, {100: 1000}, 50_000, Throughput(speed=50_000 / 7200))
    assert measured is not None
    assert (measured.score_hours, measured.epoch_hours) == pytest.approx((2, 6))


def test_weights_that_are_not_here_are_not_needed(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    here, elsewhere = (
        plan(settings(model, chats, tmp_path)) for model in (tiny_model, tmp_path / "model")
    )
    assert elsewhere.memory == here.memory
    assert elsewhere.costs == here.costs is not None


def test_the_command_prints_and_logs_the_plan_and_writes_nothing(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.json"
    words = ["score", "--plan", "--model", str(tiny_model), "--demonstrations", str(chats)]
    done = CliRunner().invoke(cli, [*words, "--gpu-memory", "24", "--log-json", str(log)])
    assert done.exit_code == 0, done.output
    assert "42 read, 40 to score, 2 rejected" in done.output
    assert "chats.jsonl, line 4: not JSON" in done.output
    assert "model runner V2, 8,192 tokens a step" in done.output
    assert "; the largest step in use" in done.output
    assert "FLOP at 40% of 989 TFLOP/s, which is an assumption" in done.output
    event = json.loads(log.read_text())
    assert event["event"] == "plan"
    assert event["workload"]["lengths"]["1.0"] > event["workload"]["lengths"]["0.0"]
    assert event["memory"]["fits"] is True
    assert event["costs"]["epoch_hours"] == 3 * event["costs"]["score_hours"] > 0
    assert list(tmp_path.iterdir()) == [log]


def test_a_given_speed_is_printed_as_given(tiny_model: Path, chats: Path) -> None:
    words = ["score", "--plan", "--model", str(tiny_model), "--demonstrations", str(chats)]
    for speed, shown in (("0.25", "0.25"), ("53700", "53,700"), ("1e9", "1,000,000,000")):
        done = CliRunner().invoke(cli, [*words, "--gpu-speed", speed])
        assert f"at the given {shown} supervised tokens/s of a GPU" in done.output


def test_float32_on_a_gpu_is_said(
    tiny_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say_once.cache_clear()
    plan(settings(tiny_model, chats, tmp_path, dtype="float32"), gpu_memory=16)
    assert "dtype float32 on a GPU is many times slower" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "--demonstrations", "x", "--gpu-memory", "1e300"], "not in the range 1<=x<="),
        (["--plan", "--at", "x"], "--plan requires --demonstrations FILE"),
        (["--demonstrations", "x.jsonl", "--out", "o", "--gpu-memory", "8"], "requires --plan"),
        (["--demonstrations", "x.jsonl", "--gpu-speed", "8"], "--gpu-speed requires --plan"),
        (["--demonstrations", "x.jsonl"], "give either --out DIR or --store ROOT"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], message: str) -> None:
    done = CliRunner().invoke(cli, ["score", "--model", "m", *words])
    assert done.exit_code == 2
    assert message in done.output


def test_more_entries_than_the_vocabulary_has(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--top-k 321 is above the model's vocabulary of 320"):
        plan(settings(tiny_model, chats, tmp_path, top_k=321))
