"""vLLM's prompt log-probabilities as arrays, without a Python object for each of them.

The engine hands its front end tensors, which `LogprobsProcessor` of a request turns into Python
numbers, 66 for each token at k = 64. That step is the public interface's last and its slowest.
`keep_tensors` takes it out of one request's processor: the tensors stay as they came. Where a
version of vLLM is built otherwise (`keeps_tensors` tells), its flat lists are turned into arrays:
the same numbers, some microseconds a token later.

R rows, one for each token but the first; c = k + 1 columns: the observed token, then the top k.
"""

from dataclasses import dataclass, fields
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.format.records import Floats


@dataclass(frozen=True, slots=True, eq=False)
class PromptArrays:
    """Row i is the distribution that predicts token i + 1 of a prompt."""

    ids: NDArray[np.integer]  # [R, c]
    log_probs: Floats  # [R, c]
    ranks: NDArray[np.integer]  # [R] of the observed token: 1 is the mode


def keeps_tensors() -> bool:
    """Whether the installed vLLM is built as `keep_tensors` needs it."""
    try:
        from vllm.v1.engine.logprobs import LogprobsProcessor
        from vllm.v1.engine.output_processor import RequestState
        from vllm.v1.outputs import LogprobsTensors

        update = LogprobsProcessor._update_prompt_logprobs
        state = signature(RequestState)
        first_fields = LogprobsTensors._fields[:3]
        holds = {field.name for field in fields(LogprobsProcessor)}
    except (ImportError, AttributeError, TypeError, ValueError):
        return False
    return (
        list(signature(update).parameters) == ["self", "prompt_logprobs_tensors"]
        and first_fields == ("logprob_token_ids", "logprobs", "selected_token_ranks")
        and "prompt_logprobs" in holds
        and "logprobs_processor" in state.parameters
    )


def keep_tensors(engine: Any, request_id: str) -> None:
    """Let a request that the engine has just taken give the tensors themselves.

    `request_id` is what `add_request` answered. The output's `prompt_logprobs` is then a list of
    the engine's tensors, one entry for each time that it handed some over.
    """
    processor = engine.output_processor.request_states[request_id].logprobs_processor
    processor.prompt_logprobs = []
    processor._update_prompt_logprobs = processor.prompt_logprobs.append


def prompt_arrays(prompt_logprobs: Any) -> PromptArrays:
    """The arrays in an output's `prompt_logprobs`, kept tensors or vLLM's flat lists."""
    if isinstance(prompt_logprobs, list):
        ids, log_probs, ranks = (
            np.concatenate([tensors[column].numpy() for tensors in prompt_logprobs])
            for column in range(3)
        )
        return PromptArrays(ids, log_probs, ranks)
    flat = prompt_logprobs
    width = flat.end_indices[-1] - flat.start_indices[-1]
    return PromptArrays(
        np.array(flat.token_ids).reshape(-1, width),
        np.array(flat.logprobs, np.float32).reshape(-1, width),
        np.array(flat.ranks[::width]),
    )
