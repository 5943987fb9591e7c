"""What a server answers: scores that can be, or a line that says what is wrong with the answer."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from qpipe.pipeline.format.arrow import decode, encode
from qpipe.pipeline.format.batches import flatten
from qpipe.pipeline.format.records import ScoredExample
from qpipe.pipeline.format.row_checks import violations
from qpipe.pipeline.format.schema import schema_of
from qpipe.stages.engines.server import api
from qpipe.stages.engines.server.scorer import ServerScorer, served_model
from qpipe.stages.engines.settings import EngineSettings, ServerSettings
from qpipe.tests.support.examples import unweighted

from .inputs import Draw, damaged, fuzz, made_or_refused, odd_values, spoilt

V, NAME = 12, "tiny"
TOKENS = np.array([3, 1, 4, 1, 5], np.int32)
POSITIONS = np.array([1, 3, 4], np.int32)


def distributions(seed: int, scale: float) -> NDArray[np.float64]:
    """What a model gives behind each of the tokens, [T, V]."""
    logits = np.random.default_rng(seed).normal(0, scale, (len(TOKENS), V))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def completion(logs_TV: NDArray[np.float64], tokens: list[int], count: int) -> Any:
    """As vLLM answers: the observed token first, an id once."""
    entries: list[Any] = [None]
    for logs_V, token in zip(logs_TV, tokens[1:], strict=False):
        order = np.argsort(-logs_V, kind="stable")[: V if count == -1 else count].tolist()
        rank = int((logs_V >= logs_V[token]).sum())
        found = {str(token): {"logprob": float(logs_V[token]), "rank": rank}}
        for place, each in enumerate(order, 1):
            found[str(each)] = {"logprob": float(logs_V[each]), "rank": place}
        entries.append(found)
    return {"id": "c", "choices": [{"text": "", "prompt_logprobs": entries}]}


@dataclass
class Fake:
    """A server that answers a model's requests, the last of its answers as it is told."""

    answers: dict[str, bytes] = field(default_factory=dict)  # by the end of the path

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.rpartition("/")[2]
        if path == "generate":
            return httpx.Response(404)
        if path in self.answers:
            return httpx.Response(200, content=self.answers[path])
        return httpx.Response(200, json=self.right(path, request.content))

    def right(self, path: str, content: bytes) -> Any:
        if path == "models":
            return {"data": [{"id": NAME, "max_model_len": 64}]}
        body = json.loads(content)
        if path == "tokenize":
            return {"tokens": tokenise(body["prompt"])["input_ids"]}
        rows_TV = np.resize(distributions(0, 1.0), (len(body["prompt"]), V))
        return completion(rows_TV, body["prompt"], body["prompt_logprobs"])


def tokenise(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) % V for character in text]}


MODEL: Any = SimpleNamespace(vocab_size=V, name=NAME, tokenizer=tokenise)
SERVER = ServerSettings("http://server", NAME, tries=1, first_wait=0.0)


def asked(fake: Fake, ask: Callable[[], Any]) -> Any:
    """What comes of asking, with the fake behind the address."""
    client = httpx.AsyncClient(transport=httpx.MockTransport(fake), base_url=SERVER.url)
    with patch.object(api, "new_client", lambda _: client):
        return ask()


@cache
def scorer_and_fake() -> tuple[ServerScorer, Fake]:
    fake = Fake()
    settings = EngineSettings("server", "float32", max_length=32, server=SERVER)
    return asked(fake, lambda: ServerScorer(MODEL, settings)), fake


def scores_of(answer: bytes, top_k: int) -> ScoredExample | None:
    """What is stored of an answer."""
    scorer, fake = scorer_and_fake()
    fake.answers = {"completions": answer}
    example = unweighted("a", TOKENS, POSITIONS)
    found = made_or_refused(lambda: list(scorer.score([example], top_k)))
    if found is None:
        return None
    ((place, made),) = found
    assert place == 0
    schema = schema_of("score", V)
    batch = decode(schema, encode(schema, flatten(schema, [made])), "a shard")
    assert list(violations("score", batch, V)) == []
    return made


@st.composite
def answers(draw: Draw) -> tuple[bytes, int]:
    """An answer for so many entries, its values spoilt or its bytes."""
    top_k = draw(st.integers(1, V))
    logs_TV = distributions(draw(st.integers(0, 3)), draw(st.sampled_from([0.0, 1.0, 30.0, 1e4])))
    right = completion(logs_TV, TOKENS.tolist(), top_k)
    if draw(st.booleans()):
        return draw(damaged(json.dumps(right).encode())), top_k
    numbers = st.floats(-60, 5) | st.integers(-3, 20) | odd_values
    if draw(st.booleans()):
        return as_json(draw(spoilt(right, numbers))), top_k
    prompt = draw(spoilt(right["choices"][0]["prompt_logprobs"], numbers))
    return as_json({"choices": [{"prompt_logprobs": prompt}]}), top_k


def as_json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000


@fuzz(200, drawn=answers())
def test_answers_spoilt(drawn: tuple[bytes, int]) -> None:
    scores_of(*drawn)


@fuzz(40, seed=st.integers(0, 9), scale=st.floats(0.1, 100), top_k=st.integers(1, V))
def test_answers_are_stored_as_they_are(seed: int, scale: float, top_k: int) -> None:
    logs_TV = distributions(seed, scale)
    answer = json.dumps(completion(logs_TV, TOKENS.tolist(), top_k)).encode()
    made = scores_of(answer, top_k)
    assert made is not None
    logs_NV = logs_TV[POSITIONS - 1]
    observed = logs_NV[np.arange(3), TOKENS[POSITIONS]]
    np.testing.assert_allclose(made.observed_log_probs, observed, rtol=1e-6)
    np.testing.assert_array_equal(
        made.observed_ranks, (logs_NV.astype(np.float32) >= observed[:, None].astype("f4")).sum(1)
    )
    kept = -np.sort(-logs_NV, axis=1)[:, :top_k]
    np.testing.assert_allclose(made.topk_log_probs.reshape(3, -1), kept, rtol=1e-6)


@fuzz(
    60,
    path=st.sampled_from(["models", "tokenize", "completions"]),
    value=odd_values
    | spoilt({"data": [{"id": NAME, "max_model_len": 64}]})
    | spoilt({"tokens": tokenise("Bonjour, 1 + 1 = 2!\nЖ")["input_ids"]})
    | spoilt(completion(distributions(0, 1.0), [V - 1, 0], -1)),
)
def test_first_answers_of_anything(path: str, value: Any) -> None:
    fake = Fake({path: as_json(value)})
    settings = EngineSettings("server", "float32", max_length=32, server=SERVER)
    made_or_refused(lambda: asked(fake, lambda: ServerScorer(MODEL, settings)))
    nameless = ServerSettings(SERVER.url, first_wait=0.0)
    made_or_refused(lambda: asked(fake, lambda: served_model(nameless)))
