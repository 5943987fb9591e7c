"""Runs a model of transformers on padded batches, and its head at the supervised positions only.

Examples with an equal beginning go on after it. The batches of a call depend on its examples alone.
The last bits of float32 sums depend on the shape of a batch, so that the bytes of a shard depend
neither on the number of processes nor on earlier runs, and the batch size is not an option.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....pipeline.errors import UserError
from ....pipeline.format.records import ScoredExample, WeightedExample
from ....pipeline.progress import say_once
from ....trainer.models.files import ModelFiles, load_scoring_model
from ....trainer.models.heads import logit_chunks, recognise
from ..base import GivenIds, scored, with_given
from ..settings import EngineSettings
from ..supervised_rows.shards import whole_log_probs
from ..supervised_rows.summary import summarised_in_torch
from .batches import Group, batches, groups
from .beginnings import Beginning, beginning_of, keeps_beginnings
from .linear_layers import use_onednn


class TransformersScorer:
    """Any causal language model of transformers, on the first GPU or on the CPU."""

    def __init__(self, model: ModelFiles, settings: EngineSettings) -> None:
        self.vocab_size = model.vocab_size
        self.model = load_scoring_model(model, getattr(torch, settings.dtype))
        self.device = self.model.device
        use_onednn(self.model)
        self.head_form = recognise(self.model)
        self.may_share = settings.reads_prefixes

    @cached_property
    def reads_beginnings(self) -> bool:
        """Whether examples go on after a beginning that they share."""
        able = self.may_share and self.head_form is not None
        return able and keeps_beginnings(self.model)

    def score(
        self, examples: Sequence[WeightedExample], top_k: int, at: Sequence[GivenIds] | None = None
    ) -> Iterator[tuple[int, ScoredExample]]:
        """Yield each example's index in `examples` and its scores, longest first in a group."""
        for group in (
            groups(examples) if self.reads_beginnings else [Group(list(range(len(examples))))]
        ):
            beginning = self._beginning(examples, group)
            lengths = [len(examples[place].input_ids) - group.shared for place in group.places]
            for batch in batches(lengths, group.shared):
                places = [group.places[index] for index in batch]
                yield from self._score_places(examples, at, places, top_k, beginning)

    @torch.inference_mode()
    def _beginning(self, examples: Sequence[WeightedExample], group: Group) -> Beginning | None:
        if not group.shared:
            return None
        shared = examples[group.places[0]].input_ids[: group.shared]
        return beginning_of(self.model, self._tensor(shared))

    def _score_places(
        self,
        examples: Sequence[WeightedExample],
        at: Sequence[GivenIds] | None,
        places: list[int],
        top_k: int,
        beginning: Beginning | None,
    ) -> Iterator[tuple[int, ScoredExample]]:
        """The scores of one batch, or of its halves if memory is too small for the whole."""
        given = None if at is None else [at[place] for place in places]
        try:
            batch = [examples[place] for place in places]
            scores = self.score_batch(batch, given, top_k, beginning)
        except torch.OutOfMemoryError as error:
            if len(places) == 1:
                raise UserError(
                    f"the device is out of memory at {len(examples[places[0]].input_ids)} tokens: "
                    "finished shards are kept: run again with --dtype bfloat16 or a smaller "
                    "--max-length and another --out"
                ) from error
            scores = None
        if scores is not None:
            yield from zip(places, scores, strict=True)
            return
        say_once(
            "the device is out of memory: batches that do not fit are halved, which may change the "
            "last bits"
        )
        torch.cuda.empty_cache()
        half = len(places) // 2
        yield from self._score_places(examples, at, places[:half], top_k, beginning)
        yield from self._score_places(examples, at, places[half:], top_k, beginning)

    @torch.inference_mode()
    def score_batch(
        self,
        batch: Sequence[WeightedExample],
        given: Sequence[GivenIds] | None,
        top_k: int,
        beginning: Beginning | None = None,
    ) -> list[ScoredExample]:
        """Score the examples of a batch in one forward pass, in their order.

        All of them have the beginning.
        """
        shared = 0 if beginning is None else beginning.tokens
        counts = [len(example.positions) for example in batch]
        rows_N = np.repeat(np.arange(len(batch)), counts)
        columns_N = np.concatenate([example.positions for example in batch]) - 1 - shared
        observed_N = np.concatenate([example.observed_ids for example in batch])
        given_Nw = _padded(given, sum(counts))
        results: list[tuple[Tensor, ...]] = []
        inputs = self._inputs(batch, shared)
        if beginning is not None:
            inputs |= beginning.inputs(len(batch))
        places = inputs, self._tensor(rows_N), self._tensor(columns_N)
        for rows, logits_nV in logit_chunks(self.model, self.head_form, *places):
            asked = self._tensor(observed_N[rows]), self._tensor(given_Nw[rows])
            # without kernels, which need a compiler, and closer to float64 than torch's log-softmax
            results.append(whole_log_probs(logits_nV, *asked, top_k, summarised_in_torch))
        arrays = [torch.cat(column).cpu().numpy() for column in zip(*results, strict=True)]
        ends = np.cumsum(counts)[:-1]
        by_example = zip(*(np.split(array, ends) for array in (*arrays, given_Nw)), strict=True)
        scores = []
        for row, (log_probs, ranks, ids, top, at_Nw, ids_Nw) in enumerate(by_example):
            result = scored(batch[row], log_probs, ranks, ids, top, self.vocab_size)
            if given is not None:
                result = with_given(result, given[row], at_Nw[ids_Nw >= 0], self.vocab_size)
            scores.append(result)
        return scores

    def _inputs(self, batch: Sequence[WeightedExample], shared: int) -> dict[str, Any]:
        """A right-padded batch, without the tokens of the beginning.

        It has no mask: a token of a causal model does not see the padding after it, and attention
        without a mask is faster.
        """
        longest = max(len(example.input_ids) for example in batch)
        input_ids_BT = np.zeros((len(batch), longest), np.int64)
        for row, example in enumerate(batch):
            input_ids_BT[row, : len(example.input_ids)] = example.input_ids
        return {"input_ids": self._tensor(input_ids_BT[:, shared:])}

    def _tensor(self, values: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64, copy=False)).to(self.device)


def _padded(given: Sequence[GivenIds] | None, positions: int) -> NDArray[np.int64]:
    """The given ids of a batch, [N, w], padded with -1."""
    if given is None:
        return np.empty((positions, 0), np.int64)
    counts = np.concatenate([each.counts for each in given])
    return GivenIds(counts, np.concatenate([each.ids for each in given])).padded()
