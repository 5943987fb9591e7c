"""The server scorer against a real HTTP server that misbehaves on demand.

Its good answers are computed with the tiny model, in the form that vLLM's have; the real server is
in tests/e2e/test_server.py.
"""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import ScoredExample, WeightedExample
from qpipe.stages.engines.choose import choose_engine, make_scorer
from qpipe.stages.engines.server.scorer import served_model
from qpipe.stages.engines.settings import EngineSettings, Host, ServerSettings
from qpipe.stages.score.stage import ScoreStage
from qpipe.tests.support.examples import unweighted
from qpipe.tests.support.settings import score_settings
from qpipe.trainer.models.files import ModelFiles, find_model

VOCAB = 320
NAME = "tiny"


def example(seed: int, length: int) -> WeightedExample:
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.choice(np.arange(1, length), min(length - 1, 20), replace=False))
    ids = rng.integers(0, VOCAB, length).astype(np.int32)
    return unweighted(f"e{seed}", ids, positions.astype(np.int32))


EXAMPLES = [example(seed, length) for seed, length in enumerate((2, 40, 255, 7, 90, 33, 12, 60))]


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

    def answer(self, status: int, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def files(tiny_model: Path) -> ModelFiles:
    return find_model(str(tiny_model))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def fake(files: ModelFiles, model: Any) -> Iterator[Fake]:
    fake = Fake(files, model)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": fake}))
    server.handle_error = lambda *_: None  # clients that gave up
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


def settings_for(fake: Fake, max_length: int = 255, **options: Any) -> EngineSettings:
    server = ServerSettings(fake.url, NAME, timeout=20, first_wait=0.01)
    return EngineSettings(
        "server", "float32", max_length=max_length, server=replace(server, **options)
    )


def run(fake: Fake, top_k: int = 8, **options: Any) -> list[ScoredExample]:
    scorer = make_scorer(fake.files, settings_for(fake, **options))
    by_place = dict(scorer.score(EXAMPLES, top_k))
    return [by_place[place] for place in range(len(EXAMPLES))]


@pytest.fixture(scope="module")
def expected(files: ModelFiles) -> Callable[[int], list[ScoredExample]]:
    scorer = make_scorer(files, EngineSettings("transformers", "float32", max_length=255))

    def scores(top_k: int) -> list[ScoredExample]:
        by_place = dict(scorer.score(EXAMPLES, top_k))
        return [by_place[place] for place in range(len(EXAMPLES))]

    return scores


def assert_same(ours: Sequence[ScoredExample], theirs: Sequence[ScoredExample]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.id == other.id
        np.testing.assert_allclose(one.observed_log_probs, other.observed_log_probs, atol=1e-4)
        np.testing.assert_allclose(one.topk_log_probs, other.topk_log_probs, atol=1e-4)
        np.testing.assert_allclose(one.tail_mass, other.tail_mass, atol=1e-4)
        assert np.mean(one.topk_ids == other.topk_ids) > 0.99  # but for ties
        assert np.abs(one.observed_ranks - other.observed_ranks).max() <= 1


@pytest.mark.parametrize("top_k", [1, 8, VOCAB])
def test_scores_are_those_of_transformers(
    fake: Fake, expected: Callable[[int], list[ScoredExample]], top_k: int
) -> None:
    assert_same(run(fake, top_k), expected(top_k))


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
    ],
    ids=str,
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


def test_a_failure_ends_what_is_under_way_and_the_scorer_goes_on(fake: Fake) -> None:
    scorer = make_scorer(fake.files, settings_for(fake, concurrency=4))
    fake.faults = [spoil_length]
    with pytest.raises(UserError):
        list(scorer.score(EXAMPLES, 8))
    assert len(list(scorer.score(EXAMPLES, 8))) == len(EXAMPLES)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_requests_under_way_are_bounded(fake: Fake, concurrency: int) -> None:
    fake.delay = 0.05
    run(fake, concurrency=concurrency)
    assert fake.most_at_a_time == concurrency


def test_examples_are_taken_as_there_is_room(fake: Fake) -> None:
    taken: list[int] = []

    class Counted(list[WeightedExample]):
        def __iter__(self) -> Iterator[WeightedExample]:
            for place in range(len(self)):
                taken.append(place)
                yield self[place]

    scores = make_scorer(fake.files, settings_for(fake, concurrency=2)).score(Counted(EXAMPLES), 4)
    next(iter(scores))
    assert len(taken) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": [{"id": "other"}]}, "--server-model tiny: .* does not serve it"),
        ({"models": [{"id": NAME, "max_model_len": 255}]}, "--max-model-len 256"),
        ({"vocab_size": VOCAB + 8}, "328 tokens, the vocabulary of --model tiny has 320"),
        ({"vocab_size": VOCAB - 8}, "refuses token 319"),
        ({"vocab_size": VOCAB + 8, "max_logprobs": 20}, "takes token 320"),
        ({"vocab_size": VOCAB - 8, "max_logprobs": 20}, "refuses token 319"),
        ({"tokenizes": lambda ids: ids[::-1]}, "its tokenizer is another one"),
    ],
)
def test_a_server_of_another_model_is_refused_at_the_start(
    fake: Fake, change: dict[str, Any], words: str
) -> None:
    for name, value in change.items():
        setattr(fake, name, value)
    with pytest.raises(UserError, match=words):
        make_scorer(fake.files, settings_for(fake))


