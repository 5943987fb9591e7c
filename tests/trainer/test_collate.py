"""Batches against what was worked out by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from qpipe.pipeline.records import TargetExample
from qpipe.trainer.collate import collate, observed_only
from qpipe.trainer.student import Student
from transformers import AutoModelForCausalLM


def example(
    name: str, input_ids: list[int], positions: list[int], supports: list[dict[int, float]]
) -> TargetExample:
    """Targets with a trust of 0.1 times the position and the tail that is left."""
    counts = [len(support) for support in supports]
    return TargetExample(
        id=name,
        input_ids=np.array(input_ids, np.int32),
        positions=np.array(positions, np.int32),
        trust=np.array(positions, np.float32) / 10,
        counts=np.array(counts, np.int32),
        support_ids=np.array([i for support in supports for i in support], np.int32),
        support_probs=np.array([p for support in supports for p in support.values()], np.float32),
        tail_mass=np.array([1 - sum(support.values()) for support in supports], np.float32),
        weights=np.full(len(positions), 2, np.float32),
    )


LONG = example("long", [5, 6, 7, 8], [2, 3], [{9: 0.5, 7: 0.25}, {8: 1.0}])
SHORT = example("short", [3, 4], [1], [{1: 0.5, 2: 0.25, 4: 0.125}])


def test_collate_by_hand() -> None:
    batch = collate([SHORT, LONG])
    targets = batch.targets
    assert batch.ids == ["short", "long"]
    assert batch.tokens == 3
    assert batch.input_ids.tolist() == [[3, 4, 0, 0], [5, 6, 7, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    # the token at position p is predicted one column before it
    assert batch.rows.tolist() == [0, 1, 1]
    assert batch.columns.tolist() == [0, 1, 2]
    assert targets.observed_ids.tolist() == [4, 7, 8]
    assert targets.example_of.tolist() == [0, 1, 1]
    assert targets.support_ids.tolist() == [[1, 2, 4], [9, 7, 7], [8, 8, 8]]
    assert targets.support_mask.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert targets.support_probs.tolist() == [[0.5, 0.25, 0.125], [0.5, 0.25, 0], [1, 0, 0]]
    assert targets.tail_mass.tolist() == [0.125, 0.25, 0]
    torch.testing.assert_close(targets.trust, torch.tensor([0.1, 0.2, 0.3]))
    assert targets.weights.tolist() == [2, 2, 2]


def test_large_ids_stay_exact() -> None:
    token = 2**24 + 1  # the first that float32 cannot hold
    batch = collate([example("large", [token, token], [1], [{token: 1.0}])])
    assert batch.input_ids.tolist() == [[token, token]]
    assert batch.targets.support_ids.tolist() == [[token]]


def test_no_examples() -> None:
    batch = collate([])
    assert batch.tokens == 0
    assert batch.input_ids.shape == batch.attention_mask.shape == (1, 1)


def test_examples_without_positions_keep_their_number() -> None:
    bare = example("bare", [1, 2], [], [])
    batch = collate([bare, SHORT, bare, LONG, bare])
    assert batch.targets.example_of.tolist() == [1, 3, 3]
    assert batch.rows.tolist() == [1, 3, 3]


def test_observed_only_keeps_the_residual() -> None:
    batch = collate([SHORT, LONG])
    hard = observed_only(batch)
    assert hard.targets.trust.tolist() == hard.targets.weights.tolist() == [1, 1, 1]
    assert hard.targets.support_probs is batch.targets.support_probs
    assert hard.input_ids is batch.input_ids


def test_student_logits_are_those_of_each_example_alone(
    model: Path, make_examples: Callable[..., list[TargetExample]]
) -> None:
    """Neither padding nor batching moves a row: each is the one that predicts its token."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    examples = make_examples(6)
    with torch.no_grad():
        found = Student(loaded).logits(collate(examples))
        expected = []
        for one in examples:
            for position in one.positions:
                context = torch.tensor(one.input_ids[:position][None].astype(np.int64))
                expected.append(loaded(context).logits[0, -1])
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
