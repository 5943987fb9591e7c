"""What is refused before the first demonstration is scored."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import ScoredExample
from qpipe.stages.engines.choose import choose_engine, make_scorer
from qpipe.stages.engines.server.scorer import served_model
from qpipe.stages.engines.settings import Host, ServerSettings
from qpipe.tests.support.settings import score_settings

from .fake import NAME, VOCAB, Fake, assert_same, run, settings_for


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


def test_the_only_model_of_a_server_needs_no_name(fake: Fake) -> None:
    server = ServerSettings(fake.url)
    assert served_model(server) == NAME
    fake.models = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(UserError, match="serves a, b: name one with --server-model"):
        served_model(server)
    assert served_model(replace(server, model="a")) == "a"
    fake.models = [{"id": f"{number}{'x' * 900}\n"} for number in range(900)]
    with pytest.raises(UserError, match=r"serves 0xxx.*name one with") as raised:
        served_model(server)
    assert len(str(raised.value)) < 1200
    fake.models = [{"id": "x" * 10**6}]
    with pytest.raises(UserError, match="an answer that cannot be read: Expected `str` of length"):
        served_model(replace(server, first_wait=0.01))


def test_a_server_that_is_not_there_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:9: no answer in 3 tries: Connect"):
        served_model(ServerSettings("http://127.0.0.1:9", first_wait=0.01))


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


@pytest.mark.parametrize("key", ["schlüssel", "secret\n"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(UserError, match="VLLM_API_KEY: not ASCII, or it holds") as raised:
        served_model(ServerSettings("http://127.0.0.1:9"))
    assert key.strip() not in str(raised.value)


def test_a_server_that_wants_a_key_is_told_apart(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.key = "secret"
    with pytest.raises(UserError, match=r"status 401 .*: set VLLM_API_KEY to its API key"):
        served_model(ServerSettings(fake.url))
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert served_model(ServerSettings(fake.url)) == NAME


def test_the_address_may_end_as_openai_clients_want_it() -> None:
    for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"):
        settings = score_settings(
            model="m", out=Path("o"), demonstrations=("d",), engine="server", server_url=url
        )
        assert settings.engine.server.address == "http://a:1"
