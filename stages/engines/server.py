"""The server engine: a running vLLM server, over its OpenAI-compatible `/v1/completions`.

Prompts are sent as token ids. The answer has a dict for each token: the observed token and the top
k, by id, each with log-probability and rank. A bounded number of requests is in flight, and each
answer is converted to arrays as it arrives.
"""

import asyncio
import os
import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import httpx
import msgspec
import numpy as np

from ...pipeline.errors import UserError, one_line
from ...pipeline.format.batches import flatten
from ...pipeline.format.records import Example, ScoredExample, WeightedExample
from ...pipeline.format.row_checks import MASS_TOLERANCE, violations
from ...pipeline.format.schema import schema_of
from ...trainer.models.files import ModelFiles
from .base import GivenIds, contradicts_tail, scored
from .settings import EngineSettings, ServerSettings

_START_TRIES = 3  # a missing server is reported soon
_LONGEST_WAIT = 60.0  # seconds between two tries
_CONNECT_SECONDS = 10.0
_NONE = -9999.0  # vLLM's log-probability of a token that a sampling option excludes
_BYTES_ENTRY = 256  # of JSON for one token's log-probability; as a rule below 100
_BYTES_BESIDE = 2**24  # of the rest of an answer
_PROBE = "Bonjour, 1 + 1 = 2!\nЖ"

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]  # ids and ranks


class _Entry(msgspec.Struct):
    logprob: float
    rank: _Count


_Prompt = list[dict[_Count, _Entry] | None]


class _Choice(msgspec.Struct):
    prompt_logprobs: _Prompt


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _RefusedError(Exception):
    """Raised when the server rejects a request as invalid."""


class _Api:
    """Requests to a server, retried while it is busy, failing or unreachable."""

    def __init__(self, server: ServerSettings) -> None:
        self.server = server
        self.client = new_client(server)

    async def models(self) -> list[_Model]:
        """The models that the server serves."""
        try:
            return (await self.ask("/v1/models", _Models)).data
        except _RefusedError as error:
            raise UserError(
                f"server {self.server.url}: does not list its models: {one_line(error)}: give the "
                "address of a vLLM server, as in http://host:8000"
            ) from error

    async def ask(
        self, path: str, kind: type, body: Any = None, tries: int = _START_TRIES, entries: int = 0
    ) -> Any:
        """Send a request, a POST if it has a body, and return the answer as a `kind`.

        `entries` is the number of log-probabilities in the answer, which bounds its size. Raises
        _RefusedError for an invalid request, UserError after the last try.
        """
        most, trouble = _BYTES_BESIDE + entries * _BYTES_ENTRY, ""
        for attempt in range(tries):
            if attempt:
                await asyncio.sleep(self._wait(attempt))
            try:
                async with asyncio.timeout(self.server.timeout):
                    status, content = await self._send(path, body, most)
            except TimeoutError:
                trouble = f"the answer took more than {self.server.timeout:g} s"
                continue
            except (httpx.TransportError, httpx.DecodingError) as error:
                trouble = f"{type(error).__name__} {one_line(error)}".strip()
                continue
            if status == 429 or status >= 500:
                trouble = f"status {status} {_text(content)}"
            elif status != 200:
                raise _RefusedError(f"status {status} {_text(content)}")
            else:
                try:
                    return msgspec.json.decode(content, type=kind)
                except msgspec.DecodeError as error:
                    trouble = f"an answer that cannot be read: {one_line(error)}"
        raise UserError(
            f"server {self.server.url}: no answer in {tries} tries: {trouble}: finished shards are "
            "kept: run again when it is back"
        )

    async def _send(self, path: str, body: Any, most: int) -> tuple[int, bytes]:
        """The status and content of one response, of at most `most` bytes."""
        content = bytearray()
        method = "GET" if body is None else "POST"
        async with self.client.stream(method, path, json=body) as response:
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > most:
                    raise httpx.ReadError(f"an answer of more than {most:,} bytes")
        return response.status_code, bytes(content)

    def _wait(self, attempt: int) -> float:
        """Seconds before a retry: exponential backoff with jitter."""
        longest = min(_LONGEST_WAIT, self.server.first_wait * 2 ** (attempt - 1))
        return longest * random.uniform(0.5, 1)


