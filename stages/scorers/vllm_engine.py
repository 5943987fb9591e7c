"""Scoring with vLLM: prompt log-probabilities, kept flat and turned into arrays at once.

Entry i of a prompt's log-probabilities is the distribution that predicts token i; entry 0 is empty.
Each entry holds the observed token first, with its rank, then the top k, so the observed token
stands there twice when it is inside the top k.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...pipeline.errors import UserError, one_line
from ...pipeline.records import Example, ScoredExample
from ...trainer.models import ModelFiles, check_weights
from .base import ScorerSettings, scored

# Prompt log-probabilities take [scheduled tokens, V] in float32 that vLLM's memory profile does
# not foresee: a larger budget kills the engine at large vocabularies.
_SCHEDULED_TOKENS = 2048
_WINDOW_TOKENS = 16384  # in the engine at a time, so that memory stays flat


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

    def score(self, examples: Sequence[Example], top_k: int) -> Iterator[tuple[int, ScoredExample]]:
        """Each example's place in `examples` and its scores, as the engine finishes them."""
        sampling = self.sampling_params(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=top_k,
            flat_logprobs=True,
            detokenize=False,
        )
        next_place = tokens = 0
        in_flight: dict[str, int] = {}
        while next_place < len(examples) or in_flight:
            while next_place < len(examples) and tokens < _WINDOW_TOKENS:
                in_flight[self._submit(examples[next_place], sampling)] = next_place
                tokens += len(examples[next_place].input_ids)
                next_place += 1
            for output in self._step():
                if output.finished:
                    place = in_flight.pop(output.request_id)
                    tokens -= len(examples[place].input_ids)
                    yield place, self._scored(examples[place], output.prompt_logprobs, top_k)

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

    def _scored(self, example: Example, flat: Any, top_k: int) -> ScoredExample:
        starts_N = np.asarray(flat.start_indices)[example.positions]
        columns_Nw = starts_N[:, None] + np.arange(top_k + 1)
        ids_Nw = np.asarray(flat.token_ids)[columns_Nw]
        log_probs_Nw = np.asarray(flat.logprobs, np.float32)[columns_Nw]
        return scored(
            example,
            observed_log_probs_N=log_probs_Nw[:, 0],
            observed_ranks_N=np.asarray(flat.ranks)[starts_N],
            topk_ids_Nk=ids_Nw[:, 1:],
            topk_log_probs_Nk=log_probs_Nw[:, 1:],
            vocab_size=self.vocab_size,
        )


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
