"""Scoring with vLLM: prompt log-probabilities, arrays from the engine to the shard.

Log-probabilities at given ids come from the engine's own token-id scoring, in the same request,
where it has that; else from whole distributions.

An engine that dies of memory is started again with smaller steps; what it had finished is kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError, one_line
from ...pipeline.format.records import Example, Floats, ScoredExample
from ...pipeline.progress import say, say_once
from ...trainer.models.files import ModelFiles, check_weights
from .base import GivenIds, scored, with_given
from .settings import EngineSettings
from .vllm_arrays import PromptArrays, keep_tensors, keeps_tensors, prompt_arrays
from .vllm_memory import LEAST_SCHEDULED
from .vllm_start import (
    WINDOW_TOKENS,
    EngineDiedError,
    is_memory,
    plan_memory,
    says_no_more,
    start_engine,
    starts_late,
    stop_engine,
    takes_ids,
)

WINDOW_BYTES = 2**28  # of the log-probabilities of what is in the engine
_KEPT_BYTES, _FLAT_BYTES = 8, 120  # of an entry as tensors, and in Python's lists, as measured
_RESTARTS = 3


class VllmScorer:
    """A vLLM engine in float32, bfloat16 or float16, on the GPUs or, in its CPU build, without."""

    def __init__(self, model: ModelFiles, settings: EngineSettings) -> None:
        check_weights(model)
        self.vocab_size = model.vocab_size
        self.model = model
        self.settings = settings
        self.memory = plan_memory(model, settings)
        self.scheduled_tokens = self.memory.scheduled_tokens
        self.restarts = 0
        self.submitted = 0
        self._start()
        self.keeps_tensors = keeps_tensors()
        say_once(
            "prompt log-probabilities: "
            + ("the engine's tensors" if self.keeps_tensors else "vLLM's flat lists, some slower")
        )

    def score(
        self, examples: Sequence[Example], top_k: int, at: Sequence[GivenIds] | None = None
    ) -> Iterator[tuple[int, ScoredExample]]:
        """Each example's place in `examples` and its scores, as the engine finishes them."""
        given = [None] * len(examples) if at is None else at
        left = dict.fromkeys(range(len(examples)))
        while left:
            died = None
            try:
                for place, output in self._outputs(examples, given, top_k, list(left)):
                    yield place, self._scored(examples[place], given[place], output, top_k)
                    del left[place], output  # its distributions would stay beside the next
            except EngineDiedError as error:
                died = str(error)  # the error itself holds on to the engine's last step
            if died is not None:
                self._restart_smaller(died)

    def _outputs(
        self,
        examples: Sequence[Example],
        given: Sequence[GivenIds | None],
        top_k: int,
        places: list[int],
    ) -> Iterator[tuple[int, Any]]:
        """The engine's answers for the examples at these places, a window of tokens in flight."""
        gathers = any(each is not None for each in given)
        window = self._window(top_k, gathers)
        waiting = iter(places)
        in_flight: dict[str, int] = {}
        tokens = 0
        place = next(waiting, None)
        while place is not None or in_flight:
            while place is not None and tokens < window:
                sampling = self._sampling(examples[place], given[place], top_k)
                in_flight[self._submit(examples[place], sampling)] = place
                tokens += len(examples[place].input_ids)
                place = next(waiting, None)
            for output in self._step():
                if output.finished:
                    done = in_flight.pop(output.request_id)
                    tokens -= len(examples[done].input_ids)
                    yield done, output
                del output

    def _window(self, top_k: int, gathers: bool) -> int:
        """Tokens below which another example may enter the engine."""
        width = top_k
        entry_bytes = _KEPT_BYTES if self.keeps_tensors else _FLAT_BYTES
        if gathers and not self.takes_ids:
            width = self.vocab_size
            say_once(
                "this vLLM cannot score given ids: distributions come whole, slowly, at "
                f"{width * entry_bytes / 1e6:.1f} MB for each token of an example: "
                "--engine transformers needs neither"
            )
        return min(WINDOW_TOKENS, WINDOW_BYTES // (entry_bytes * (width + 1)) + 1)

    def _sampling(self, example: Example, given: GivenIds | None, top_k: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options: dict[str, Any] = {"prompt_logprobs": top_k}
        if self.starts_late:
            options |= {"prompt_logprob_start": _first_row(example)}
        if given is not None:
            options |= _id_options(example, given) if self.takes_ids else {"prompt_logprobs": -1}
        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **options,
        )

    def _submit(self, example: Example, sampling: Any) -> str:
        request_id = str(self.submitted)
        self.submitted += 1
        prompt = {"prompt_token_ids": example.input_ids.tolist()}
        try:
            taken_as = self.engine.add_request(request_id, prompt, sampling)
        except Exception as error:
            raise _stopped(error) from error
        if self.keeps_tensors:
            keep_tensors(self.engine, taken_as or request_id)
        return request_id

    def _step(self) -> list[Any]:
        try:
            return self.engine.step()
        except Exception as error:
            raise _stopped(error) from error

    def _start(self) -> None:
        """Start the engine, with smaller steps where memory runs out."""
        llm, deaths = None, 0
        while llm is None:
            died = ""
            try:
                llm = start_engine(
                    self.model, self.settings, self.scheduled_tokens, self.memory.utilization
                )
            except EngineDiedError as error:
                died = str(error)
            if llm is None:
                deaths += 1
                if deaths > 1 and says_no_more(died):
                    raise UserError(
                        f"vLLM cannot start with model {self.model.name}: {died}: what it printed "
                        "tells why: free memory, or try --engine transformers"
                    )
                self._make_smaller(died)
        self.llm = llm
        self.engine: Any = llm.llm_engine
        self.takes_ids = takes_ids(self.engine)
        self.starts_late = starts_late(self.engine)

    def _restart_smaller(self, died: str) -> None:
        self._make_smaller(died)
        llm = self.llm
        del self.llm, self.engine  # or the weights would stay
        stop_engine(llm)
        del llm
        self._start()

    def _make_smaller(self, died: str) -> None:
        """Halve the tokens of a step. Raises UserError where that has been tried often enough."""
        if self.restarts == _RESTARTS or self.scheduled_tokens <= LEAST_SCHEDULED:
            raise UserError(
                f"vLLM stopped, at {self.scheduled_tokens} tokens a step too: {died}: finished "
                "shards are kept: free memory, or use more --tensor-parallel-size or --engine "
                "transformers"
            )
        self.restarts += 1
        self.scheduled_tokens //= 2
        say(
            f"vLLM stopped ({died}): starting it again with {self.scheduled_tokens} tokens a step; "
            "no finished work is lost"
        )

    def _scored(
        self, example: Example, given: GivenIds | None, output: Any, top_k: int
    ) -> ScoredExample:
        arrays = prompt_arrays(output.prompt_logprobs)
        rows_N = _rows(example, arrays)
        result = scored(
            example,
            observed_log_probs_N=arrays.log_probs[rows_N, 0],
            observed_ranks_N=arrays.ranks[rows_N],
            topk_ids_Nk=arrays.ids[rows_N, 1 : top_k + 1],
            topk_log_probs_Nk=arrays.log_probs[rows_N, 1 : top_k + 1],
            vocab_size=self.vocab_size,
        )
        if given is None:
            return result
        if self.takes_ids:
            log_probs_G = _at_ids(example, given, output.prompt_token_id_logprobs)
        else:
            log_probs_G = _from_whole(arrays, rows_N, given)
        return with_given(result, given, log_probs_G, self.vocab_size)


def _stopped(error: Exception) -> Exception:
    """What an engine's error is to those who wait for it."""
    if is_memory(error):
        return EngineDiedError(one_line(error))
    return UserError(
        f"vLLM stopped: {one_line(error)}: finished shards are kept: run again, or with --engine "
        "transformers and another --out"
    )


def _first_row(example: Example) -> int:
    """The row of the first supervised position: row i predicts token i + 1."""
    return int(example.positions[0]) - 1


def _rows(example: Example, arrays: PromptArrays) -> NDArray[np.integer]:
    """The rows of the supervised positions, among those that the engine gave: the last ones."""
    left_out = len(example.input_ids) - 1 - len(arrays.ranks)
    if not 0 <= left_out <= _first_row(example):
        raise UserError(
            f"example {example.id}: vLLM gave log-probabilities of {len(arrays.ranks)} tokens for "
            f"a prompt of {len(example.input_ids)}: finished shards are kept: use --engine "
            "transformers and another --out"
        )
    return example.positions - 1 - left_out


def _id_options(example: Example, given: GivenIds) -> dict[str, Any]:
    """The request for given ids: a row for every token from the first position on.

    Row i scores its ids as predictions of token `prompt_logprob_start` + i + 1; -1 is no id. Rows
    without any must be there as well, and one column at least.
    """
    start = _first_row(example)
    given_Nw = given.padded()
    rows = len(example.input_ids) - 1 - start
    ids_Rw = np.full((rows, max(1, given_Nw.shape[1])), -1, np.int64)
    ids_Rw[example.positions - 1 - start, : given_Nw.shape[1]] = given_Nw
    return {"prompt_logprob_token_ids": ids_Rw, "prompt_logprob_start": start}


def _at_ids(example: Example, given: GivenIds, log_probs_Rw: Floats | None) -> Floats:
    """The answer to `_id_options`, [G]."""
    if log_probs_Rw is None:
        raise UserError(
            f"example {example.id}: vLLM gave no log-probabilities at the ids asked for: finished "
            "shards are kept: use --engine transformers and another --out"
        )
    given_Nw = given.padded()
    rows_N = example.positions - example.positions[0]
    return log_probs_Rw[rows_N, : given_Nw.shape[1]][given_Nw >= 0]


def _from_whole(arrays: PromptArrays, rows_N: NDArray[np.integer], given: GivenIds) -> Floats:
    """The log-probabilities at the given ids, [G], of rows that hold the whole vocabulary."""
    log_probs_V = np.empty(arrays.ids.shape[1] - 1, np.float32)
    parts = []
    for row, ids in zip(rows_N, np.split(given.ids, np.cumsum(given.counts)[:-1]), strict=True):
        log_probs_V[arrays.ids[row, 1:]] = arrays.log_probs[row, 1:]
        parts.append(log_probs_V[ids])
    return np.concatenate(parts)
