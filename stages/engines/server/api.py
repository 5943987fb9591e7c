"""Requests to a vLLM server, retried and bounded, and the answers as structs."""

import asyncio
import os
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Annotated, Any, cast

import httpx
import msgspec

from ....pipeline.errors import UserError, one_line, quoted
from ..settings import ServerSettings

START_TRIES = 3  # a missing server is reported soon
_LONGEST_WAIT = 60.0  # seconds between two tries
_CONNECT_SECONDS = 10.0
_BYTES_ENTRY = 256  # of JSON for one token's log-probability; as a rule below 100
_BYTES_BESIDE = 2**24  # of the rest of an answer
_PLAIN = {"", "identity"}  # content encodings; others may expand without bound
_MOST_NAMES = 10  # of models in a message

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]  # ids and ranks


class Entry(msgspec.Struct):
    logprob: float
    rank: _Count


Prompt = list[dict[_Count, Entry] | None]


class Scored(msgspec.Struct):
    """Log-probabilities of a prompt: the answer of `/inference/v1/generate`, and a choice of that
    of `/v1/completions`."""

    prompt_logprobs: Prompt
    prompt_token_ids: list[int] | None = None  # as the server read them


class Completion(msgspec.Struct):
    choices: list[Scored]


class Model(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(max_length=1024)]
    max_model_len: int | None = None


class Models(msgspec.Struct):
    data: list[Model]


class Tokens(msgspec.Struct):
    tokens: list[int]


class RefusedError(Exception):
    """Raised when the server rejects a request as invalid."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"status {status} {words}")
        self.way_out = "set VLLM_API_KEY to its API key" if status in (401, 403) else ""


class Api:
    """Requests to a server, retried while it is busy, failing or unreachable."""

    def __init__(self, server: ServerSettings) -> None:
        self.server = server
        self.client = new_client(server)

    async def models(self) -> list[Model]:
        """The models that the server serves."""
        try:
            return (await self.ask("/v1/models", Models)).data
        except RefusedError as error:
            way_out = error.way_out or "give the address of a vLLM server, as in http://host:8000"
            raise UserError(
                f"server {self.server.url}: does not list its models: {one_line(error)}: {way_out}"
            ) from error

    async def ask(
        self, path: str, kind: type, body: Any = None, tries: int = START_TRIES, entries: int = 0
    ) -> Any:
        """Send a request, a POST if it has a body, and return the answer as a `kind`.

        `entries` is the number of log-probabilities in the answer, which bounds its size. Raises
        RefusedError for an invalid request, UserError after the last try.
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
                raise RefusedError(status, _text(content))
            else:
                try:
                    return msgspec.json.decode(content, type=kind)
                except (msgspec.DecodeError, RecursionError) as error:
                    trouble = f"an answer that cannot be read: {one_line(error)}: {_text(content)}"
        raise UserError(
            f"server {self.server.url}: no answer in {tries} tries: {trouble}: finished shards are "
            "kept: run again when it is back"
        )

    async def _send(self, path: str, body: Any, most: int) -> tuple[int, bytes]:
        """The status and content of one response, of at most `most` bytes."""
        content = bytearray()
        method = "GET" if body is None else "POST"
        async with self.client.stream(method, path, json=body) as response:
            encoding = response.headers.get("Content-Encoding", "")
            if encoding not in _PLAIN:
                raise httpx.DecodingError(f"its content encoding is {encoding}, none was asked for")
            chunks = cast(AsyncGenerator[bytes], response.aiter_bytes())
            async with aclosing(chunks):
                async for chunk in chunks:
                    content += chunk
                    if len(content) > most:
                        raise httpx.ReadError(f"an answer of more than {most:,} bytes")
        return response.status_code, bytes(content)

    def _wait(self, attempt: int) -> float:
        """Seconds before a retry: exponential backoff with jitter."""
        longest = min(_LONGEST_WAIT, self.server.first_wait * 2 ** (attempt - 1))
        return longest * random.uniform(0.5, 1)


def new_client(server: ServerSettings) -> httpx.AsyncClient:
    """A client of the server, with the key in VLLM_API_KEY if that is set.

    Raises UserError for a key that no header can hold.
    """
    key = os.environ.get("VLLM_API_KEY", "")
    if not key.isascii() or not key.isprintable():
        raise UserError(
            "VLLM_API_KEY: not ASCII, or it holds a line break: give a key of ASCII characters"
        )
    try:
        client = httpx.AsyncClient(
            base_url=server.address,
            headers={"Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # none are kept
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


def names_of(models: Sequence[Model]) -> str:
    """The names of models for a message."""
    return ", ".join(quoted(each.id)[1:-1] for each in models[:_MOST_NAMES]) or "none"


def _text(content: bytes) -> str:
    """The beginning of an answer, on one line."""
    return one_line(Exception(content[:4096].decode(errors="replace") or "it is empty"))
