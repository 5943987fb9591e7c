"""Scores of two models, joined, built and trained on, against the models' own distributions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from qpipe.pipeline import read_targets
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.format.records import TargetExample
from qpipe.pipeline.methods import dense_target

from ..conftest import make_tiny_model
from ..support.commands import qpipe

VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one tokenizer, and demonstrations, some with words that count more."""
    root = tmp_path_factory.mktemp("teacher")
    for seed, name in enumerate(("base", "teacher")):
        make_tiny_model(root / name, vocab_size=VOCAB_SIZE, seed=seed)
    rows: list[dict[str, Any]] = []
    for number in range(6):
        answer: dict[str, Any] = {"role": "assistant", "content": f"The answer is {number}."}
        if number % 2:
            answer |= {"spans": [[14, 15, 1.0]], "weight": 0.25}
        question = {"role": "user", "content": f"Say {number}."}
        rows.append({"id": f"d{number}", "messages": [question, answer]})
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """Scores of all ids under both models."""
    score = ("score", "--engine", "transformers", "--top-k", VOCAB_SIZE, "--shard-size", 4)
    qpipe(*score, "--model", root / "base", "--demonstrations", root / "chats.jsonl",
          "--out", root / "scores")  # fmt: skip
    qpipe(*score[:-2], "--model", root / "teacher", "--at", root / "scores",
          "--out", root / "teacher-scores")  # fmt: skip
    return root


def log_probs(model: Path, example: TargetExample) -> NDArray[np.float64]:
    """The model's log-probabilities at the supervised positions, [N, V]."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0]
    return logits[example.positions - 1].double().log_softmax(-1).numpy()


def dense(example: TargetExample) -> Iterator[NDArray[np.float64]]:
    """Q over the vocabulary at each position, from what is stored."""
    starts = np.cumsum(example.counts) - example.counts
    for n, observed in enumerate(example.observed_ids):
        entries = slice(starts[n], starts[n] + example.counts[n])
        target = np.zeros(VOCAB_SIZE)
        target[example.support_ids[entries]] = example.support_probs[entries]
        target *= 1 - float(example.trust[n])
        target[observed] += float(example.trust[n])
        yield target


@pytest.mark.parametrize(
    ("method", "form", "parameters"),
    [("target-sft", "frozen-target", {"eta": 0.3}), ("kd-hybrid", "frozen-target", {"lam": 0.7})],
)
def test_stored_targets_are_those_of_the_models(
    whole: Path, method: str, form: str, parameters: dict[str, float]
) -> None:
    out = whole / f"targets-{method}"
    params = [f"--param={name}={value}" for name, value in parameters.items()]
    qpipe("build-targets", "--scores", whole / "scores", "--teacher", whole / "teacher-scores",
          "--method", method, "--form", form, *params, "--top-p", 1, "--max-support", VOCAB_SIZE,
          "--precision", "float32", "--out", out)  # fmt: skip

    for example in read_targets(out):
        wanted, scale = dense_target(
            method,
            form=form,
            base_log_probs=log_probs(whole / "base", example),
            teacher_log_probs=log_probs(whole / "teacher", example),
            observed=example.observed_ids,
            **parameters,
        )
        np.testing.assert_allclose(list(dense(example)), wanted, atol=2e-6)
        weighted = example.weights != 1
        assert weighted.any() == (int(example.id[1:]) % 2 == 1)
        np.testing.assert_allclose(example.weights[~weighted], scale[~weighted])
        np.testing.assert_allclose(example.weights[weighted], 0.25)


def test_a_critical_token_is_all_that_cft_trains_on(whole: Path) -> None:
    out = whole / "targets-cft"
    qpipe("build-targets", "--scores", whole / "scores", "--method", "cft", "--out", out)

    examples = {example.id: example for example in read_targets(out)}
    assert (examples["d0"].weights == 1).all()
    weights = examples["d3"].weights
    assert (np.sort(np.unique(weights)) == [0.25, 1]).all()
    assert (weights == 1).sum() == 1  # the token of the number


@pytest.fixture(scope="module")
def joined(root: Path) -> Path:
    """Scores of few ids, each model's gathered at the other's."""
    score = ("score", "--engine", "transformers", "--top-k", 24)
    qpipe(*score, "--model", root / "base", "--demonstrations", root / "chats.jsonl",
          "--out", root / "few")  # fmt: skip
    qpipe(*score, "--model", root / "teacher", "--at", root / "few", "--out", root / "few-teacher")
    qpipe(*score, "--model", root / "base", "--at", root / "few-teacher",
          "--out", root / "few-base")  # fmt: skip
    return root


@pytest.mark.parametrize("form", ["live", "frozen-target"])
def test_a_student_learns_from_a_teacher(joined: Path, form: str) -> None:
    targets, run = joined / f"targets-{form}", joined / f"run-{form}"
    out = qpipe("build-targets", "--scores", joined / "few-base", "--teacher",
                joined / "few-teacher", "--method", "target-sft", "--form", form,
                "--out", targets)  # fmt: skip
    assert f"target-sft ({form}, eta=0.5)" in out
    assert "Demonstrations that greedy decoding of Q writes" in out
    settings = read_manifest(targets).settings
    assert (settings["method"], settings["form"]) == ("target-sft", form)

    train = ("--batch-size", 3, "--epochs", 8, "--learning-rate", 5e-3)
    qpipe("train", "--targets", targets, "--model", joined / "base", *train, "--out", run)
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    losses = [step["loss"] for step in steps]
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2]), losses  # two steps are an epoch
    bounds = [step["error_bound"] for step in steps]
    assert all(0 < bound < 2 for bound in bounds) if form == "live" else set(bounds) == {None}
