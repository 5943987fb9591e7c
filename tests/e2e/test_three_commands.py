"""The three commands as a user types them, on a tiny model; each once in a fresh interpreter."""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline import read_scores, read_targets
from qpipe.pipeline.folders.manifest import read_manifest

from ..support.commands import kill_after_two_shards, qpipe, run_qpipe

QPIPE = Path(sys.executable).with_name("qpipe")
SCORE = ("--engine", "transformers", "--top-k", 16, "--shard-size", 8)


def fresh(*arguments: object) -> None:
    """Run a command to its end in a fresh interpreter."""
    words = [str(argument) for argument in arguments]
    done = subprocess.run([QPIPE, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def refuse(*arguments: object) -> str:
    """Run a command that must refuse: status 2 and one line, returned, after any progress."""
    done = run_qpipe(*arguments)
    said = done.out + done.err
    assert done.status == 2, (done.status, said)
    lines = [line for line in said.splitlines() if line.strip()]
    assert "Traceback" not in said
    assert [line.startswith("Error: ") for line in lines].index(True) == len(lines) - 1
    return lines[-1]


def chat(number: int) -> dict[str, Any]:
    return {
        "id": f"d{number}",
        "messages": [
            {"role": "user", "content": f"Say {number}."},
            {"role": "assistant", "content": f"The answer is {number}."},
        ],
    }


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty usable rows and three that are not."""
    rows: list[object] = [chat(number) for number in range(30)]
    rows[10:10] = ["{broken", {"messages": []}, {"text": "no known form"}]
    return write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, demonstrations: Path) -> Path:
    """scores/, targets/ and run/, made once."""
    root = tmp_path_factory.mktemp("made")
    fresh("score", "--model", tiny_model, "--demonstrations", demonstrations, *SCORE,
          "--out", root / "scores")  # fmt: skip
    fresh("build-targets", "--scores", root / "scores", "--out", root / "targets")
    train = ("--learning-rate", 1e-2, "--batch-size", 4, "--eval-fraction", 0.2, "--epochs", 3)
    fresh("train", "--targets", root / "targets", "--model", tiny_model, *train,
          "--out", root / "run")  # fmt: skip
    return root


def test_every_demonstration_is_accounted_for(made: Path) -> None:
    totals = read_manifest(made / "scores").totals
    assert (totals["read"], totals["rows"], totals["rejected"]) == (33, 30, 3)
    rejects = [
        json.loads(line) for line in (made / "scores/rejects.jsonl").read_text().splitlines()
    ]
    assert [(reject["source"], reject["line"]) for reject in rejects] == [
        ("chats.jsonl", 11),
        ("chats.jsonl", 12),
        ("chats.jsonl", 13),
    ]
    assert all(reject["reason"] for reject in rejects)
    assert [example.id for example in read_scores(made / "scores")] == [f"d{n}" for n in range(30)]


def test_the_answers_and_their_ends_are_supervised(made: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for number, example in enumerate(read_targets(made / "targets")):
        assert tokenizer.decode(example.observed_ids) == f"The answer is {number}.<|im_end|>"


def test_targets_keep_the_smallest_prefix_and_the_observed_token(made: Path) -> None:
    scores, targets = read_scores(made / "scores"), read_targets(made / "targets")
    for score, target in zip(scores, targets, strict=True):
        starts = np.cumsum(target.counts) - target.counts
        for n, observed in enumerate(target.observed_ids):
            support = target.support_ids[starts[n] : starts[n] + target.counts[n]]
            probs = target.support_probs[starts[n] : starts[n] + target.counts[n]]
            assert observed in support
            assert probs.sum() + target.tail_mass[n] == pytest.approx(1, abs=1e-6)
            top = np.exp(score.topk_log_probs[16 * n : 16 * n + 16].astype(np.float64))
            size = min(int((np.cumsum(top) < 0.99).sum()) + 1, 16)
            expected = set(score.topk_ids[16 * n : 16 * n + size].tolist()) | {int(observed)}
            assert set(support.tolist()) == expected
        np.testing.assert_allclose(target.trust, 1 / 1.1, rtol=1e-6)
        np.testing.assert_allclose(target.weights, 1.1, rtol=1e-6)


def test_training_lowers_the_held_out_loss(made: Path) -> None:
    results = json.loads((made / "run/qpipe.json").read_text())["results"]
    assert results["after"]["target_loss"] < results["before"]["target_loss"] - 0.5
    assert results["before"]["kl_to_base"] == pytest.approx(0, abs=1e-3)  # eight bits
    assert results["after"]["kl_to_base"] > 0.1


def test_the_trained_model_loads_in_transformers_and_can_be_scored(
    made: Path, demonstrations: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    qpipe("score", "--model", made / "run", "--demonstrations", demonstrations,
            "--engine", "transformers", "--out", out)  # fmt: skip
    before, after = read_manifest(made / "scores").totals, read_manifest(out).totals
    assert after["sums"]["observed_nll"] < before["sums"]["observed_nll"]


@pytest.mark.slow
def test_the_trained_model_loads_in_vllm(made: Path, demonstrations: Path, tmp_path: Path) -> None:
    """And the two engines agree on it, through the whole command."""
    for engine in ("vllm", "transformers"):
        qpipe("score", "--model", made / "run", "--demonstrations", demonstrations,
                "--engine", engine, "--top-k", 4, "--out", tmp_path / engine)  # fmt: skip
    pairs = zip(read_scores(tmp_path / "vllm"), read_scores(tmp_path / "transformers"), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_allclose(one.observed_log_probs, other.observed_log_probs, atol=2e-4)
        np.testing.assert_allclose(one.topk_log_probs, other.topk_log_probs, atol=2e-4)


def test_a_second_run_changes_nothing(made: Path, demonstrations: Path, tiny_model: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    done = qpipe("score", "--model", tiny_model, "--demonstrations", demonstrations,
                   *SCORE, "--out", made / "scores")  # fmt: skip
    assert "nothing to do" in done
    done = qpipe("build-targets", "--scores", made / "scores", "--out", made / "targets")
    assert "nothing to do" in done
    assert files == {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(
    made: Path, demonstrations: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    words = ("score", "--model", tiny_model, "--demonstrations", demonstrations, *SCORE)
    first = kill_after_two_shards(out, *words, "--out", out)
    qpipe(*words, "--out", out)
    assert (out / "shard-00000.arrow").stat().st_mtime_ns == first
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (made / "scores").iterdir()}


def test_the_file_may_lie_elsewhere_and_be_compressed(
    made: Path, demonstrations: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The same rows give the same scores, whatever holds them."""
    packed = tmp_path / "chats.jsonl.gz"
    packed.write_bytes(gzip.compress(demonstrations.read_bytes()))
    qpipe("score", "--model", tiny_model, "--demonstrations", packed, *SCORE,
            "--out", tmp_path / "scores")  # fmt: skip
    for shard in read_manifest(made / "scores").shards:
        assert (tmp_path / "scores" / shard.file).read_bytes() == (
            made / "scores" / shard.file
        ).read_bytes()


def test_several_files_after_one_option_and_a_config_file(
    demonstrations: Path, tiny_model: Path, tmp_path: Path
) -> None:
    more = write_lines(tmp_path / "more.jsonl", [{"prompt": "Say 1.", "completion": "One."}])
    config = tmp_path / "score.yaml"
    config.write_text(
        f"model: {tiny_model}\nengine: transformers\ntop-k: 3\nout: {tmp_path / 'no'}\n"
    )
    out = tmp_path / "scores"
    qpipe("score", "--config", config, "--demonstrations", demonstrations, more, "--out", out)
    manifest = read_manifest(out)
    assert manifest.settings["top_k"] == 3
    assert (manifest.totals["rows"], manifest.totals["rejected"]) == (31, 3)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        ("", "empty"),
        ("not json\nat all\n", "none of"),
        ('{"text": "abc"}\n', "none of"),
    ],
)
def test_unusable_demonstrations_are_refused_before_a_model_is_loaded(
    content: str | None, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "chats.jsonl"
    if content is not None:
        file.write_text(content)
    line = refuse("score", "--model", "nowhere/at-all/x", "--demonstrations", file,
                  "--out", tmp_path / "out")  # fmt: skip
    assert words in line
    assert "chats.jsonl" in line
    assert not (tmp_path / "out").exists()


def test_score_refuses_what_cannot_be(
    made: Path, demonstrations: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def score(*options: object, out: Path = tmp_path / "out") -> str:
        return refuse(
            "score", "--demonstrations", demonstrations, "--engine", "transformers",
            "--out", out, *options
        )  # fmt: skip

    assert "no such folder" in score("--model", tmp_path / "missing")
    assert "320" in score("--model", tiny_model, "--top-k", 321)
    assert "--top-k 0" in score("--model", tiny_model, "--top-k", 0)
    assert "256" in score("--model", tiny_model, "--max-length", 257)
    assert "--template" in score("--model", tiny_model, "--template", tmp_path / "missing.jinja")
    assert "line 11" in score("--model", tiny_model, "--strict", out=tmp_path / "strict")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "notes.txt" in score("--model", tiny_model, out=tmp_path / "full")
    assert "top_k is 16 there and 4 now" in score(
        "--model", tiny_model, "--top-k", 4, "--shard-size", 8, out=made / "scores"
    )
    assert "--engine" in score("--model", tiny_model, "--engine", "tgi")
    assert not (tmp_path / "out").exists()


def test_build_targets_refuses_what_cannot_be(made: Path, tmp_path: Path) -> None:
    def build(*options: object) -> str:
        return refuse("build-targets", "--out", tmp_path / "out", *options)

    scores = ("--scores", made / "scores")
    assert "sft+kl" in build(*scores, "--method", "magic")
    assert "lam=-1" in build(*scores, "--param", "lam=-1")
    assert "lam=nan" in build(*scores, "--param", "lam=nan")
    assert "lam=x" in build(*scores, "--param", "lam=x")
    assert "beta" in build(*scores, "--param", "beta=1")
    assert "--top-p 0" in build(*scores, "--top-p", 0)
    assert "--max-support 0" in build(*scores, "--max-support", 0)
    assert "no such folder" in build("--scores", tmp_path / "missing")
    assert "qpipe score" in build("--scores", made / "targets")
    assert not (tmp_path / "out").exists()


def test_train_refuses_what_cannot_be(made: Path, tiny_model: Path, tmp_path: Path) -> None:
    def train(*options: object, targets: Path = made / "targets") -> str:
        words = ("train", "--targets", targets, "--out", tmp_path / "out")
        return refuse(*words, *options)

    model = ("--model", tiny_model)
    assert "no such folder" in train("--model", tmp_path / "missing")
    assert "build-targets" in train(*model, targets=made / "scores")
    assert "dft" in train(*model, "--method", "dft")
    assert "--learning-rate" in train(*model, "--learning-rate", -1)
    damaged = tmp_path / "damaged"
    shutil.copytree(made / "targets", damaged)
    shard = damaged / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert "shard-00001.arrow" in train(*model, targets=damaged)
    shard.unlink()
    assert "shard-00001.arrow" in train(*model, targets=damaged)
    assert not list(tmp_path.glob("out/*.safetensors"))
