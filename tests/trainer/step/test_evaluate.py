"""Evaluation is exact over tokens, however the examples are cut into batches."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qpipe.pipeline.format.records import TargetExample
from qpipe.pipeline.methods import choose
from qpipe.trainer.data.batch import padded_batch
from qpipe.trainer.loss.objective import Objective, objective_of
from qpipe.trainer.models.student import Student
from qpipe.trainer.step.distributed import start_accelerator
from qpipe.trainer.step.evaluate import Evaluation, evaluate
from transformers import AutoModelForCausalLM


def objective(method: str, form: str, residual: str) -> Objective:
    settings = {"method": method, "form": form, "parameters": {}, "residual": residual}
    return objective_of(settings | {"tail_shape": "student"}, method)


def found_on(
    student: Student, examples: list[TargetExample], followed: Objective, batch_size: int = 3
) -> Evaluation:
    parts = range(0, len(examples), batch_size)
    batches = [padded_batch(examples[i : i + batch_size]) for i in parts]
    return evaluate(student, batches, start_accelerator("float32"), followed)


ANCHORED = objective("sft+kl", "frozen-target", "base")


@pytest.fixture
def student(model: Path) -> Student:
    loaded = AutoModelForCausalLM.from_pretrained(model, attention_dropout=0.5)
    return Student(loaded).train()


def by_hand(student: Student, examples: list[TargetExample]) -> Evaluation:
    """One example and one position at a time, in float64."""
    nll = loss = divergence = trusts = tails = entropy = tokens = 0.0
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
            trusts += trust
            tails += (1 - trust) * example.tail_mass[n]
            entropy -= (np.exp(log_p) * log_p).sum()
            tokens += 1
    sums = (loss, nll, divergence, trusts, tails, entropy)
    return Evaluation(int(tokens), *(value / tokens for value in sums))


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_means_over_tokens(
    student: Student, make_examples: Callable[..., list[TargetExample]], batch_size: int
) -> None:
    examples = make_examples(7)
    found = found_on(student, examples, ANCHORED, batch_size)
    assert student.training
    expected = by_hand(student.eval(), examples)
    assert found.tokens == expected.tokens
    for name, value in asdict(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5)


def test_means_where_the_head_is_not_understood_and_of_chunks_of_one(
    student: Student,
    make_examples: Callable[..., list[TargetExample]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = by_hand(student.eval(), make_examples(7))
    monkeypatch.setattr("qpipe.trainer.loss.head.CHUNK_VALUES", 1)
    assert asdict(found_on(student, make_examples(7), ANCHORED)) == pytest.approx(
        asdict(expected), rel=1e-5
    )
    student.head_form = None
    assert asdict(found_on(student, make_examples(7), ANCHORED)) == pytest.approx(
        asdict(expected), rel=1e-5
    )


def test_no_distance_to_a_residual_that_is_not_the_base(
    student: Student, make_examples: Callable[..., list[TargetExample]]
) -> None:
    frozen = objective("target-sft", "frozen-target", "mixture")
    found = found_on(student, make_examples(2), frozen)
    assert found.kl_to_base is None


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_live_target_is_that_of_the_evaluated_student(
    student: Student, make_examples: Callable[..., list[TargetExample]], batch_size: int
) -> None:
    """dft: the mean of −weight·p_y·log p_y, at the weights as they are now."""
    examples = make_examples(5)
    found = found_on(student, examples, objective("dft", "live", "observed"), batch_size)
    loss = trust = tokens = 0.0
    for example in examples:
        with torch.no_grad():
            input_ids = torch.tensor(example.input_ids[None].astype(np.int64))
            log_probs_TV = student.eval().model(input_ids).logits[0].double().log_softmax(1)
        for position, weight in zip(example.positions, example.weights, strict=True):
            log_p = float(log_probs_TV[position - 1, example.input_ids[position]])
            loss -= weight * np.exp(log_p) * log_p
            trust += np.exp(log_p)
            tokens += 1
    assert found.target_loss == pytest.approx(loss / tokens, rel=1e-5)
    assert found.trust == pytest.approx(trust / tokens, rel=1e-5)
    assert found.tokens == tokens
    assert found.kl_to_base is None


def test_the_tail_of_a_live_mixture_is_that_of_the_mixture(
    student: Student, make_live_examples: Callable[..., list[TargetExample]]
) -> None:
    """target-sft with η = 0.5: √(p·q), outside the support as a whole."""
    examples = make_live_examples(3, "teacher")
    followed = objective("target-sft", "live", "teacher")
    found = found_on(student, examples, replace(followed, choice=choose("target-sft", "live")))
    tails: list[float] = []
    for example in examples:
        with torch.no_grad():
            input_ids = torch.tensor(example.input_ids[None].astype(np.int64))
            probs_TV = student.eval().model(input_ids).logits[0].double().softmax(1).numpy()
        ends = np.cumsum(example.counts)
        for n, position in enumerate(example.positions):
            entries = slice(ends[n] - example.counts[n], ends[n])
            ids, q, p = example.support_ids[entries], example.support_probs[entries], probs_TV
            inside = np.sqrt(p[position - 1][ids] * q).sum()
            tail = np.sqrt(np.delete(p[position - 1], ids).sum() * example.tail_mass[n])
            p_y = p[position - 1][example.input_ids[position]]
            tails.append((1 - p_y) * tail / (inside + tail))
    assert found.tail_mass == pytest.approx(np.mean(tails), rel=1e-5)


def test_a_method_without_trust(
    student: Student, make_live_examples: Callable[..., list[TargetExample]]
) -> None:
    found = found_on(
        student, make_live_examples(2, "observed"), objective("gem", "live", "observed")
    )
    assert found.trust is None
    assert found.entropy > 0
