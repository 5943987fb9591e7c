"""The vLLM engine: prompt log-probabilities, as arrays from the engine to the shard.

Examples with equal beginnings are asked for one after another, so that the engine computes a shared
beginning once. An engine that runs out of memory is restarted with smaller steps; its finished
examples are kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...pipeline.errors import UserError, one_line
from ...pipeline.format.records import Example, ScoredExample, WeightedExample
from ...pipeline.progress import say
from ...trainer.models.files import ModelFiles, check_weights
from .base import GivenIds, shared_beginning
from .settings import EngineSettings
from .vllm_arrays import keep_tensors
from .vllm_memory import STEPS, plan_memory, smaller, window_tokens
from .vllm_requests import answer, lacks_rows, sampling_options
from .vllm_start import (
    EngineStoppedError,
    abilities,
    is_memory,
    says_no_more,
    start_engine,
    stop_engine,
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
        self.restarts = 0
        self.submitted = 0
        self._start()

    def score(
        self, examples: Sequence[WeightedExample], top_k: int, at: Sequence[GivenIds] | None = None
    ) -> Iterator[tuple[int, ScoredExample]]:
        """Yield each example's index in `examples` and its scores, as the engine finishes them.

        Raises UserError for given ids that this engine cannot score.
        """
        if at is not None and not self.can.rows_alone:
            raise UserError(
                "this version of vLLM cannot score given ids, which --at needs: use --engine "
                "transformers"
            )
        given = [None] * len(examples) if at is None else at
        reads = dict.fromkeys(range(len(examples)), False)
        if self.can.block_size:
            reads = by_beginning(examples, self.can.block_size)
            self.llm.reset_prefix_cache()  # a shard does not depend on those before it
        while reads:
            cause = None
            try:
                for place, output in self._outputs(examples, given, top_k, reads):
                    asked = examples[place], given[place]
                    yield place, answer(self.can, *asked, output, top_k, self.vocab_size)
                    del reads[place], output  # its arrays would stay in memory beside the next
            except EngineStoppedError as error:
                cause = str(error)  # the error itself holds a reference to the engine's last step
            if cause is not None:
                self._restart_smaller(cause)

    def _outputs(
        self,
        examples: Sequence[WeightedExample],
        given: Sequence[GivenIds | None],
        top_k: int,
        reads: Mapping[int, bool],
    ) -> Iterator[tuple[int, Any]]:
        """The engine's outputs for some examples, a window of tokens at a time.

        `reads` has their indices, in order, and whether a request may read the prefix cache. One
        that read a supervised row there is made again without it.
        """

        def submit(place: int, reads_cache: bool) -> None:
            asked = examples[place], given[place]
            options = sampling_options(self.can, *asked, top_k, reads_cache)
            in_flight[self._submit(examples[place], options)] = place, reads_cache

        window = self._window(top_k)
        waiting = iter(list(reads.items()))
        in_flight: dict[str, tuple[int, bool]] = {}
        tokens = 0
        following = next(waiting, None)
        while following is not None or in_flight:
            while following is not None and tokens < window:
                submit(*following)
                tokens += len(examples[following[0]].input_ids)
                following = next(waiting, None)
            for output in self._step():
                if not output.finished:
                    continue
                place, has_read = in_flight.pop(output.request_id)
                if has_read and lacks_rows(self.can, examples[place], output):
                    submit(place, False)
                    continue
                tokens -= len(examples[place].input_ids)
                yield place, output
                del output

    def _window(self, top_k: int) -> int:
        """Number of tokens below which another example may enter the engine."""
        entry_bytes = _KEPT_BYTES if self.can.keeps_tensors else _FLAT_BYTES
        return min(
            window_tokens(self.memory.scheduled_tokens),
            WINDOW_BYTES // (entry_bytes * (top_k + 1)) + 1,
        )

    def _submit(self, example: WeightedExample, options: dict[str, Any]) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **options,
        )
        request_id = str(self.submitted)
        self.submitted += 1
        prompt = {"type": "token", "prompt_token_ids": example.input_ids.tolist()}
        try:
            taken_as = self.engine.add_request(request_id, prompt, sampling)
        except Exception as error:
            raise _stopped(error) from error
        if self.can.keeps_tensors:
            keep_tensors(self.engine, taken_as)
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
                llm = start_engine(self.model, self.settings, self.memory)
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
        self.can = abilities(llm, self.settings)

    def _restart_smaller(self, cause: str) -> None:
        self._make_smaller(cause)
        llm = self.llm
        del self.llm, self.engine  # otherwise the weights stay in memory
        stop_engine(llm)
        del llm
        self._start()

    def _make_smaller(self, cause: str) -> None:
        """Take less memory. Raises UserError after the last attempt."""
        step = self.memory.scheduled_tokens
        if self.restarts == _RESTARTS or step <= STEPS[-1]:
            raise UserError(
                f"vLLM stopped again, at {step} tokens a step: {cause}: finished shards are kept: "
                "free memory, or use more --tensor-parallel-size or --engine transformers"
            )
        self.restarts += 1
        self.memory = smaller(self.memory)
        say(
            f"vLLM stopped ({cause}): starting it again with {self.memory.scheduled_tokens} tokens "
            "a step; no finished work is lost"
        )


def _stopped(error: Exception) -> Exception:
    """The exception to raise for an engine's error."""
    if is_memory(error):
        return EngineStoppedError(one_line(error))
    return UserError(
        f"vLLM stopped: {one_line(error)}: finished shards are kept: run again, or with --engine "
        "transformers and another --out"
    )


def by_beginning(examples: Sequence[Example], block_size: int) -> dict[int, bool]:
    """The indices of examples, those with equal beginnings adjacent, and whether each may read
    those before it from a prefix cache.

    A cache holds whole blocks of tokens. The blocks that an example shares with any before it are
    those that it shares with the one just before it. If a supervised row lies in them, reading
    would leave it out.
    """
    order = sorted(range(len(examples)), key=lambda place: examples[place].input_ids.tobytes())
    reads, before = {}, np.empty(0, np.int32)
    for place in order:
        ids = examples[place].input_ids
        shared = shared_beginning(before, ids) // block_size * block_size
        reads[place] = shared < int(examples[place].positions[0])
        before = ids
    return reads