def test_a_distribution_that_is_not_the_models_own_is_refused(fake: Fake) -> None:
    completion = fake.completion

    def scaled(body: Any) -> tuple[int, Any]:
        status, answer = completion(body)
        for row in answer["choices"][0]["prompt_logprobs"][1:]:
            for entry in row.values():
                entry["logprob"] *= 1.3
        return status, answer

    fake.completion = scaled  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=r"add up to 0.*raw_logprobs"):
        make_scorer(fake.files, settings_for(fake))


def test_a_server_that_gives_few_log_probs_says_how_it_gives_more(
    fake: Fake, expected: Callable[[int], list[ScoredExample]]
) -> None:
    fake.max_logprobs = 20
    with pytest.raises(UserError, match="--max-logprobs -1"):
        run(fake, 21)
    assert_same(run(fake, 20), expected(20))


def test_a_server_without_a_tokenizer_service_will_do(fake: Fake) -> None:
    fake.tokenizes = lambda ids: None
    assert len(run(fake)) == len(EXAMPLES)


def test_the_only_model_of_a_server_needs_no_name(fake: Fake) -> None:
    server = ServerSettings(fake.url)
    assert served_model(server) == NAME
    fake.models = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(UserError, match="serves a, b: name one with --server-model"):
        served_model(server)
    assert served_model(replace(server, model="a")) == "a"


def test_the_key_of_the_environment_is_sent(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    run(fake)
    assert fake.headers["Authorization"] == "Bearer secret"


def test_a_server_that_is_not_there_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:9: no answer in 3 tries: Connect"):
        served_model(ServerSettings("http://127.0.0.1:9", first_wait=0.01))


@pytest.mark.parametrize("generates", [True, False])
def test_the_path_without_decoding_is_used_where_it_is(
    fake: Fake, generates: bool, expected: Callable[[int], list[ScoredExample]]
) -> None:
    fake.generates = generates
    assert_same(run(fake), expected(8))
    scorer: Any = make_scorer(fake.files, settings_for(fake))
    assert scorer.generates is generates


@pytest.mark.parametrize("generates", [True, False])
def test_a_server_that_reads_other_tokens_is_refused(fake: Fake, generates: bool) -> None:
    fake.generates = generates
    fake.reads = lambda ids: None  # does not say
    assert len(run(fake)) == len(EXAMPLES)
    fake.reads = lambda ids: [*ids[:-1], 0] if len(ids) > 30 else ids
    with pytest.raises(UserError, match="or it read other tokens"):
        run(fake)


def test_a_model_that_is_replaced_behind_the_address_is_noticed_at_the_end(fake: Fake) -> None:
    settings = settings_for(fake)
    scorer: Any = make_scorer(fake.files, settings)
    scorer.check_same()
    stage: Any = ScoreStage.__new__(ScoreStage)
    stage.engine = settings
    shards: Any = [SimpleNamespace(rows=3, rejects=[])]
    stage.check(shards)  # no engine was started
    stage.scorer = scorer
    stage.check(shards)
    fake.temperature = 0.05
    with pytest.raises(UserError, match="runs another model than at the start: score again"):
        stage.check(shards)


def test_given_ids_are_not_for_a_server() -> None:
    with pytest.raises(UserError, match="--engine server cannot score given ids"):
        choose_engine("server", Host(has_gpu=True, has_vllm=True), gathers=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "server"}, "needs --server-url"),
        ({"engine": "vllm", "server_url": "http://a"}, "goes with --engine server"),
        ({"engine": "vllm", "server_model": "m"}, "--server-model m: goes with --engine server"),
        ({"engine": "server", "server_url": "host:8000"}, "--server-url host:8000: not an address"),
        ({"server_requests": 0}, "--server-requests 0 is out of range"),
        ({"server_timeout": 0}, "--server-timeout 0 is out of range"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        score_settings(model="m", out=Path("o"), demonstrations=("d",), **options)


@pytest.mark.parametrize(
    "url",
    ["http://host:abc", "http://[::1", "http://127.0.0.1:99999", "http://xn--zz"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=f"--server-url {re.escape(url)}: .*as in http://host"):
        served_model(ServerSettings(url))


def test_a_key_that_no_header_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "schlüssel")
    with pytest.raises(UserError, match="VLLM_API_KEY: not ASCII"):
        served_model(ServerSettings("http://127.0.0.1:9"))


def test_the_address_may_end_as_openai_clients_want_it() -> None:
    for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"):
        settings = score_settings(
            model="m", out=Path("o"), demonstrations=("d",), engine="server", server_url=url
        )
        assert settings.engine.server.address == "http://a:1"


def test_tokens_that_tie_within_the_top_k_share_the_last_rank(fake: Fake) -> None:
    """vLLM numbers them one after the other."""

    class Tied:
        def __call__(self, ids: torch.Tensor) -> Any:
            logits = torch.zeros(1, ids.shape[1], VOCAB)
            logits[..., 7] = 3.0
            logits[..., [1, 9, 200]] = 2.0
            return SimpleNamespace(logits=logits)

    fake.model = Tied()
    scorer = make_scorer(fake.files, settings_for(fake))
    tied = unweighted(
        "tied", np.array([0, 9, 7, 1, 200], np.int32), np.arange(1, 5, dtype=np.int32)
    )
    ((_, found),) = scorer.score([tied], 8)
    assert found.observed_ranks.tolist() == [4, 1, 4, 4]
