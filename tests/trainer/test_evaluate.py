"""Evaluation is exact over tokens, however the examples are cut into batches."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from qpipe.pipeline.records import TargetExample
from qpipe.trainer.collate import collate
from qpipe.trainer.evaluate import Evaluation, evaluate
from qpipe.trainer.objective import Objective, objective_of
from qpipe.trainer.student import Student
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")


def objective(method: str, form: str, residual: str) -> Objective:
    settings = {"method": method, "form": form, "parameters": {}, "residual": residual}
    return objective_of(settings | {"tail_shape": "student"}, method)


ANCHORED = objective("sft+kl", "frozen-target", "base")


@pytest.fixture
def student(model: Path) -> Student:
    loaded = AutoModelForCausalLM.from_pretrained(model, attention_dropout=0.5)
    return Student(loaded).train()


def by_hand(student: Student, examples: list[TargetExample]) -> Evaluation:
    """One example and one position at a time, in float64."""
    nll = loss = divergence = tokens = 0.0
    for example in examples:
        with torch.no_grad():
            input_ids = torch.tensor(example.input_ids[None].astype(np.int64))
            log_probs_TV = student.model(input_ids).logits[0].double().log_softmax(1).numpy()
        ends = np.cumsum(example.counts)
        for n, position in enumerate(example.positions):
            entries = slice(ends[n] - example.counts[n], ends[n])
            log_p = log_probs_TV[position - 1]
            ids, probs = example.support_ids[entries], example.support_probs[entries]
            outcomes = np.append(probs, example.tail_mass[n]).astype(np.float64)
            log_outcomes = np.append(log_p[ids], np.log(np.exp(np.delete(log_p, ids)).sum()))
            observed, trust = example.input_ids[position], example.trust[n]
            cross_entropy = -(outcomes * log_outcomes).sum()
            target = -trust * log_p[observed] + (1 - trust) * cross_entropy
            loss += example.weights[n] * target
            nll -= log_p[observed]
            divergence += cross_entropy + (outcomes * np.log(outcomes)).sum()
            tokens += 1
    return Evaluation(int(tokens), loss / tokens, nll / tokens, divergence / tokens)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_means_over_tokens(
    student: Student, make_examples: Callable[..., list[TargetExample]], batch_size: int
) -> None:
    examples = make_examples(7)
    batches = [collate(examples[i : i + batch_size]) for i in range(0, 7, batch_size)]
    found = evaluate(student, batches, CPU, ANCHORED)
    assert student.training
    expected = by_hand(student.eval(), examples)
    assert found.tokens == expected.tokens
    for name in ("target_loss", "nll", "kl_to_base"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5)


def test_no_distance_to_a_residual_that_is_not_the_base(
    student: Student, make_examples: Callable[..., list[TargetExample]]
) -> None:
    frozen = objective("target-sft", "frozen-target", "mixture")
    found = evaluate(student, [collate(make_examples(2))], CPU, frozen)
    assert found.kl_to_base is None


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_live_target_is_that_of_the_evaluated_student(
    student: Student, make_examples: Callable[..., list[TargetExample]], batch_size: int
) -> None:
    """dft: the mean of −weight·p_y·log p_y, at the weights as they are now."""
    examples = make_examples(5)
    batches = [collate(examples[i : i + batch_size]) for i in range(0, 5, batch_size)]
    found = evaluate(student, batches, CPU, objective("dft", "live", "observed"))
    loss = tokens = 0.0
    for example in examples:
        with torch.no_grad():
            input_ids = torch.tensor(example.input_ids[None].astype(np.int64))
            log_probs_TV = student.eval().model(input_ids).logits[0].double().log_softmax(1)
        for position, weight in zip(example.positions, example.weights, strict=True):
            log_p = float(log_probs_TV[position - 1, example.input_ids[position]])
            loss -= weight * np.exp(log_p) * log_p
            tokens += 1
    assert found.target_loss == pytest.approx(loss / tokens, rel=1e-5)
    assert found.tokens == tokens
    assert found.kl_to_base is None
