"""Batches against what was worked out by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from qpipe.pipeline.format.records import TargetExample
from qpipe.trainer.data.batch import Batch, SparseTargets, observed_only, packed_batch, padded_batch
from qpipe.trainer.models.student import Student
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
    batch = padded_batch([SHORT, LONG])
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


def test_pack_by_hand() -> None:
    batch = packed_batch([SHORT, LONG])
    assert batch.ids == ["short", "long"]
    assert batch.tokens == 3
    # up to the last supervised token, which is only predicted
    assert batch.input_ids.tolist() == [[3, 5, 6, 7]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 0, 1, 2]]
    assert batch.segments.lengths == (0, 1, 3)
    assert batch.attention_mask is None
    assert batch.rows.tolist() == [0, 0, 0]
    # position 1 of the first; positions 2 and 3 of the second, which starts at column 1
    assert batch.columns.tolist() == [0, 2, 3]
    for name in SparseTargets.__dataclass_fields__:
        packed, padded = (
            getattr(f([SHORT, LONG]).targets, name) for f in (packed_batch, padded_batch)
        )
        assert torch.equal(packed, padded), name


def test_a_shared_beginning_is_packed_once() -> None:
    """Supervised tokens may lie in it, or be the first after it."""
    first = example("first", [1, 2, 3, 4, 5, 6], [1, 3, 5], [{2: 1.0}, {4: 1.0}, {6: 1.0}])
    second = example("second", [1, 2, 3, 7, 8], [3, 4], [{7: 1.0}, {8: 1.0}])
    all_shared = example("all shared", [1, 2, 3, 9], [3], [{9: 1.0}])
    batch = packed_batch([first, second, all_shared])
    assert batch.segments.lengths == (3, 2, 1)  # nothing is left of the third
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 7]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.columns.tolist() == [0, 2, 4, 2, 5, 2]
    alone = packed_batch([second])
    assert (alone.segments.lengths, alone.columns.tolist()) == ((4,), [2, 3])


def test_inputs_of_the_model() -> None:
    assert list(padded_batch([SHORT]).inputs) == ["input_ids", "attention_mask"]
    assert list(packed_batch([SHORT]).inputs) == ["input_ids", "position_ids", "segments"]
    for batch in (padded_batch([SHORT, LONG]), packed_batch([SHORT, LONG])):
        moved = batch.to(torch.device("meta"))
        lengths = [each.segments and each.segments.lengths for each in (batch, moved)]
        assert lengths[0] == lengths[1]
        assert {value.device.type for value in tensors(moved).values()} == {"meta"}
        assert {name: value.shape for name, value in tensors(moved).items()} == {
            name: value.shape for name, value in tensors(batch).items()
        }


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.inputs.items() if name != "segments"}


def test_large_ids_stay_exact() -> None:
    token = 2**24 + 1  # the first that float32 cannot hold
    batch = padded_batch([example("large", [token, token], [1], [{token: 1.0}])])
    assert batch.input_ids.tolist() == [[token, token]]
    assert batch.targets.support_ids.tolist() == [[token]]


@pytest.mark.parametrize("join", [padded_batch, packed_batch])
def test_no_examples(join: Callable[..., Batch]) -> None:
    batch = join([])
    assert batch.tokens == 0
    assert all(value.shape == (1, 1) for value in tensors(batch).values())


def test_examples_without_positions_keep_their_number() -> None:
    bare = example("bare", [1, 2], [], [])
    batch = padded_batch([bare, SHORT, bare, LONG, bare])
    assert batch.targets.example_of.tolist() == [1, 3, 3]
    assert batch.rows.tolist() == [1, 3, 3]


def test_observed_only_keeps_the_residual() -> None:
    batch = padded_batch([SHORT, LONG])
    hard = observed_only(batch.targets)
    assert hard.trust.tolist() == hard.weights.tolist() == [1, 1, 1]
    assert hard.support_probs is batch.targets.support_probs


def test_student_logits_are_those_of_each_example_alone(
    model: Path, make_examples: Callable[..., list[TargetExample]]
) -> None:
    """Neither padding nor batching moves a row: each is the one that predicts its token."""
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    examples = make_examples(6)
    with torch.no_grad():
        found = Student(loaded).logits(padded_batch(examples))
        expected = []
        for one in examples:
            for position in one.positions:
                context = torch.tensor(one.input_ids[:position][None].astype(np.int64))
                expected.append(loaded(context).logits[0, -1])
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
