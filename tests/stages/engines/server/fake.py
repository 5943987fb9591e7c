"""A real HTTP server that misbehaves on demand.

Its good answers are computed with the tiny model, in the form that vLLM's have; the real server is
in tests/e2e/test_server.py.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import torch
from qpipe.pipeline.format.records import ScoredExample, WeightedExample
from qpipe.stages.engines.choose import make_scorer
from qpipe.stages.engines.settings import EngineSettings, ServerSettings
from qpipe.tests.support.examples import unweighted
from qpipe.trainer.models.files import ModelFiles

VOCAB = 320


NAME = "tiny"
EMPTY: Mapping[str, str] = {}


def example(seed: int, length: int) -> WeightedExample:
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.choice(np.arange(1, length), min(length - 1, 20), replace=False))
    ids = rng.integers(0, VOCAB, length).astype(np.int32)
    return unweighted(f"e{seed}", ids, positions.astype(np.int32))


EXAMPLES = [example(seed, length) for seed, length in enumerate((2, 40, 255, 7, 90, 33, 12, 60))]


@dataclass(frozen=True)
class Raw:
    """A response as it is sent."""

    status: int
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fake:
    """A server's answers, and what it does instead of giving them."""

    files: ModelFiles
    model: Any
    models: list[dict[str, Any]] = field(
        default_factory=lambda: [{"id": NAME, "max_model_len": 256}]
    )
    max_logprobs: int = -1
    vocab_size: int = VOCAB
    temperature: float = 1.0
    faults: list[Any] = field(default_factory=list)  # what happens to the next completions
    tokenizes: Callable[[list[int]], list[int] | None] = lambda ids: ids
    url: str = ""
    delay: float = 0.0
    generates: bool = False  # has `/inference/v1/generate`
    reads: Callable[[list[int]], list[int] | None] = lambda ids: ids
    requests: int = 0
    at_a_time: int = 0
    most_at_a_time: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    key: str = ""  # without it nothing is answered
    lock: Any = field(default_factory=threading.Lock)

    @torch.inference_mode()
    def log_probs(self, token_ids: list[int]) -> torch.Tensor:
        logits = self.model(torch.tensor([token_ids])).logits[0].float()
        return (logits / self.temperature).log_softmax(-1)

    def completion(self, body: dict[str, Any]) -> tuple[int, Any]:
        """As vLLM answers: an id stands once, the observed one first, with the later rank."""
        token_ids, count = body["prompt"], body["prompt_logprobs"]
        if max(token_ids) >= self.vocab_size:
            return 400, {"error": {"message": f"Token id {max(token_ids)} is out of vocabulary"}}
        wanted = self.vocab_size if count == -1 else count
        if self.max_logprobs != -1 and wanted > self.max_logprobs:
            return 400, {
                "error": {
                    "message": f"Requested prompt logprobs of {wanted}, which is greater than max "
                    f"allowed: {self.max_logprobs}"
                }
            }
        entries: list[Any] = [None]
        dense = self.log_probs([min(each, VOCAB - 1) for each in token_ids])
        for row, observed in zip(dense[:-1], token_ids[1:], strict=True):
            top = row.topk(min(wanted, VOCAB))
            rank = int((row >= row[observed]).sum())
            found = {observed: {"logprob": float(row[observed]), "rank": rank}}
            for place, (token, value) in enumerate(
                zip(top.indices.tolist(), top.values.tolist(), strict=True), 1
            ):
                found[token] = {"logprob": value, "rank": place, "decoded_token": "x"}
            for token in range(VOCAB, self.vocab_size if count == -1 else 0):
                found[token] = {"logprob": -9999.0, "rank": token}
            entries.append(found)
        choice = {"text": "", "prompt_logprobs": entries}
        if body.get("return_token_ids"):
            choice["prompt_token_ids"] = self.reads(token_ids)
        return 200, {"id": "c", "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def do_GET(self) -> None:
        if self.fake.key not in self.headers.get("Authorization", ""):
            return self.answer(401, {"error": "Unauthorized"})
        self.answer(200, {"data": self.fake.models})

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.headers = dict(self.headers)
        if self.path == "/tokenize":
            ids = fake.files.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            ids = fake.tokenizes(list(ids))
            return self.answer(404, {}) if ids is None else self.answer(200, {"tokens": ids})
        if self.path == "/inference/v1/generate":
            if not fake.generates:
                return self.answer(404, {})
            sampling = body.pop("sampling_params")
            assert sampling.pop("detokenize") is False
            body |= sampling | {"prompt": body.pop("token_ids")}
        with fake.lock:
            fake.requests += 1
            fake.at_a_time += 1
            fake.most_at_a_time = max(fake.most_at_a_time, fake.at_a_time)
            fault = fake.faults.pop(0) if fake.faults else None
        try:
            time.sleep(fake.delay)
            status, answer = fake.completion(body)
            match fault:
                case int():
                    self.answer(fault, {"error": "busy"})
                case "hang":
                    time.sleep(1.5)
                case "drop":
                    self.connection.shutdown(socket.SHUT_RDWR)
                case "half":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                case bytes():
                    self.answer(200, fault)
                case Raw():
                    self.answer(fault.status, fault.content, fault.headers)
                case "drip" | "flood":
                    self.pour(fault)
                case None if status == 200 and self.path == "/inference/v1/generate":
                    self.answer(status, answer["choices"][0])
                case None:
                    self.answer(status, answer)
                case spoil:
                    spoil(answer)
                    self.answer(status, answer)
        finally:
            with fake.lock:
                fake.at_a_time -= 1

    def pour(self, how: str) -> None:
        """Send an answer that does not end: slowly, or as fast as it is read."""
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            for _ in range(200 if how == "drip" else 10**6):
                self.wfile.write(b" " if how == "drip" else b" " * 2**20)
                self.wfile.flush()
                time.sleep(0.05 if how == "drip" else 0)

    def answer(self, status: int, value: Any, headers: Mapping[str, str] = EMPTY) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def settings_for(fake: Fake, max_length: int = 255, **options: Any) -> EngineSettings:
    server = ServerSettings(fake.url, NAME, timeout=20, first_wait=0.01)
    return EngineSettings(
        "server", "float32", max_length=max_length, server=replace(server, **options)
    )


def run(fake: Fake, top_k: int = 8, **options: Any) -> list[ScoredExample]:
    scorer = make_scorer(fake.files, settings_for(fake, **options))
    by_place = dict(scorer.score(EXAMPLES, top_k))
    return [by_place[place] for place in range(len(EXAMPLES))]


def assert_same(ours: Sequence[ScoredExample], theirs: Sequence[ScoredExample]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.id == other.id
        np.testing.assert_allclose(one.observed_log_probs, other.observed_log_probs, atol=1e-4)
        np.testing.assert_allclose(one.topk_log_probs, other.topk_log_probs, atol=1e-4)
        np.testing.assert_allclose(one.tail_mass, other.tail_mass, atol=1e-4)
        assert np.mean(one.topk_ids == other.topk_ids) > 0.99  # but for ties
        assert np.abs(one.observed_ranks - other.observed_ranks).max() <= 1
