"""The scores in a server's answer, or the reason why they cannot be."""

import numpy as np

from ....pipeline.errors import UserError
from ....pipeline.format.batches import flatten
from ....pipeline.format.records import Example, ScoredExample, WeightedExample
from ....pipeline.format.row_checks import MASS_TOLERANCE, violations
from ....pipeline.format.schema import schema_of
from ..base import contradicts_tail, scored
from .api import Prompt

NONE = -9999.0  # vLLM's log-probability of a token that a sampling option excludes


def scores_in(
    example: WeightedExample, prompt: Prompt, top_k: int, vocab_size: int
) -> ScoredExample:
    """The scores in a server's answer.

    It holds each id once, so for an observed token in the top k its rank is its place there.
    """
    N = len(example.positions)
    ids_Nk = np.empty((N, top_k), np.int32)
    log_probs_Nk = np.full((N, top_k), np.nan, np.float32)
    observed_N = np.empty(N, np.float32)
    ranks_N = np.empty(N, np.int32)
    for n, (position, token) in enumerate(
        zip(example.positions.tolist(), example.observed_ids.tolist(), strict=True)
    ):
        entries = prompt[position] or {}
        ids_E = np.fromiter(entries, np.int64, len(entries))
        log_probs_E = np.fromiter((e.logprob for e in entries.values()), np.float32, len(entries))
        ranks_E = np.fromiter((e.rank for e in entries.values()), np.int64, len(entries))
        is_top_E = (ranks_E >= 1) & (ranks_E <= top_k)
        found = len(np.unique(ranks_E[is_top_E]))  # vLLM numbers equally probable tokens too
        is_whole = found == is_top_E.sum() == top_k
        if token not in entries or not is_whole or ids_E.max() >= vocab_size:
            raise UserError(
                f"example {example.id}: the server's answer for token {position} holds {found} of "
                f"the ranks 1 to {top_k}, or one of them twice, or not the token itself, or ids "
                "outside the vocabulary: finished shards are kept: a vLLM server is needed here"
            )
        ids_Nk[n, ranks_E[is_top_E] - 1] = ids_E[is_top_E]
        log_probs_Nk[n, ranks_E[is_top_E] - 1] = log_probs_E[is_top_E]
        observed_N[n] = entries[token].logprob
        ranks_N[n] = entries[token].rank
    is_inside_N = ranks_N <= top_k
    as_probable_N = (log_probs_Nk >= observed_N[:, None]).sum(axis=1)
    ranks_N = np.where(is_inside_N, as_probable_N, ranks_N).astype(np.int32)
    masses_N = np.exp(log_probs_Nk.astype(np.float64)).sum(axis=1)
    if N and masses_N.max() > 1 + MASS_TOLERANCE:
        raise unnormalised(float(masses_N.max()))
    if (observed_N <= NONE).any() or (log_probs_Nk <= NONE).any():
        raise _impossible(example, f"{NONE:g} is not a log-probability, but stands for none")
    if (~is_inside_N & (observed_N > log_probs_Nk[:, -1])).any():
        raise _impossible(example, "a token outside of the top k is more probable than one of them")
    if contradicts_tail(observed_N, ranks_N, log_probs_Nk, vocab_size).any():
        raise _impossible(example, "the tokens outside of the top k cannot have the rest of 1")
    made = scored(example, observed_N, ranks_N, ids_Nk, log_probs_Nk, vocab_size)
    for wrong in violations("score", flatten(schema_of("score", vocab_size), [made]), vocab_size):
        raise _impossible(example, f"{wrong.column} {wrong.what}")
    return made


def _impossible(example: Example, what: str) -> UserError:
    return UserError(
        f"example {example.id}: the server's answer is impossible: {what}: finished shards are "
        "kept: a vLLM server is needed here"
    )


def unnormalised(mass: float) -> UserError:
    return UserError(
        f"the server's probabilities add up to {mass:.4f}: start it with `vllm serve "
        "--logprobs-mode raw_logprobs`: finished shards are kept"
    )
