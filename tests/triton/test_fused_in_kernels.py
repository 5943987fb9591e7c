"""The fused loss of every method by the kernels, against the plain path in float64."""

from dataclasses import replace
from functools import partial
from itertools import cycle

import pytest
import torch
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.methods.table import choose
from qpipe.tests.support.dispatched import Dispatched
from qpipe.tests.support.losses import (
    CHOICES,
    HEADS,
    IDS,
    SIZE,
    VOCAB_SIZE,
    objective_of,
    random_head,
    random_targets,
    run,
    to_dtype,
)
from qpipe.trainer.loss import chunk_in_kernels, fused, kernels
from qpipe.trainer.loss.fused import fused_loss
from qpipe.trainer.loss.head import Head, even_chunks
from torch import Tensor


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of four rows, blocks of 32 logits; the rows of every call of the loss' kernel."""
    monkeypatch.setattr("qpipe.trainer.loss.head.TILE", 4)
    monkeypatch.setattr("qpipe.trainer.loss.head.CHUNK_VALUES", 7 * VOCAB_SIZE // 14)
    monkeypatch.setattr(
        "qpipe.trainer.loss.kernels.summarise", partial(kernels.summarise, block=32)
    )
    counted: list[int] = []
    compute = partial(kernels.loss_and_gradient_, block=32)

    def counting(scores: Tensor, *rest: object, **options: object) -> Tensor:
        counted.append(len(scores))
        return compute(scores, *rest, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("qpipe.trainer.loss.kernels.loss_and_gradient_", counting)
    return counted


@pytest.mark.parametrize(
    ("choice", "form"), list(zip(CHOICES, cycle(HEADS), strict=False)), ids=IDS
)
def test_value_and_gradients_are_those_of_the_plain_path(
    choice: Choice, form: str, calls: list[int]
) -> None:
    hidden, head = random_head(**HEADS[form])
    targets, objective = random_targets(choice), objective_of(choice)
    truth = run(lambda h, head: objective(head.logits(h), targets), hidden, head, torch.float64)
    rounded = to_dtype(targets, torch.float32)
    mine = run(lambda h, head: fused_loss(h, head, rounded, objective), hidden, head, torch.float32)

    of_whole = choice.method.name in ("deft", "ranktuner") and choice.form == "live"
    in_torch = choice.residual == "gem" or of_whole
    assert calls == ([] if in_torch else [4, 4, 4, 4, 4, 3])
    torch.testing.assert_close(mine[0].sum.double(), truth[0].sum, rtol=3e-6, atol=3e-6)
    for own, exact in zip(mine[1], truth[1], strict=True):
        assert float((own.double() - exact).abs().max() / exact.abs().max()) < 2e-5
    if truth[0].error_bounds is None:
        assert mine[0].error_bounds is None
    else:
        torch.testing.assert_close(
            mine[0].error_bounds, truth[0].error_bounds, rtol=1e-4, atol=1e-5, check_dtype=False
        )


def test_no_positions_give_a_zero_with_gradients() -> None:
    choice = choose("sft+kl")
    targets = to_dtype(fused.rows_of(random_targets(choice), slice(0, 0)), torch.float32)
    hidden, head = random_head()
    result, gradients = run(
        lambda h, head: fused_loss(h[:0], head, targets, objective_of(choice)),
        hidden,
        head,
        torch.float32,
    )
    assert result.sum == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("name", ["sft+kl", "target-sft"])
def test_bfloat16_is_as_near_as_the_passes_of_torch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose(name, "live")
    objective, targets = objective_of(choice), random_targets(choice)
    hidden, head = random_head()
    hidden, head = hidden.bfloat16().double(), replace(head, weight=head.weight.bfloat16().double())
    truth = run(lambda h, head: objective(head.logits(h), targets), hidden, head, torch.float64)
    rounded = to_dtype(targets, torch.float32)

    def errors() -> list[float]:
        result = run(
            lambda h, head: fused_loss(h, head, rounded, objective), hidden, head, torch.bfloat16
        )
        pairs = zip([result[0].sum, *result[1]], [truth[0].sum, *truth[1]], strict=True)
        return [float((got - exact).abs().max() / exact.abs().max()) for got, exact in pairs]

    mine = errors()
    monkeypatch.setattr("qpipe.trainer.loss.kernels.DEVICES", ())
    assert not chunk_in_kernels.has_kernels(torch.device("cpu"), torch.bfloat16, None)
    # the interpreter truncates to bfloat16, where a GPU rounds
    assert all(own <= 1.5 * other + 2**-7 for own, other in zip(mine, errors(), strict=True))


@pytest.mark.parametrize(("rows", "sizes"), [(0, [0]), (3, [3]), (23, [4, 4, 4, 4, 4, 3])])
def test_chunks_are_even_and_of_whole_tiles(rows: int, sizes: list[int]) -> None:
    assert [part.stop - part.start for part in even_chunks(rows, VOCAB_SIZE, 1)] == sizes
    assert SIZE == 23


def test_chunks_of_a_wide_head_are_larger() -> None:
    """In the sizes of a GPU, where they are half as large as the head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qpipe.trainer.loss.head.TILE", 128)
        patch.setattr("qpipe.trainer.loss.head.CHUNK_VALUES", 2**24)
        assert next(even_chunks(8192, 151_936, 896)).stop == 1408
        assert next(even_chunks(8192, 151_936, 4096)).stop == 2048


def test_launches_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores, the kernel, the two products; on a CPU one more adds to the head's gradient."""
    choice = choose("sft+kl")
    objective, targets = objective_of(choice), to_dtype(random_targets(choice), torch.float32)
    hidden, head = random_head()
    hidden, head = hidden.bfloat16().requires_grad_(), Head(head.weight.bfloat16().requires_grad_())

    def stand_in(scores: Tensor, *_: object, **__: object) -> Tensor:
        return scores.new_empty(len(scores), dtype=torch.float32)  # the interpreter runs torch

    monkeypatch.setattr("qpipe.trainer.loss.kernels.loss_and_gradient_", stand_in)
    launches = []
    for rows in (4, 8, 12):
        given = fused.rows_of(targets, slice(0, rows))
        with Dispatched() as step:
            fused_loss(hidden[:rows], head, given, objective)
        launches.append(len(step.kernels))
        # no float32 copy of logits, which have their own width in memory
        assert {shape[-1:] for shape in step.tensors(torch.float32, 1)}.isdisjoint(
            {(VOCAB_SIZE,), (64,)}
        )
    one_more, another = launches[1] - launches[0], launches[2] - launches[1]
    assert one_more == another == 4  # and the kernel
