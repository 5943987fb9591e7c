"""Scoring with transformers: padded batches of like length, the head at supervised positions only.

Where the model's forward takes `logits_to_keep`, the output head runs on the union of the batch's
supervised columns; log-softmax and top k run on the supervised rows in chunks.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...pipeline.errors import UserError
from ...pipeline.records import Example, ScoredExample
from ...trainer.models import ModelFiles, load_model, logits_at
from .base import GivenIds, ScorerSettings, scored, with_given

_BATCH_TOKENS = 4096  # padded tokens of a forward pass
_CHUNK_VALUES = 2**26  # logits in float32 at once: 256 MiB


class TransformersScorer:
    """Any causal language model of transformers, on the first GPU or on the CPU."""

    def __init__(self, model: ModelFiles, settings: ScorerSettings) -> None:
        self.vocab_size = model.vocab_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(model, getattr(torch, settings.dtype)).to(self.device).eval()

    def score(
        self, examples: Sequence[Example], top_k: int, at: Sequence[GivenIds] | None = None
    ) -> Iterator[tuple[int, ScoredExample]]:
        """Each example's place in `examples` and its scores, longest first."""
        places = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
        while places:
            rows = max(1, _BATCH_TOKENS // len(examples[places[0]].input_ids))
            batch, places = places[:rows], places[rows:]
            given = [None if at is None else at[place] for place in batch]
            try:
                scores = self._score_batch([examples[place] for place in batch], given, top_k)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    "the device is out of memory: finished shards are kept: run again with "
                    "--dtype bfloat16 or a smaller --max-length and another --out"
                ) from error
            yield from zip(batch, scores, strict=True)

    @torch.inference_mode()
    def _score_batch(
        self, batch: Sequence[Example], given: Sequence[GivenIds | None], top_k: int
    ) -> list[ScoredExample]:
        columns = np.unique(np.concatenate([example.positions for example in batch])) - 1
        logits_BCV = self._logits(batch, torch.from_numpy(columns).to(self.device))
        return [
            self._score_row(
                example, ids, logits_CV[np.searchsorted(columns, example.positions - 1)], top_k
            )
            for example, ids, logits_CV in zip(batch, given, logits_BCV, strict=True)
        ]

    def _logits(self, batch: Sequence[Example], columns: Tensor) -> Tensor:
        """Logits [B, C, V] of a right-padded batch at the given columns."""
        longest = max(len(example.input_ids) for example in batch)
        input_ids_BT = np.zeros((len(batch), longest), np.int64)
        mask_BT = np.zeros((len(batch), longest), np.int64)
        for row, example in enumerate(batch):
            input_ids_BT[row, : len(example.input_ids)] = example.input_ids
            mask_BT[row, : len(example.input_ids)] = 1
        inputs = {
            "input_ids": torch.from_numpy(input_ids_BT).to(self.device),
            "attention_mask": torch.from_numpy(mask_BT).to(self.device),
        }
        return logits_at(self.model, columns, **inputs)

    def _score_row(
        self, example: Example, given: GivenIds | None, logits_NV: Tensor, top_k: int
    ) -> ScoredExample:
        N = len(logits_NV)
        observed_N = torch.from_numpy(example.observed_ids.astype(np.int64)).to(self.device)
        given_Nw = np.empty((N, 0), np.int64) if given is None else given.padded()
        rows = max(1, _CHUNK_VALUES // self.vocab_size)
        chunks = zip(
            logits_NV.split(rows),
            observed_N.split(rows),
            torch.from_numpy(given_Nw).to(self.device).split(rows),
            strict=True,
        )
        parts = [_log_probs(*chunk, top_k) for chunk in chunks]
        log_probs, ranks, ids, top, at = (
            torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)
        )
        result = scored(example, log_probs, ranks, ids, top, self.vocab_size)
        if given is None:
            return result
        return with_given(result, given, at[given_Nw >= 0], self.vocab_size)


def _log_probs(
    logits_nV: Tensor, observed_n: Tensor, given_nw: Tensor, top_k: int
) -> tuple[Tensor, ...]:
    """Log-probability and rank of the observed token [n]; top-k ids and log-probabilities [n, k];
    log-probabilities at the given ids [n, w], without a meaning where those are -1."""
    logits_nV = logits_nV.float()
    observed_n1 = logits_nV.gather(1, observed_n[:, None])
    log_norm_n1 = logits_nV.logsumexp(dim=1, keepdim=True)
    top = logits_nV.topk(top_k, dim=1)
    ranks_n = (logits_nV >= observed_n1).sum(dim=1)
    return (
        (observed_n1 - log_norm_n1)[:, 0],
        ranks_n,
        top.indices,
        top.values - log_norm_n1,
        logits_nV.gather(1, given_nw.clamp_min(0)) - log_norm_n1,
    )
