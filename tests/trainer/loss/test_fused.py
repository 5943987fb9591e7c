"""The fused loss against the plain one, and both against float64."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.methods.table import choose
from qpipe.tests.support.losses import (
    CHOICES,
    HEADS,
    IDS,
    SIZE,
    SUPPORT,
    VOCAB_SIZE,
    Gradients,
    objective_of,
    random_head,
    random_targets,
    run,
    to_dtype,
)
from qpipe.tests.support.tiers import slow
from qpipe.trainer.data.batch import SparseTargets
from qpipe.trainer.loss import fused
from qpipe.trainer.loss.fused import fused_loss
from qpipe.trainer.loss.head import Head, chunks
from qpipe.trainer.loss.objective import Loss, Objective
from qpipe.trainer.models.heads import HeadForm, recognise
from qpipe.trainer.models.student import load_student
from torch import Tensor


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "qpipe.trainer.loss.head.CHUNK_VALUES", 7 * VOCAB_SIZE
    )  # 23 rows in four chunks


def both(
    choice: Choice, targets: SparseTargets, hidden: Tensor, head: Head, dtype: torch.dtype
) -> tuple[tuple[Loss, Gradients], tuple[Loss, Gradients]]:
    """The plain path and the fused one."""
    objective, targets = objective_of(choice), to_dtype(targets, dtype)
    plain = run(lambda h, head: objective(head.logits(h), targets), hidden, head, dtype)
    mine = run(lambda h, head: fused_loss(h, head, targets, objective), hidden, head, dtype)
    return plain, mine


@pytest.mark.parametrize("form", HEADS)
@pytest.mark.parametrize("choice", CHOICES, ids=IDS)
def test_value_and_gradients_are_those_of_the_plain_path(choice: Choice, form: str) -> None:
    hidden, head = random_head(**HEADS[form])
    plain, mine = both(choice, random_targets(choice), hidden, head, torch.float64)

    torch.testing.assert_close(mine[0].sum, plain[0].sum, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mine[1], plain[1], rtol=1e-9, atol=1e-10)
    if plain[0].error_bounds is None:
        assert mine[0].error_bounds is None
    else:
        torch.testing.assert_close(mine[0].error_bounds, plain[0].error_bounds)


@pytest.mark.parametrize("name", ["sft+kl", "label-smoothing", "target-sft", "gem", "iw-sft"])
def test_float32_is_as_near_to_float64_as_the_plain_path(name: str) -> None:
    choice = choose(name, "live")
    hidden, head = random_head()
    targets = random_targets(choice)
    truth = both(choice, targets, hidden, head, torch.float64)[0]
    plain, mine = both(choice, targets, hidden, head, torch.float32)

    def errors(result: tuple[Loss, Gradients]) -> list[float]:
        pairs = zip([result[0].sum, *result[1]], [truth[0].sum, *truth[1]], strict=True)
        return [
            float(((got - wanted).abs().max() / wanted.abs().max()).detach())
            for got, wanted in pairs
        ]

    for own, theirs in zip(errors(mine), errors(plain), strict=True):
        assert own <= 2 * theirs + 3e-7


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize(
    ("name", "form"),
    [("target-sft", "live"), *slow(("sft+kl", "frozen-target"), ("gem", "live"))],
)
def test_compiled_in_one_graph_it_is_the_same(name: str, form: Any) -> None:
    """No graph break; the chunks become part of the graph."""
    choice = choose(name, form)
    objective, targets = objective_of(choice), to_dtype(random_targets(choice), torch.float32)
    hidden, head = random_head(bias=True, softcap=3.0)

    def loss(hidden: Tensor, head: Head) -> Loss:
        return fused_loss(hidden, head, targets, objective)

    torch.compiler.reset()
    compiled: Any = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(disable=False):  # vLLM's engine, run before, leaves it so
        mine, theirs = (run(each, hidden, head, torch.float32) for each in (compiled, loss))
    torch.testing.assert_close(mine[0].sum, theirs[0].sum, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-5, atol=1e-6)


def test_a_support_that_is_the_whole_vocabulary_has_no_tail() -> None:
    choice = choose("sft+kl")
    targets = random_targets(choice, support=VOCAB_SIZE)
    everything = replace(
        targets,
        support_ids=torch.arange(VOCAB_SIZE).repeat(SIZE, 1),
        support_mask=torch.ones(SIZE, VOCAB_SIZE, dtype=torch.bool),
        support_probs=torch.full((SIZE, VOCAB_SIZE), 1 / VOCAB_SIZE, dtype=torch.float64),
        tail_mass=torch.full((SIZE,), 1e-8, dtype=torch.float64),  # as rounding leaves it
    )
    hidden, head = random_head()
    plain, mine = both(choice, everything, hidden, head, torch.float64)

    # the plain path adds up to 1 without the last 1e-8
    torch.testing.assert_close(mine[0].sum, plain[0].sum)
    torch.testing.assert_close(mine[1], plain[1], rtol=1e-6, atol=1e-6)


def test_a_tail_that_the_student_hardly_sees() -> None:
    """float32 holds no p_C of e^−200; its log and its gradient are there all the same."""
    choice = choose("sft+kl")
    hidden, head = random_head()
    targets = random_targets(choice)
    # one support for all rows, which the logits can then stand above
    shared_NS = torch.arange(SUPPORT).expand(SIZE, SUPPORT)
    mask_NS = torch.ones(SIZE, SUPPORT, dtype=torch.bool)
    targets = replace(
        targets,
        support_ids=shared_NS,
        observed_ids=targets.observed_ids % SUPPORT,
        support_mask=mask_NS,
        support_probs=torch.full((SIZE, SUPPORT), 0.9 / SUPPORT),
        tail_mass=torch.full((SIZE,), 0.1),
    )
    weight = torch.full_like(head.weight, -60.0)
    weight[:SUPPORT] = head.weight[:SUPPORT]
    hidden = 0.5 + hidden.abs()
    log_probs_NV = (hidden.double() @ weight.double().T).log_softmax(1)
    assert log_probs_NV[:, SUPPORT:].logsumexp(1).max() < -100
    plain, mine = both(choice, targets, hidden, replace(head, weight=weight), torch.float32)

    assert mine[0].sum.isfinite()
    torch.testing.assert_close(mine[0].sum, plain[0].sum)
    torch.testing.assert_close(mine[1], plain[1], rtol=1e-4, atol=1e-4)


def test_a_frozen_head_gets_no_gradient_and_a_frozen_body_none_either() -> None:
    choice = choose("sft+kl")
    hidden, head = random_head()
    targets, objective = random_targets(choice), objective_of(choice)
    hidden.requires_grad_()
    fused_loss(hidden, head, targets, objective).sum.backward()
    assert hidden.grad is not None
    assert head.weight.grad is None

    head.weight.requires_grad_()
    fused_loss(hidden.detach(), head, targets, objective).sum.backward()
    assert head.weight.grad is not None


def test_no_positions_give_a_zero_with_gradients() -> None:
    choice = choose("iw-sft")
    targets = fused.rows_of(random_targets(choice), slice(0, 0))
    hidden, head = random_head()
    result, gradients = run(
        lambda h, head: fused_loss(h[:0], head, targets, objective_of(choice)),
        hidden,
        head,
        torch.float64,
    )
    assert result.sum == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_bfloat16_sums_over_the_chunks_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, a bfloat16 sum of 1,380 gradients loses ten times what one of them does."""
    monkeypatch.setattr("qpipe.trainer.loss.head.CHUNK_VALUES", 1)
    choice = choose("sft")
    hidden, head = random_head()
    repeated = torch.arange(SIZE).repeat(60)
    hidden = hidden[repeated].bfloat16()  # the truth is of the same rounded states
    each = random_targets(choice)
    targets = SparseTargets(*(getattr(each, field.name)[repeated] for field in fields(each)))
    objective = objective_of(choice)
    truth = run(lambda h, head: objective(head.logits(h), targets), hidden, head, torch.float64)
    leaves = [hidden.requires_grad_(), head.weight.float().requires_grad_()]
    loss = fused_loss(leaves[0], Head(leaves[1]), to_dtype(targets, torch.float32), objective)
    (gradient,) = torch.autograd.grad(1.7 * loss.sum, leaves[1:])

    assert gradient.dtype == torch.float32
    error = (gradient - truth[1][1]).abs().max() / truth[1][1].abs().max()
    assert error < 0.005


