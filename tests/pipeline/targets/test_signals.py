"""What rules read of a truncated base: exact where it can be, else within its bound.

k entries of the base are known, the observed token, and the mass of the tail.
"""

import math

import pytest
from qpipe.pipeline.methods.table import choose
from qpipe.tests.support.methods import FORMULAS, Token, base_entropy

from .dense import VOCAB_SIZE, evidence_of, random_dense, tokens_of

READS = frozenset({"concentration", "rank", "expected_rank", "base_mass", "base_entropy"})


def rank(token: Token) -> int:
    return sum(log_prob >= token.base[token.observed] for log_prob in token.base)


def expected_rank(probs: list[float]) -> float:
    return math.fsum(r * p for r, p in enumerate(sorted(probs, reverse=True), start=1))


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [1, 3, 8, VOCAB_SIZE])
def test_each_signal_is_within_its_bound(top_k: int, spread: float) -> None:
    demonstrations = [random_dense(seed, 8, spread=spread) for seed in range(12)]
    evidence = evidence_of(demonstrations, top_k)
    found = evidence.signals(READS)
    seen = set()
    for n, token in enumerate(tokens_of(demonstrations)):
        probs = [math.exp(log_prob) for log_prob in token.base]
        order = sorted(range(VOCAB_SIZE), key=lambda k: -probs[k])
        known = {*order[:top_k], token.observed}
        tail = math.fsum(p for k, p in enumerate(probs) if k not in known)
        is_known = token.observed in order[:top_k]
        seen.add(is_known)

        assert found.rank[n] == rank(token)
        missed = math.fsum(p * p for p in probs) - found.concentration[n]
        assert -1e-12 <= missed <= tail * probs[order[top_k - 1]] + 1e-12
        missed = expected_rank(probs) - found.expected_rank[n]
        assert -1e-12 <= missed <= tail * (VOCAB_SIZE + 1 - top_k) + 1e-12
        missed = base_entropy(token) - found.base_entropy[n]
        assert -1e-12 <= missed <= tail * math.log(VOCAB_SIZE) + 1e-12
        up_to = math.fsum(p for p in probs if p <= probs[token.observed])
        if is_known:
            assert found.base_mass[n] == pytest.approx(up_to, abs=1e-12)
        else:
            assert up_to - 1e-12 <= found.base_mass[n] <= tail + probs[token.observed] + 1e-12
    assert top_k == VOCAB_SIZE or seen == {True, False}


def test_the_weight_of_prift_mass_is_known_while_the_tail_is_below_its_tau() -> None:
    """An observed token outside of the most probable ones has less than the tail below it."""
    demonstrations = [random_dense(seed, 8, spread=2.5) for seed in range(12)]
    found = choose("prift-mass").method.trust(
        evidence_of(demonstrations, 6).signals(READS), {"tau": 0.5}
    )
    settled = 0
    for n, token in enumerate(tokens_of(demonstrations)):
        known = sorted(math.exp(log_prob) for log_prob in token.base)[-6:]
        if rank(token) <= 6 or 1 - math.fsum(known) < 0.5:
            settled += 1
            assert found[n] == FORMULAS["prift-mass"](token, {"tau": 0.5})[0]
    assert settled > 90
