"""Scoring with vLLM: prompt log-probabilities, kept flat and turned into arrays at once.

Entry i of a prompt's log-probabilities is the distribution that predicts token i; entry 0 is empty.
Each entry holds the observed token first, with its rank, then the top k, so the observed token
stands there twice when it is inside the top k.

Log-probabilities at given ids come from the engine's own token-id scoring, in the same request,
where it has that; else from whole distributions, lists of Python numbers that pass one example at a
time.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError, one_line
from ...pipeline.records import Example, Floats, ScoredExample
from ...trainer.models import ModelFiles, check_weights
from .base import GivenIds, ScorerSettings, say_once, scored, with_given

# Prompt log-probabilities take [scheduled tokens, V] in float32 that vLLM's memory profile does
# not foresee: a larger budget kills the engine at large vocabularies.
_SCHEDULED_TOKENS = 2048
_WINDOW_TOKENS = 16384  # in the engine at a time, so that memory stays flat
_ENTRY_BYTES = 120  # of a whole distribution in Python's lists, as measured


class VllmScorer:
    """A vLLM engine in float32, bfloat16 or float16, on the GPUs or, in its CPU build, without."""

    def __init__(self, model: ModelFiles, settings: ScorerSettings) -> None:
        self.vocab_size = model.vocab_size
        check_weights(model)
        _prepare_environment(settings.max_length, model.max_length)
        try:
            from vllm import LLM, SamplingParams

            llm = LLM(
                model=str(model.folder),
                dtype=settings.dtype,
                max_model_len=settings.max_length + 1,  # a prompt needs one free position
                max_num_batched_tokens=_SCHEDULED_TOKENS,
                max_logprobs=-1,
                logprobs_mode="raw_logprobs",
                tensor_parallel_size=settings.tensor_parallel_size,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                enable_prefix_caching=False,  # these requests could not read it
                enforce_eager=True,  # only prefill runs here
                use_tqdm_on_load=sys.stderr.isatty(),
                seed=0,
            )
        except Exception as error:
            # vLLM raises many kinds, from bad configurations to memory; all mean the same here
            raise UserError(
                f"vLLM cannot start with model {model.name}: {one_line(error)}: "
                "try --engine transformers, or a smaller --max-length"
            ) from error
        self.engine: Any = llm.llm_engine
        self.submitted = 0
        self.sampling_params = SamplingParams
        # what vLLM itself asks before it takes such a request
        self.takes_ids = hasattr(SamplingParams, "prompt_logprob_token_ids") and getattr(
            self.engine.vllm_config, "use_v2_model_runner", False
        )

    def score(
        self, examples: Sequence[Example], top_k: int, at: Sequence[GivenIds] | None = None
    ) -> Iterator[tuple[int, ScoredExample]]:
        """Each example's place in `examples` and its scores, as the engine finishes them."""
        given = [None] * len(examples) if at is None else at
        window = self._window(at is not None)
        next_place = tokens = 0
        in_flight: dict[str, int] = {}
        while next_place < len(examples) or in_flight:
            while next_place < len(examples) and tokens < window:
                sampling = self._sampling(examples[next_place], given[next_place], top_k)
                in_flight[self._submit(examples[next_place], sampling)] = next_place
                tokens += len(examples[next_place].input_ids)
                next_place += 1
            for output in self._step():
                if output.finished:
                    place = in_flight.pop(output.request_id)
                    tokens -= len(examples[place].input_ids)
                    yield place, self._scored(examples[place], given[place], output, top_k)
                del output  # its distributions would stay beside those of the next

    def _window(self, gathers: bool) -> int:
        """Tokens below which another example may enter the engine."""
        if not gathers or self.takes_ids:
            return _WINDOW_TOKENS
        megabytes = self.vocab_size * _ENTRY_BYTES / 1e6
        say_once(
            "this vLLM cannot score given ids: distributions come whole, slowly, at "
            f"{megabytes:.1f} MB for each token of an example: --engine transformers needs neither"
        )
        return 1

    def _sampling(self, example: Example, given: GivenIds | None, top_k: int) -> Any:
        options: dict[str, Any] = {"prompt_logprobs": top_k}
        if given is not None:
            options |= _id_options(example, given) if self.takes_ids else {"prompt_logprobs": -1}
        return self.sampling_params(
            max_tokens=1, temperature=0.0, flat_logprobs=True, detokenize=False, **options
        )

    def _step(self) -> list[Any]:
        try:
            return self.engine.step()
        except Exception as error:  # whatever it dies of, memory above all
            raise UserError(
                f"vLLM stopped: {one_line(error)}: finished shards are kept: run again with a "
                "smaller --gpu-memory-utilization or --shard-size"
            ) from error

    def _submit(self, example: Example, sampling: Any) -> str:
        request_id = str(self.submitted)
        self.submitted += 1
        prompt = {"prompt_token_ids": example.input_ids.tolist()}
        self.engine.add_request(request_id, prompt, sampling)
        return request_id

    def _scored(
        self, example: Example, given: GivenIds | None, output: Any, top_k: int
    ) -> ScoredExample:
        flat = output.prompt_logprobs
        ids_E, log_probs_E = np.asarray(flat.token_ids), np.asarray(flat.logprobs, np.float32)
        starts_N = np.asarray(flat.start_indices)[example.positions]
        columns_Nw = starts_N[:, None] + np.arange(top_k + 1)
        result = scored(
            example,
            observed_log_probs_N=log_probs_E[starts_N],
            observed_ranks_N=np.array([flat.ranks[start] for start in starts_N]),
            topk_ids_Nk=ids_E[columns_Nw[:, 1:]],
            topk_log_probs_Nk=log_probs_E[columns_Nw[:, 1:]],
            vocab_size=self.vocab_size,
        )
        if given is None:
            return result
        if self.takes_ids:
            log_probs_G = _at_ids(example, given, output.prompt_token_id_logprobs)
        else:
            # the whole vocabulary comes after the observed token
            log_probs_G = _from_whole(ids_E, log_probs_E, starts_N + 1, given, self.vocab_size)
        return with_given(result, given, log_probs_G, self.vocab_size)


def _id_options(example: Example, given: GivenIds) -> dict[str, Any]:
    """The request for given ids: a row for every token from the first position on.

    Row i scores its ids as predictions of token `prompt_logprob_start` + i + 1; -1 is no id. Rows
    without any must be there as well, and one column at least.
    """
    start = int(example.positions[0]) - 1
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


def _from_whole(
    ids_E: NDArray[np.integer],
    log_probs_E: Floats,
    starts_N: NDArray[np.integer],
    given: GivenIds,
    vocab_size: int,
) -> Floats:
    """The log-probabilities at the given ids, [G], of distributions that start at `starts_N`."""
    log_probs_V = np.empty(vocab_size, np.float32)
    parts = []
    for start, ids in zip(starts_N, np.split(given.ids, np.cumsum(given.counts)[:-1]), strict=True):
        log_probs_V[ids_E[start : start + vocab_size]] = log_probs_E[start : start + vocab_size]
        parts.append(log_probs_V[ids])
    return np.concatenate(parts)


def _prepare_environment(max_length: int, model_limit: int) -> None:
    """vLLM's settings that only the environment takes; what the user set stays."""
    import torch

    defaults = {}
    if max_length + 1 > model_limit:
        # the free position is never computed, so the model's own limit holds
        defaults["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    if not torch.cuda.is_available():
        defaults |= {
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker process would bind to one core
        }
        # the first request would compile for half a minute, for nothing
        torch._dynamo.config.disable = True
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it misses triton
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