class ServerScorer:
    """A model run by a vLLM server; tokenizer and vocabulary come from local files."""

    def __init__(self, model: ModelFiles, settings: EngineSettings) -> None:
        self.model = model
        self.server = settings.server
        self.api = _Api(settings.server)
        self.runner = asyncio.Runner()
        self.runner.run(self._check(settings.max_length))

    def score(
        self, examples: Sequence[WeightedExample], top_k: int, at: Sequence[GivenIds] | None = None
    ) -> Iterator[tuple[int, ScoredExample]]:
        """Yield each example's index in `examples` and its scores, as the server answers."""
        assert at is None, "choose_engine refuses given ids"
        waiting = iter(enumerate(examples))
        running: dict[asyncio.Task[ScoredExample], int] = {}

        async def advance() -> set[asyncio.Task[ScoredExample]]:
            while len(running) < self.server.concurrency:
                place, example = next(waiting, (-1, None))
                if example is None:
                    break
                running[asyncio.create_task(self._score(example, top_k))] = place
            if not running:
                return set()
            return (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]

        async def cancel() -> None:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

        try:
            while done := self.runner.run(advance()):
                for task in done:
                    yield running.pop(task), task.result()
        finally:
            self.runner.run(cancel())

    async def _score(self, example: WeightedExample, top_k: int) -> ScoredExample:
        try:
            prompt = await self._prompt(example.input_ids.tolist(), top_k, self.server.tries)
        except _RefusedError as error:
            raise self._refused(error) from error
        return _scored(example, prompt, top_k, self.model.vocab_size)

    async def _prompt(self, token_ids: list[int], count: int, tries: int) -> _Prompt:
        """The log-probabilities of a prompt, `count` at each token; -1 is all."""
        body = {
            "model": self.server.model,
            "prompt": token_ids,
            "prompt_logprobs": count,
            "max_tokens": 1,
            "temperature": 0,
        }
        entries = len(token_ids) * (1 + (self.model.vocab_size if count < 0 else count))
        answer = await self.api.ask("/v1/completions", _Completion, body, tries, entries)
        prompt = answer.choices[0].prompt_logprobs if len(answer.choices) == 1 else []
        if len(prompt) != len(token_ids):
            raise UserError(
                f"server {self.server.url}: {len(prompt)} entries for a prompt of "
                f"{len(token_ids)} tokens: finished shards are kept: a vLLM server is needed here"
            )
        return prompt

    def _refused(self, error: _RefusedError) -> UserError:
        words = one_line(error)
        way_out = "check that it serves this model"
        if "logprobs" in words:
            way_out = "start it with `vllm serve --max-logprobs -1`, or give a smaller --top-k"
        return UserError(
            f"server {self.server.url}: refuses a request: {words}: {way_out}: finished shards are "
            "kept"
        )

    async def _check(self, max_length: int) -> None:
        """Raise UserError for a server that runs another model, as far as its answers show."""
        await self._check_length(max_length)
        await self._check_tokenizer()
        await self._check_vocabulary()

    async def _check_length(self, max_length: int) -> None:
        models = await self.api.models()
        found = next((each for each in models if each.id == self.server.model), None)
        if found is None:
            names = ", ".join(each.id for each in models)
            raise UserError(
                f"--server-model {self.server.model}: {self.server.url} does not serve it: give "
                f"one of {names}"
            )
        needed = max_length + 1  # a prompt needs one free position
        if found.max_model_len is not None and found.max_model_len < needed:
            raise UserError(
                f"server {self.server.url}: takes {found.max_model_len} tokens, demonstrations of "
                f"--max-length {max_length} need {needed}: start it with --max-model-len {needed}, "
                f"or give --max-length {found.max_model_len - 1} or less"
            )

    async def _check_tokenizer(self) -> None:
        body = {"model": self.server.model, "prompt": _PROBE, "add_special_tokens": False}
        try:
            answer = await self.api.ask("/tokenize", _Tokens, body)
        except _RefusedError:
            return  # the server does not offer this
        ours = self.model.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        if answer.tokens != ours:
            raise UserError(
                f"server {self.server.url}: its tokenizer is another one than that of --model "
                f"{self.model.name}: give the model that it serves"
            )

    async def _check_vocabulary(self) -> None:
        """Compare vocabulary sizes by a whole distribution or, if refused, by the last ids."""
        vocab_size = self.model.vocab_size
        try:
            whole = await self._prompt([vocab_size - 1, 0], -1, _START_TRIES)
        except _RefusedError as error:
            if "logprobs" not in str(error):
                raise self._disagrees(f"it refuses token {vocab_size - 1}") from error
            await self._check_edges(vocab_size)
            return
        entries = whole[1] or {}
        if len(entries) != vocab_size or max(entries) >= vocab_size:
            raise self._disagrees(f"its distributions have {len(entries)} tokens")
        mass = float(np.exp([entry.logprob for entry in entries.values()]).sum())
        if abs(mass - 1) > MASS_TOLERANCE:
            raise _unnormalised(mass)

    async def _check_edges(self, vocab_size: int) -> None:
        for token in (vocab_size - 1, vocab_size):
            try:
                await self._prompt([token, 0], 1, _START_TRIES)
                taken = True
            except _RefusedError as error:
                if "logprobs" in str(error):
                    raise self._refused(error) from error
                taken = False
            if taken != (token < vocab_size):
                raise self._disagrees(f"it {'takes' if taken else 'refuses'} token {token}")

    def _disagrees(self, what: str) -> UserError:
        return UserError(
            f"server {self.server.url}: {what}, the vocabulary of --model {self.model.name} has "
            f"{self.model.vocab_size}: give the model that it serves"
        )


