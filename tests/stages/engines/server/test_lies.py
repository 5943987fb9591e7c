"""Answers that cannot be: refused, never stored."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.stages.engines.choose import make_scorer
from qpipe.stages.engines.server.scorer import ServerScorer
from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.examples import unweighted

from .fake import EXAMPLES, NAME, VOCAB, Fake, run, settings_for


def spoil_length(answer: Any) -> None:
    answer["choices"][0]["prompt_logprobs"].pop()


def spoil_row(answer: Any) -> None:
    row = answer["choices"][0]["prompt_logprobs"][-1]
    del row[next(iter(row))]


def spoil_id(answer: Any) -> None:
    row = answer["choices"][0]["prompt_logprobs"][-1]
    row[VOCAB + 7] = row.pop(next(key for key, value in row.items() if value["rank"] == 1))


def spoil_mass(answer: Any) -> None:
    for entry in answer["choices"][0]["prompt_logprobs"][-1].values():
        entry["logprob"] += 2.0


def spoil_order(answer: Any) -> None:
    first, second, *_ = (
        entry for entry in answer["choices"][0]["prompt_logprobs"][-1].values() if entry["rank"] < 9
    )
    first["rank"], second["rank"] = second["rank"], first["rank"]


def spoil_twice(answer: Any) -> None:
    """Two entries of the same rank, equally probable."""
    for row in answer["choices"][0]["prompt_logprobs"][1:]:
        first, second, *_ = sorted(row.values(), key=lambda entry: entry["rank"])
        second.update(first)


def spoil_observed(answer: Any) -> None:
    for row in answer["choices"][0]["prompt_logprobs"][1:]:
        for entry in row.values():
            if entry["rank"] > 8:
                entry["logprob"] = -1e-9


def observed_outside(answer: Any) -> Iterator[Any]:
    for row in answer["choices"][0]["prompt_logprobs"][1:]:
        yield from (entry for entry in row.values() if entry["rank"] > 8)


def spoil_rank(answer: Any) -> None:
    """Far down, and still as probable as the last of the top k."""
    for row in answer["choices"][0]["prompt_logprobs"][1:]:
        last = min(entry["logprob"] for entry in row.values() if entry["rank"] <= 8)
        for entry in row.values():
            if entry["rank"] > 8:
                entry.update(rank=VOCAB, logprob=last)


def spoil_tail(answer: Any) -> None:
    """Next after the top k, and all but impossible: then so is the rest, which has a mass."""
    for entry in observed_outside(answer):
        entry.update(rank=9, logprob=-60.0)


def spoil_sentinel(answer: Any) -> None:
    for entry in observed_outside(answer):
        entry.update(rank=VOCAB, logprob=-9999.0)


def spoil_top(answer: Any) -> None:
    """The top k lose mass that the rest, each of them less probable, cannot have."""
    for row in answer["choices"][0]["prompt_logprobs"][1:]:
        for entry in row.values():
            entry["logprob"] -= 3.0


@pytest.mark.parametrize("key", ["-3", str(2**31), str(2**70)])
def test_ids_that_are_none_are_never_stored(fake: Fake, key: str) -> None:
    def spoil(answer: Any) -> None:
        row = answer["choices"][0]["prompt_logprobs"][-1]
        row[key] = row.pop(next(token for token, entry in row.items() if entry["rank"] == 1))

    scorer = make_scorer(fake.files, settings_for(fake, tries=1))
    fake.faults = [spoil]
    with pytest.raises(UserError, match="an answer that cannot be read"):
        list(scorer.score(EXAMPLES[:1], 8))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda answer: answer["choices"].clear(), "0 entries for a prompt of 40 tokens"),
        (spoil_length, "39 entries for a prompt of 40 tokens"),
        (spoil_row, "e1: the server's answer for token"),
        (spoil_id, "e1: the server's answer for token"),
        (spoil_mass, "add up to .*raw_logprobs"),
        (spoil_order, "topk_log_probs does not descend"),
        (spoil_rank, "the tokens outside of the top k cannot have the rest of 1"),
        (spoil_tail, "the tokens outside of the top k cannot have the rest of 1"),
        (spoil_top, "the tokens outside of the top k cannot have the rest of 1"),
        (spoil_twice, r"holds 7 of the ranks 1 to 8, or one of them twice"),
        (spoil_sentinel, "-9999 is not a log-probability, but stands for none"),
        (spoil_observed, "a token outside of the top k is more probable than one of them"),
    ],
)
def test_a_wrong_answer_is_never_stored(fake: Fake, spoil: Any, words: str) -> None:
    one = unweighted("e1", EXAMPLES[1].input_ids, np.arange(1, 40, dtype=np.int32))
    scorer = make_scorer(fake.files, settings_for(fake))
    fake.faults = [spoil]
    with pytest.raises(UserError, match=words):
        list(scorer.score([one], 8))


@pytest.mark.parametrize("generates", [True, False])
def test_a_server_that_reads_other_tokens_is_refused(fake: Fake, generates: bool) -> None:
    fake.generates = generates
    fake.reads = lambda ids: None  # does not say
    assert len(run(fake)) == len(EXAMPLES)
    fake.reads = lambda ids: [*ids[:-1], 0] if len(ids) > 30 else ids
    with pytest.raises(UserError, match="or it read other tokens"):
        run(fake)


def test_a_failure_ends_what_is_under_way_and_the_scorer_goes_on(fake: Fake) -> None:
    scorer = make_scorer(fake.files, settings_for(fake, concurrency=4))
    fake.faults = [spoil_length]
    with pytest.raises(UserError):
        list(scorer.score(EXAMPLES, 8))
    assert len(list(scorer.score(EXAMPLES, 8))) == len(EXAMPLES)


def commands(fake: Fake, root: Path) -> tuple[object, ...]:
    rows = [{"prompt": f"user {each}", "completion": f"the answer {each}"} for each in range(6)]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("score", "--engine", "server", "--server-url", fake.url, "--model", fake.files.folder,
            "--server-model", NAME, "--demonstrations", root / "chats.jsonl", "--shard-size", 2,
            "--top-k", 8, "--max-length", 200, "--out", root / "scores")  # fmt: skip


def test_another_model_after_a_while_is_noticed_before_its_scores_are_stored(
    fake: Fake, tmp_path: Path
) -> None:
    """Also by a run that begins with the other model."""
    command, out = commands(fake, tmp_path), tmp_path / "scores"
    right = fake.completion

    def other_in_the_second_shard(body: dict[str, Any]) -> tuple[int, Any]:
        if (out / "shard-00000.json").exists():
            fake.temperature = 0.05
        return right(body)

    fake.completion = other_in_the_second_shard  # pyright: ignore[reportAttributeAccessIssue]
    assert "another model than at the start: finished shards are kept" in qpipe(
        *command, fails=True
    )
    assert "another model than for the shards that are there" in qpipe(*command, fails=True)
    assert not (out / "manifest.json").exists()
    fake.completion, fake.temperature = right, 1.0
    qpipe(*command)
    ours = list(read_scores(out))
    qpipe(*command[:-1], tmp_path / "undisturbed")
    theirs = list(read_scores(tmp_path / "undisturbed"))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.observed_log_probs, other.observed_log_probs)


@pytest.mark.parametrize("value", [None, -1e300, -9999.0, 0.5])
def test_a_short_text_without_log_probabilities_is_refused(fake: Fake, value: float | None) -> None:
    """By which its model would be known again: a difference from -inf is none."""
    right = fake.completion

    def spoilt(body: dict[str, Any]) -> tuple[int, Any]:
        status, answer = right(body)
        rows = answer["choices"][0]["prompt_logprobs"]
        for place in range(1, len(rows) if len(rows) > 2 else 0):
            entries = {token: entry | {"logprob": value} for token, entry in rows[place].items()}
            rows[place] = None if value is None else entries
        return status, answer

    fake.completion = spoilt  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="lacks log-probabilities of the prompt's tokens"):
        make_scorer(fake.files, settings_for(fake))


def test_a_model_that_is_gone_when_a_shard_is_stored_is_one_clear_line(fake: Fake) -> None:
    scorer = make_scorer(fake.files, settings_for(fake))
    assert isinstance(scorer, ServerScorer)
    fake.faults = [404]
    with pytest.raises(
        UserError, match=r"refuses a request: status 404 .*finished shards are kept"
    ):
        scorer.check_same()
