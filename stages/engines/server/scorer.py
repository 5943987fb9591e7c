"""Scores of a running vLLM server.

Prompts are sent as token ids, to `/inference/v1/generate` where the server has it (vLLM 0.32), as
it decodes no token, and otherwise to `/v1/completions`. The answer has a dict for each token: the
observed token and the top k, by id, each with log-probability and rank. A bounded number of
requests is in flight, and each answer is converted to arrays as it arrives.
"""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ....pipeline.errors import UserError, one_line
from ....pipeline.format.records import Floats, ScoredExample, WeightedExample
from ....pipeline.format.row_checks import MASS_TOLERANCE
from ....trainer.models.files import ModelFiles
from ..base import GivenIds
from ..settings import EngineSettings, ServerSettings
from .answers import NONE, scores_in, unnormalised
from .api import START_TRIES, Api, Completion, Model, Prompt, RefusedError, Scored, Tokens, names_of

_PROBE = "Bonjour, 1 + 1 = 2!\nЖ"
_SAME_MODEL = 0.5  # nats on average: bfloat16 and other batches move them by a tenth at most


class ServerScorer:
    """A model run by a vLLM server; tokenizer and vocabulary come from local files."""

    def __init__(self, model: ModelFiles, settings: EngineSettings) -> None:
        self.model = model
        self.server = settings.server
        self.api = Api(settings.server)
        self.generates = True  # the server has `/inference/v1/generate`
        self.runner = asyncio.Runner()
        self.runner.run(self._check(settings.max_length))
        self.known = self.runner.run(self._probe())

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

    def check_same(self) -> None:
        """Raise UserError if the server runs another model than at the start."""
        now = self.runner.run(self._probe())
        self._refuse_other(now, self.known, "at the start")

    def check_stored(self, stored: ScoredExample) -> None:
        """Raise UserError if the server runs another model than that of a stored example."""
        example = WeightedExample(
            stored.id, stored.input_ids, stored.positions, stored.token_weights
        )
        ((_, now),) = self.score([example], 1)
        then = stored.observed_log_probs
        self._refuse_other(now.observed_log_probs, then, "for the shards that are there")

    def _refuse_other(self, now_N: Floats, then_N: Floats, when: str) -> None:
        if np.abs(now_N - then_N).mean() > _SAME_MODEL:
            raise UserError(
                f"server {self.server.url}: runs another model than {when}: finished shards are "
                "kept: run again when it serves the first one, or score again into another --out"
            )

    async def _probe(self) -> Floats:
        """The log-probabilities of a short text."""
        ids = self.model.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        prompt = await self._scored(ids, 1)
        rows = zip(ids[1:], prompt[1:], strict=True)
        found = [row[token].logprob for token, row in rows if row and token in row]
        if len(found) < len(ids) - 1 or not all(NONE < each < MASS_TOLERANCE for each in found):
            raise UserError(
                f"server {self.server.url}: its answer lacks log-probabilities of the prompt's "
                "tokens: a vLLM server is needed here"
            )
        return np.array(found, np.float32)

    async def _score(self, example: WeightedExample, top_k: int) -> ScoredExample:
        prompt = await self._scored(example.input_ids.tolist(), top_k)
        return scores_in(example, prompt, top_k, self.model.vocab_size)

    async def _scored(self, token_ids: list[int], count: int) -> Prompt:
        """As `_prompt`, and UserError for a request that the server refuses."""
        try:
            return await self._prompt(token_ids, count, self.server.tries)
        except RefusedError as error:
            raise self._refused(error) from error

    async def _prompt(self, token_ids: list[int], count: int, tries: int) -> Prompt:
        """The log-probabilities of a prompt, `count` at each token; -1 is all."""
        entries = len(token_ids) * (1 + (self.model.vocab_size if count < 0 else count))
        sampling = {"prompt_logprobs": count, "max_tokens": 1, "temperature": 0}
        body: dict[str, Any] = {"model": self.server.model, "return_token_ids": True}
        if self.generates:
            body |= {"token_ids": token_ids, "sampling_params": sampling | {"detokenize": False}}
            scored = await self.api.ask("/inference/v1/generate", Scored, body, tries, entries)
        else:
            body |= {"prompt": token_ids} | sampling
            answer = await self.api.ask("/v1/completions", Completion, body, tries, entries)
            scored = answer.choices[0] if len(answer.choices) == 1 else Scored([])
        prompt, read = scored.prompt_logprobs, scored.prompt_token_ids
        if len(prompt) != len(token_ids) or read not in (None, token_ids):
            raise UserError(
                f"server {self.server.url}: {len(prompt)} entries for a prompt of "
                f"{len(token_ids)} tokens, or it read other tokens: finished shards are kept: a "
                "vLLM server is needed here"
            )
        return prompt

    def _refused(self, error: RefusedError) -> UserError:
        words = one_line(error)
        way_out = error.way_out or "check that it serves this model"
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
        await self._choose_path()
        await self._check_vocabulary()

    async def _choose_path(self) -> None:
        """Leave `/inference/v1/generate` where the server does not answer there."""
        try:
            await self._prompt([0, 0], 1, 1)
        except (RefusedError, UserError):
            self.generates = False

    async def _check_length(self, max_length: int) -> None:
        models = await self.api.models()
        found = next((each for each in models if each.id == self.server.model), None)
        if found is None:
            raise UserError(
                f"--server-model {self.server.model}: {self.server.url} does not serve it: give "
                f"one of {names_of(models)}"
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
            answer = await self.api.ask("/tokenize", Tokens, body)
        except RefusedError:
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
            whole = await self._prompt([vocab_size - 1, 0], -1, START_TRIES)
        except RefusedError as error:
            if "logprobs" not in str(error):
                raise self._disagrees(f"it refuses token {vocab_size - 1}") from error
            await self._check_edges(vocab_size)
            return
        entries = whole[1] or {}
        if len(entries) != vocab_size or max(entries) >= vocab_size:
            raise self._disagrees(f"its distributions have {len(entries)} tokens")
        mass = float(np.exp([entry.logprob for entry in entries.values()]).sum())
        if abs(mass - 1) > MASS_TOLERANCE:
            raise unnormalised(mass)

    async def _check_edges(self, vocab_size: int) -> None:
        for token in (vocab_size - 1, vocab_size):
            try:
                await self._prompt([token, 0], 1, START_TRIES)
                taken = True
            except RefusedError as error:
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

    api = Api(server)

    async def ask() -> list[Model]:
        async with api.client:
            return await api.models()

    models = asyncio.run(ask())
    if len(models) != 1:
        raise UserError(
            f"server {server.url}: serves {names_of(models)}: name one with --server-model"
        )
    return models[0].id
