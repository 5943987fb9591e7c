"""A base's and a teacher's scores of the same demonstrations, made from integers alone.

Each probability is a ratio of two integers and its logarithm is correctly rounded by `decimal`, so
that the values are the same on every processor, with every version of numpy.
"""

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
from qpipe.pipeline.format.records import ScoredExample
from qpipe.tests.stages.build_targets.made import score_folder

VOCAB_SIZE = 320
TOP_K = 40
POSITIONS = (9, 0, 1, 14, 30, 5, 21)  # of each demonstration
WEIGHTS = (0.0, 0.25, 0.5, 1.0)  # cft takes none above 1


@dataclass(frozen=True)
class Counted:
    """A demonstration under a model whose probabilities are counts divided by their sum."""

    name: str
    input_ids: list[int]  # [T]
    positions: list[int]  # [N]
    counts: list[list[int]]  # [N, V]
    token_weights: list[float]  # [N]
    gathers_observed: bool  # whether the observed token is among the entries in any case

    def scored(self, top_k: int) -> ScoredExample:
        observed = [self.input_ids[position] for position in self.positions]
        rows = list(zip(self.counts, observed, strict=True))
        entries = [self._entries(counts, token, top_k) for counts, token in rows]
        logs = [
            [_log_prob(counts, token) for token in ids]
            for counts, ids in zip(self.counts, entries, strict=True)
        ]
        tails = [
            float(1 - Fraction(sum(counts[token] for token in ids), sum(counts)))
            for counts, ids in zip(self.counts, entries, strict=True)
        ]
        ranks = [sum(each >= counts[token] for each in counts) for counts, token in rows]
        return ScoredExample(
            id=self.name,
            input_ids=np.array(self.input_ids, np.int32),
            positions=np.array(self.positions, np.int32),
            observed_log_probs=np.array([_log_prob(*row) for row in rows], np.float32),
            observed_ranks=np.array(ranks, np.int32),
            counts=np.array([len(ids) for ids in entries], np.int32),
            topk_ids=np.array(list(chain.from_iterable(entries)), np.int32),
            topk_log_probs=np.array(list(chain.from_iterable(logs)), np.float32),
            tail_mass=np.array(tails, np.float32),
            token_weights=np.array(self.token_weights, np.float32),
        )

    def _entries(self, counts: list[int], observed: int, top_k: int) -> list[int]:
        order = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
        kept = set(order[:top_k]) | ({observed} if self.gathers_observed else set())
        return [token for token in order if token in kept]


def _log_prob(counts: list[int], token: int) -> float:
    return float((Decimal(counts[token]) / Decimal(sum(counts))).ln())


def make_scores(root: Path) -> None:
    """Seal `scores` and `teacher` in a folder: seven demonstrations and a reject, three shards."""
    for name in ("scores", "teacher"):
        rows = [_counted(number, name == "teacher") for number in range(len(POSITIONS))]
        score_folder(root / name, rows, top_k=TOP_K, vocab_size=VOCAB_SIZE)


def _counted(number: int, is_teacher: bool) -> Counted:
    """Demonstration `number`; half of its observed tokens are among the most probable."""
    draw, size = Random(number).random, POSITIONS[number]  # of `Random` this alone never changes
    length = 2 * size + 3
    tokens = [int(VOCAB_SIZE * draw()) for _ in range(length)]
    positions = [2 * place + 1 + (draw() < 0.5) for place in range(size)]
    counts = [[int(2000 * draw()) + 1 for _ in range(VOCAB_SIZE)] for _ in range(size)]
    for row in counts:
        for _ in range(12):
            row[int(VOCAB_SIZE * draw())] <<= int(10 * draw())
    for row, position in zip(counts[::2], positions[::2], strict=True):
        row[tokens[position]] <<= 8
    weights = [WEIGHTS[int(len(WEIGHTS) * draw())] for _ in range(size)]
    if is_teacher:
        counts = [[each << int(5 * draw()) for each in row] for row in counts]
    return Counted(f"chats:{number}", tokens, positions, counts, weights, is_teacher)