def _granite(**config: Any) -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**_SHAPE, **config))


def _gemma(**config: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**_SHAPE, head_dim=8, **config))


def _cohere(**config: Any) -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**_SHAPE, **config))


_SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (lambda: _granite(logits_scaling=4.0), HeadForm(scale=0.25)),
        (lambda: _gemma(final_logit_softcapping=2.0), HeadForm(softcap=2.0)),
        (lambda: _gemma(final_logit_softcapping=None), HeadForm()),
        (lambda: _cohere(logit_scale=0.125), HeadForm(scale=0.125)),
    ],
    ids=["granite", "gemma", "gemma-uncapped", "cohere"],
)
def test_heads_are_recognised_by_what_they_compute(make: Callable[[], Any], form: HeadForm) -> None:
    torch.manual_seed(0)
    assert recognise(make()) == form


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (lambda: _gemma(final_logit_softcapping=30.0), HeadForm(softcap=30.0)),
        (lambda: _cohere(logit_scale=0.125), HeadForm(scale=0.125)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_small_logits_and_in_bfloat16_are_those_of_the_configuration(
    make: Callable[[], Any], form: HeadForm, dtype: torch.dtype
) -> None:
    """The logits of a new model are too small for a cap to change them: they are multiplied."""
    torch.manual_seed(0)
    model = make().to(dtype)
    assert recognise(model) == form
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    assert recognise(model) == form


def test_a_cap_that_the_model_does_not_apply_is_not_taken_where_logits_are_small() -> None:
    torch.manual_seed(0)
    model = _cohere(logit_scale=0.125)
    model.config.final_logit_softcapping = 30.0
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    assert recognise(model) == HeadForm(scale=0.125)


def test_a_head_that_does_something_else_is_not_recognised() -> None:
    model = _granite(logits_scaling=4.0)
    forward = model.forward

    def shifted(*arguments: Any, **inputs: Any) -> Any:
        output = forward(*arguments, **inputs)
        output.logits = output.logits.flip(-1)
        return output

    model.forward = shifted
    assert recognise(model) is None


def test_a_model_whose_head_is_not_recognised_trains_on_the_plain_path(
    model: Path, make_examples: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qpipe.trainer.data.batch import padded_batch
    from qpipe.trainer.models.files import find_model

    batch = padded_batch(make_examples(3))
    objective = Objective(choose("sft+kl"), "student", "base")
    student = load_student(find_model(str(model)), gradient_checkpointing=False)
    assert student.head_form == HeadForm()
    fused_sum, _ = student(batch, objective)
    student.head_form = None
    plain_sum, _ = student(batch, objective)
    torch.testing.assert_close(fused_sum, plain_sum)


def test_under_autocast_the_head_is_cast_once_to_its_type() -> None:
    """And the sums over the chunks stay in float32."""
    choice = choose("sft+kl")
    hidden, head = random_head()
    targets, objective = to_dtype(random_targets(choice), torch.float32), objective_of(choice)

    def loss(hidden: Tensor, head: Head) -> Loss:
        with torch.autocast("cpu", torch.bfloat16):
            return fused_loss(hidden, head, targets, objective)

    found = run(loss, hidden, head, torch.float32)
    rounded = hidden.bfloat16().float(), replace(head, weight=head.weight.bfloat16().float())
    plain = run(lambda h, head: fused_loss(h, head, targets, objective), *rounded, torch.float32)
    assert [gradient.dtype for gradient in found[1]] == [torch.float32] * 2
    # the logits are rounded to bfloat16, and their gradient as well
    torch.testing.assert_close(found[0].sum, plain[0].sum, rtol=2**-8, atol=0)
    for own, exact in zip(found[1], plain[1], strict=True):
        assert 0 < (own - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_gpu_takes_more_rows_at_once() -> None:
    devices = (torch.device("cpu"), torch.device("cuda"))
    on_cpu, on_gpu = (next(chunks(1000, VOCAB_SIZE, device)).stop for device in devices)
    assert on_gpu == 4 * on_cpu
