"""What is asked of vLLM for an example, and the scores in its answer.

An engine with `rows_alone` computes the supervised rows alone, at all ids that are asked for
(`supervised_rows`). Any other computes every row of a prompt, and no given ids.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...pipeline.errors import UserError
from ...pipeline.format.records import Example, ScoredExample, WeightedExample
from .base import GivenIds, scored, with_given
from .supervised_rows.request import RowRequest
from .vllm_arrays import PromptArrays, prompt_arrays


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a started engine can do."""

    keeps_tensors: bool = False  # passes the engine's tensors on
    rows_alone: bool = False  # computes supervised rows only, and given ids with them
    block_size: int = 0  # tokens of a block of its prefix cache; 0 if it must not read that


def sampling_options(
    can: Abilities, example: WeightedExample, given: GivenIds | None, top_k: int, reads: bool
) -> dict[str, Any]:
    """The sampling parameters of an example; `reads` lets the engine read its prefix cache."""
    options: dict[str, Any] = {
        "prompt_logprobs": top_k,
        "skip_reading_prefix_cache": not (reads and can.block_size > 0),
    }
    if can.rows_alone:
        given = given or GivenIds(np.zeros_like(example.positions), np.empty(0, np.int32))
        asked = RowRequest(example.positions - 1, example.observed_ids, given.padded(), top_k)
        options |= {"extra_args": asked.packed()}
    return options


def lacks_rows(can: Abilities, example: Example, output: Any) -> bool:
    """Whether the engine read a supervised row from its cache instead of computing it.

    Such a row is missing from the answer or, with vLLM's first model runner, uninitialised.
    """
    rows = len(prompt_arrays(output.prompt_logprobs).ranks)
    if can.rows_alone:
        return rows < len(example.positions)
    left_out = len(example.input_ids) - 1 - rows
    return max(left_out, output.num_cached_tokens or 0) > _first_row(example)


def answer(
    can: Abilities,
    example: WeightedExample,
    given: GivenIds | None,
    output: Any,
    top_k: int,
    vocab_size: int,
) -> ScoredExample:
    """The scores in an engine's output. Raises UserError if rows or columns are missing."""
    arrays = _supervised(can, example, prompt_arrays(output.prompt_logprobs))
    given_Nw = np.empty((len(arrays.ranks), 0), np.int64) if given is None else given.padded()
    if arrays.ids.shape[1] != 1 + top_k + given_Nw.shape[1]:
        raise _unexpected(example, f"{arrays.ids.shape[1]} values at a token for --top-k {top_k}")
    result = scored(
        example,
        observed_log_probs_N=arrays.log_probs[:, 0],
        observed_ranks_N=arrays.ranks,
        topk_ids_Nk=arrays.ids[:, 1 : top_k + 1],
        topk_log_probs_Nk=arrays.log_probs[:, 1 : top_k + 1],
        vocab_size=vocab_size,
    )
    if given is None:
        return result
    log_probs_G = arrays.log_probs[:, top_k + 1 :][given_Nw >= 0]
    return with_given(result, given, log_probs_G, vocab_size)


def _supervised(can: Abilities, example: Example, arrays: PromptArrays) -> PromptArrays:
    """The rows of the supervised positions: all that came, or some of the last ones."""
    rows, tokens = len(arrays.ranks), len(example.input_ids)
    if can.rows_alone:
        if rows != len(example.positions):
            raise _unexpected(example, f"{rows} of {len(example.positions)} rows")
        return arrays
    left_out = tokens - 1 - rows
    if not 0 <= left_out <= _first_row(example):
        raise _unexpected(example, f"log-probabilities of {rows} tokens for a prompt of {tokens}")
    rows_N = example.positions - 1 - left_out
    return PromptArrays(arrays.ids[rows_N], arrays.log_probs[rows_N], arrays.ranks[rows_N])


def _unexpected(example: Example, what: str) -> UserError:
    return UserError(
        f"example {example.id}: vLLM returned {what}: finished shards are kept: use --engine "
        "transformers and another --out"
    )


def _first_row(example: Example) -> int:
    """The row of the first supervised position: row i predicts token i + 1."""
    return int(example.positions[0]) - 1
