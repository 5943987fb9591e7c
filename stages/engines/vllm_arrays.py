"""vLLM's prompt log-probabilities as arrays, without a Python object for each value.

The engine passes tensors to its front end, where `LogprobsProcessor` converts them into Python
numbers, 66 for each token at k = 64. That last step of the public interface is the slowest.
`keep_tensors` removes it from the processor of one request, which then keeps the tensors. For a
version of vLLM with other internals (`keeps_tensors`), its flat lists are converted into arrays:
the same numbers, some microseconds per token slower.

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
    """Whether the installed vLLM has the internals that `keep_tensors` needs."""
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
    """Make a request that was just added return the engine's tensors.

    `request_id` is the result of `add_request`. The output's `prompt_logprobs` is then a list of
    the tensors of each engine step.
    """
    processor = engine.output_processor.request_states[request_id].logprobs_processor
    processor.prompt_logprobs = []
    processor._update_prompt_logprobs = processor.prompt_logprobs.append


def prompt_arrays(prompt_logprobs: Any) -> PromptArrays:
    """Convert an output's `prompt_logprobs`, kept tensors or vLLM's flat lists, to arrays."""
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
