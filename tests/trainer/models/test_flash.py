"""The one call of flash attention for a pack, by a stand-in that computes it plainly on a CPU."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from qpipe.pipeline.format.records import TargetExample
from qpipe.pipeline.methods import choose
from qpipe.trainer.data.batch import packed_batch
from qpipe.trainer.data.segments import segments_of
from qpipe.trainer.loss.objective import Objective
from qpipe.trainer.models.attention import packed_attention
from qpipe.trainer.models.attention.packing import can_pack
from qpipe.trainer.models.compiling import compile_layers
from qpipe.trainer.models.student import Student
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ...support.runs import Examples
from .test_packed_attention import SHAPE

MODELS: dict[str, Callable[[], Any]] = {
    "full": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "window of 3": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=3)),
}


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    **_: Any,
) -> Tensor:
    """What flash attention computes: causal from the last key, with a window to the left."""
    left, right = window_size
    assert right == 0
    parts = []
    ends = zip(query_ends.tolist(), key_ends.tolist(), strict=True)
    first_query, first_key = next(ends)
    longest = [0, 0]
    for last_query, last_key in ends:
        q, k, v = query[first_query:last_query], key[first_key:last_key], value[first_key:last_key]
        longest = [max(longest[0], len(q)), max(longest[1], len(k))]
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        behind = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (behind >= 0) & ((behind <= left) | (left < 0))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v))
        first_query, first_key = last_query, last_key
    assert longest == [longest_query, longest_key]
    return torch.cat(parts)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """As if on a GPU in 16 bits; the tokens of every call."""
    counted: list[int] = []

    def counting(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        counted.append(len(query))
        return flash(query, *rest, **options)

    monkeypatch.setattr(packed_attention, "varlen_attn", counting)
    monkeypatch.setattr(packed_attention, "runs_in_flash", lambda *_: True)
    yield counted
    torch.compiler.reset()


def loss_and_gradients(student: Student, examples: list[TargetExample]) -> Any:
    student.zero_grad()
    total, _ = student(packed_batch(examples), Objective(choose("sft+kl"), "student", "base"))
    total.backward()
    return total.detach(), {name: p.grad.clone() for name, p in student.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_one_call_a_layer_gives_what_a_call_a_part_gives(
    name: str,
    examples: list[TargetExample],
    monkeypatch: pytest.MonkeyPatch,
    calls: list[int],
) -> None:
    torch.manual_seed(1)
    student = Student(MODELS[name]().double()).train()
    assert can_pack(student.model)
    calls.clear()
    found = loss_and_gradients(student, examples)
    tokens = packed_batch(examples).input_ids.shape[1]
    assert calls == [tokens] * 2  # once in each of the two layers
    monkeypatch.setattr(packed_attention, "runs_in_flash", lambda *_: False)
    torch.testing.assert_close(found, loss_and_gradients(student, examples))


@pytest.mark.parametrize(
    ("lengths", "queries", "keys", "ids"),
    [
        ((0, 3), [0, 3], [0, 3], None),
        ((0, 3, 1), [0, 3, 4], [0, 3, 4], None),
        ((2, 3, 1), [0, 2, 5, 6], [0, 2, 7, 10], [0, 1, 0, 1, 2, 3, 4, 0, 1, 5]),
        ((4,), [0, 4], [0, 4], [0, 1, 2, 3]),
    ],
)
def test_where_the_parts_end(lengths: Any, queries: Any, keys: Any, ids: Any) -> None:
    made = segments_of(lengths)
    assert made.query_ends.tolist() == queries
    assert made.key_ends.tolist() == keys
    assert (made.keys is None) == (ids is None)
    assert made.keys is None or made.keys.tolist() == ids
    assert made.longest_query == max(np.diff(queries))
    assert made.longest_key == max(np.diff(keys))


@pytest.mark.parametrize("in_flash", [True, False])
def test_compiled_layers_compile_once_for_packs_of_all_lengths(
    in_flash: bool, make_examples: Examples, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    monkeypatch.setattr(packed_attention, "runs_in_flash", lambda *_: in_flash)
    # the stand-in reads lengths on the host, where the real one is an operator of its own
    stand_in = torch.compiler.disable(packed_attention.varlen_attn)
    monkeypatch.setattr(packed_attention, "varlen_attn", stand_in)
    torch.manual_seed(1)
    student = Student(LlamaForCausalLM(LlamaConfig(**SHAPE))).train()
    assert can_pack(student.model)
    packs = [make_examples(count, seed=count) for count in (7, 3, 5, 9, 1)]
    plain = [loss_and_gradients(student, each) for each in packs]
    torch.compiler.reset()
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    with torch._dynamo.config.patch(disable=False):  # vLLM's engine, run before, leaves it so
        monkeypatch.setattr(
            torch.nn.Module,
            "compile",
            lambda self, **options: setattr(
                self,
                "_compiled_call_impl",
                torch.compile(self._call_impl, backend=backend, **options),
            ),
        )
        compile_layers(student.model)
        first = loss_and_gradients(student, packs[0])
        made = len(graphs)
        assert made > 0
        rest = [loss_and_gradients(student, each) for each in packs[1:]]
    assert len(graphs) <= made + 2  # once more where a length that was fixed turns out to vary
    torch.testing.assert_close([first, *rest], plain, rtol=1e-4, atol=1e-5)
