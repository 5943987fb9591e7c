"""The vLLM engine: prompt log-probabilities, as arrays from the engine to the shard.

Log-probabilities at given ids come from vLLM's own token-id scoring, in the same request. An engine
that runs out of memory is restarted with smaller steps; its finished examples are kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError, one_line
from ...pipeline.format.records import Example, Floats, ScoredExample, WeightedExample
from ...pipeline.progress import say, say_once
from ...trainer.models.files import ModelFiles, check_weights
from .base import GivenIds, scored, with_given
from .settings import EngineSettings
from .vllm_arrays import PromptArrays, keep_tensors, keeps_tensors, prompt_arrays
from .vllm_memory import STEPS, WINDOW_TOKENS, plan_memory
from .vllm_start import (
    EngineStoppedError,
    is_memory,
    says_no_more,
    start_engine,
    starts_late,
    stop_engine,
    takes_ids,
)

WINDOW_BYTES = 2**28  # of the log-probabilities of requests in the engine
_KEPT_BYTES, _FLAT_BYTES = 8, 120  # of an entry as tensors and as Python lists, measured
_RESTARTS = 3


class VllmScorer:
    """A vLLM engine in float32, bfloat16 or float16, on GPUs or, in its CPU build, on the CPU."""

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
            + ("the engine's tensors" if self.keeps_tensors else "vLLM's flat lists, slower")
        )

    def score(
        self, examples: Sequence[WeightedExample], top_k: int, at: Sequence[GivenIds] | None = None
    ) -> Iterator[tuple[int, ScoredExample]]:
        """Yield each example's index in `examples` and its scores, as the engine finishes them.

        Raises UserError for given ids that this engine cannot score.
        """
        if at is not None and not self.takes_ids:
            raise UserError(
                "this vLLM cannot score given ids, which --at needs (that takes a GPU and vLLM "
                "0.32 or later): use --engine transformers"
            )
        given = [None] * len(examples) if at is None else at
        left = dict.fromkeys(range(len(examples)))
        while left:
            cause = None
            try:
                for place, output in self._outputs(examples, given, top_k, list(left)):
                    yield place, self._scored(examples[place], given[place], output, top_k)
                    del left[place], output  # its arrays would stay in memory beside the next
            except EngineStoppedError as error:
                cause = str(error)  # the error itself holds a reference to the engine's last step
            if cause is not None:
                self._restart_smaller(cause)

    def _outputs(
        self,
        examples: Sequence[WeightedExample],
        given: Sequence[GivenIds | None],
        top_k: int,
        places: list[int],
    ) -> Iterator[tuple[int, Any]]:
        """The engine's outputs for the examples at these indices, a window of tokens at a time."""
        window = self._window(top_k)
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

    def _window(self, top_k: int) -> int:
        """Number of tokens below which another example may enter the engine."""
        entry_bytes = _KEPT_BYTES if self.keeps_tensors else _FLAT_BYTES
        return min(WINDOW_TOKENS, WINDOW_BYTES // (entry_bytes * (top_k + 1)) + 1)

    def _sampling(self, example: Example, given: GivenIds | None, top_k: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options: dict[str, Any] = {"prompt_logprobs": top_k}
        if self.starts_late:
            options |= {"prompt_logprob_start": _first_row(example)}
        if given is not None:
            options |= _id_options(example, given)
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
        """Start the engine, with smaller steps if memory runs out."""
        failures = 0
        while True:
            try:
                llm = start_engine(
                    self.model, self.settings, self.scheduled_tokens, self.memory.utilization
                )
                break
            except EngineStoppedError as error:
                cause = str(error)
            failures += 1
            if failures > 1 and says_no_more(cause):
                raise UserError(
                    f"vLLM cannot start with model {self.model.name}: {cause}: see its output "
                    "above: free memory, or try --engine transformers"
                )
            self._make_smaller(cause)
        self.llm = llm
        self.engine: Any = llm.llm_engine
        self.takes_ids = takes_ids(self.engine)
        self.starts_late = starts_late(self.engine)

    def _restart_smaller(self, cause: str) -> None:
        self._make_smaller(cause)
        llm = self.llm
        del self.llm, self.engine  # otherwise the weights stay in memory
        stop_engine(llm)
        del llm
        self._start()

    def _make_smaller(self, cause: str) -> None:
        """Halve the tokens of a step. Raises UserError after the last attempt."""
        if self.restarts == _RESTARTS or self.scheduled_tokens <= STEPS[-1]:
            raise UserError(
                f"vLLM stopped again, at {self.scheduled_tokens} tokens a step: {cause}: finished "
                "shards are kept: free memory, or use more --tensor-parallel-size or --engine "
                "transformers"
            )
        self.restarts += 1
        self.scheduled_tokens //= 2
        say(
            f"vLLM stopped ({cause}): starting it again with {self.scheduled_tokens} tokens a "
            "step; no finished work is lost"
        )

    def _scored(
        self, example: WeightedExample, given: GivenIds | None, output: Any, top_k: int
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
        log_probs_G = _at_ids(example, given, output.prompt_token_id_logprobs)
        return with_given(result, given, log_probs_G, self.vocab_size)


def _stopped(error: Exception) -> Exception:
    """The exception to raise for an engine's error."""
    if is_memory(error):
        return EngineStoppedError(one_line(error))
    return UserError(
        f"vLLM stopped: {one_line(error)}: finished shards are kept: run again, or with --engine "
        "transformers and another --out"
    )


def _first_row(example: Example) -> int:
    """The row of the first supervised position: row i predicts token i + 1."""
    return int(example.positions[0]) - 1


def _rows(example: Example, arrays: PromptArrays) -> NDArray[np.integer]:
    """The rows of the supervised positions among those returned, which are the last ones."""
    left_out = len(example.input_ids) - 1 - len(arrays.ranks)
    if not 0 <= left_out <= _first_row(example):
        raise UserError(
            f"example {example.id}: vLLM returned log-probabilities of {len(arrays.ranks)} tokens "
            f"for a prompt of {len(example.input_ids)}: finished shards are kept: use --engine "
            "transformers and another --out"
        )
    return example.positions - 1 - left_out


def _id_options(example: Example, given: GivenIds) -> dict[str, Any]:
    """The sampling options that request given ids: a row per token from the first position on.

    Row i scores its ids as predictions of token `prompt_logprob_start` + i + 1; -1 is padding. Rows
    without ids are required as well, and at least one column.
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
            f"example {example.id}: vLLM returned no log-probabilities at the given ids: finished "
            "shards are kept: use --engine transformers and another --out"
        )
    given_Nw = given.padded()
    rows_N = example.positions - example.positions[0]
    return log_probs_Rw[rows_N, : given_Nw.shape[1]][given_Nw >= 0]
