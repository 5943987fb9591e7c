"""Answers that do not come, come late, or do not end: asked for again, or one clear line."""

import gzip
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import ScoredExample
from qpipe.stages.engines.choose import make_scorer
from qpipe.tests.support.examples import unweighted

from .fake import EXAMPLES, Fake, Raw, assert_same, settings_for

PACKED = Raw(200, gzip.compress(gzip.compress(b" " * 2**24)), {"Content-Encoding": "gzip, gzip"})


@pytest.mark.parametrize(
    "fault",
    [
        503,
        429,
        500,
        "drop",
        "half",
        b"<html>",
        b"",
        b"{}",
        b'{"choices": [{"prompt_logprobs": 1}]}',
        b'{"x": ' + b"[" * 200_000,
        PACKED,
    ],
    ids=lambda fault: str(fault)[:40],
)
def test_what_passes_is_tried_again(
    fake: Fake, expected: Callable[[int], list[ScoredExample]], fault: Any
) -> None:
    scorer = make_scorer(fake.files, settings_for(fake))
    fake.requests, fake.faults = 0, [fault, None, fault, fault]
    by_place = dict(scorer.score(EXAMPLES, 8))
    assert_same([by_place[place] for place in range(len(EXAMPLES))], expected(8))
    assert fake.requests == len(EXAMPLES) + 3


def test_a_late_answer_is_tried_again(
    fake: Fake, expected: Callable[[int], list[ScoredExample]]
) -> None:
    scorer = make_scorer(fake.files, settings_for(fake, timeout=0.8))
    fake.faults = ["hang"]
    by_place = dict(scorer.score(EXAMPLES[:2], 8))
    assert_same([by_place[0], by_place[1]], expected(8)[:2])


@pytest.mark.parametrize(
    ("fault", "words"),
    [("drip", "the answer took more than 1 s"), ("flood", "an answer of more than 16,7")],
)
def test_an_answer_that_does_not_end_is_not_waited_for(fake: Fake, fault: str, words: str) -> None:
    scorer = make_scorer(fake.files, settings_for(fake, tries=2, timeout=1.0))
    fake.faults = [fault, fault]
    start = time.monotonic()
    with pytest.raises(UserError, match=words):
        list(scorer.score(EXAMPLES[:1], 8))
    assert time.monotonic() - start < 6


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Raw(302, b"", {"Location": "http://127.0.0.2:1/"}), "refuses a request: status 302"),
        (Raw(200, b'{"error": {"message": "no room"}}'), 'missing required .*"no room"'),
        (Raw(200, b"\0" * 2**20, {"Content-Type": "image/png"}), "an answer that cannot be read"),
        (PACKED, "DecodingError its content encoding is gzip, gzip, none was asked for"),
    ],
)
def test_answers_of_another_kind_are_one_clear_line(fake: Fake, answer: Raw, words: str) -> None:
    """A redirection, an error called a success, and what expands a thousandfold each time."""
    scorer = make_scorer(fake.files, settings_for(fake, tries=2))
    fake.faults = [answer] * 2
    with pytest.raises(UserError, match=words) as raised:
        list(scorer.score(EXAMPLES[:1], 8))
    assert len(str(raised.value)) < 900


def test_cookies_are_not_kept(fake: Fake) -> None:
    scorer = make_scorer(fake.files, settings_for(fake))
    right = json.dumps(fake.completion({"prompt": [1, 2], "prompt_logprobs": 8})[1]).encode()
    fake.faults = [Raw(200, right, {"Set-Cookie": "a=" + "x" * 4000})]
    two = unweighted("two", np.array([1, 2], np.int32), np.array([1], np.int32))
    for _ in range(2):
        list(scorer.score([two], 8))
    assert "Cookie" not in fake.headers
    assert fake.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("fault", "words"), [(503, "status 503"), ("drop", "RemoteProtocol"), (b"<", "cannot be read")]
)
def test_what_does_not_pass_is_one_clear_line(fake: Fake, fault: Any, words: str) -> None:
    scorer = make_scorer(fake.files, settings_for(fake, tries=3))
    fake.requests, fake.faults = 0, [fault] * 100
    with pytest.raises(UserError, match="no answer in 3 tries") as raised:
        list(scorer.score(EXAMPLES[:1], 8))
    assert fake.requests == 3
    for each in (fake.url, words, "finished shards are kept"):
        assert each in str(raised.value)