def served_model(server: ServerSettings) -> str:
    """The name of the model on a server: the given one, or the only one it serves.

    Raises UserError if the server cannot be reached, or serves several models.
    """
    if server.model is not None:
        return server.model

    api = _Api(server)

    async def ask() -> list[_Model]:
        async with api.client:
            return await api.models()

    models = asyncio.run(ask())
    if len(models) != 1:
        names = ", ".join(each.id for each in models) or "none"
        raise UserError(f"server {server.url}: serves {names}: name one with --server-model")
    return models[0].id


def new_client(server: ServerSettings) -> httpx.AsyncClient:
    """A client of the server, with the key in VLLM_API_KEY if that is set.

    Raises UserError for a key that is not ASCII.
    """
    key = os.environ.get("VLLM_API_KEY", "")
    if not key.isascii():
        raise UserError("VLLM_API_KEY: not ASCII: give a key of ASCII characters")
    try:
        client = httpx.AsyncClient(
            base_url=server.address,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(server.timeout, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=server.concurrency),
            trust_env=False,  # proxies of the environment are for the web
        )
        client.build_request("GET", "/")  # checks the host
        if (client.base_url.port or 0) > 65535:
            raise httpx.InvalidURL("a port is at most 65535")
        return client
    except (httpx.InvalidURL, UnicodeError) as error:
        raise UserError(
            f"--server-url {server.url}: {one_line(error)}: give one as in http://host:8000"
        ) from error


def _text(content: bytes) -> str:
    """The text of an error, on one line."""
    return one_line(Exception(content[:4096].decode(errors="replace")))


def _scored(
    example: WeightedExample, prompt: _Prompt, top_k: int, vocab_size: int
) -> ScoredExample:
    """The scores in a server's answer.

    It holds each id once, so for an observed token in the top k its rank is its place there.
    """
    N = len(example.positions)
    ids_Nk = np.empty((N, top_k), np.int32)
    log_probs_Nk = np.full((N, top_k), np.nan, np.float32)
    observed_N = np.empty(N, np.float32)
    ranks_N = np.empty(N, np.int32)
    for n, (position, token) in enumerate(
        zip(example.positions.tolist(), example.observed_ids.tolist(), strict=True)
    ):
        entries = prompt[position] or {}
        ids_E = np.fromiter(entries, np.int64, len(entries))
        log_probs_E = np.fromiter((e.logprob for e in entries.values()), np.float32, len(entries))
        ranks_E = np.fromiter((e.rank for e in entries.values()), np.int64, len(entries))
        is_top_E = (ranks_E >= 1) & (ranks_E <= top_k)
        if token not in entries or is_top_E.sum() != top_k or ids_E.max() >= vocab_size:
            raise UserError(
                f"example {example.id}: the server's answer for token {position} holds "
                f"{int(is_top_E.sum())} of the top {top_k}, or not the token itself, or ids "
                "outside the vocabulary: finished shards are kept: a vLLM server is needed here"
            )
        ids_Nk[n, ranks_E[is_top_E] - 1] = ids_E[is_top_E]
        log_probs_Nk[n, ranks_E[is_top_E] - 1] = log_probs_E[is_top_E]
        observed_N[n] = entries[token].logprob
        ranks_N[n] = entries[token].rank
    is_inside_N = ranks_N <= top_k
    as_probable_N = (log_probs_Nk >= observed_N[:, None]).sum(axis=1)
    ranks_N = np.where(is_inside_N, as_probable_N, ranks_N).astype(np.int32)
    masses_N = np.exp(log_probs_Nk.astype(np.float64)).sum(axis=1)
    if N and masses_N.max() > 1 + MASS_TOLERANCE:
        raise _unnormalised(float(masses_N.max()))
    if (observed_N <= _NONE).any() or (log_probs_Nk <= _NONE).any():
        raise _impossible(example, f"{_NONE:g} is not a log-probability, but stands for none")
    if (~is_inside_N & (observed_N > log_probs_Nk[:, -1])).any():
        raise _impossible(example, "a token outside of the top k is more probable than one of them")
    if contradicts_tail(observed_N, ranks_N, log_probs_Nk, vocab_size).any():
        raise _impossible(example, "the tokens outside of the top k cannot have the rest of 1")
    made = scored(example, observed_N, ranks_N, ids_Nk, log_probs_Nk, vocab_size)
    for wrong in violations("score", flatten(schema_of("score", vocab_size), [made]), vocab_size):
        raise _impossible(example, f"{wrong.column} {wrong.what}")
    return made


def _impossible(example: Example, what: str) -> UserError:
    return UserError(
        f"example {example.id}: the server's answer is impossible: {what}: finished shards are "
        "kept: a vLLM server is needed here"
    )


def _unnormalised(mass: float) -> UserError:
    return UserError(
        f"the server's probabilities add up to {mass:.4f}: start it with `vllm serve "
        "--logprobs-mode raw_logprobs`: finished shards are kept"
    )
