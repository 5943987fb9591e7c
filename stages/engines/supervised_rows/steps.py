"""Selects the supervised rows of an engine step and keeps their log-probabilities by request.

An engine step runs some tokens of several prompts; a long prompt takes several steps. The rows of a
prompt that an engine reads from its prefix cache never run, so that the answer has fewer rows than
were asked for, which the front end notices.

T tokens of a step, H the hidden size, n supervised rows of a step, c = 1 + k + w columns: the
observed token, the top k, the given ids.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .gather import Gathered
from .request import RowRequest

CHUNK_ROWS = 1024  # rows of logits at a time, which bounds memory
LogProbs = Callable[[Tensor, Tensor, Tensor, int], Gathered]


class Span(NamedTuple):
    """The tokens of one prompt that a step runs."""

    request: str
    offset: int  # of its first token among the tokens of the step
    start: int  # of its first token in the prompt
    tokens: int
    prompt: int  # tokens of the whole prompt

    @property
    def is_last(self) -> bool:
        return self.start + self.tokens >= self.prompt


class Columns(NamedTuple):
    """Rows as vLLM's `LogprobsTensors` holds them."""

    ids_nc: Tensor
    log_probs_nc: Tensor
    ranks_n: Tensor


@dataclass(slots=True)
class _Progress:
    request: RowRequest
    taken: int = 0  # rows before this one are computed or were skipped
    parts: list[Columns] = field(default_factory=list)

    def take(self, span: Span) -> slice:
        """The rows of the request in a span that earlier spans did not have."""
        bounds = np.searchsorted(self.request.rows, (span.start, span.start + span.tokens))
        first, end = (max(self.taken, int(bound)) for bound in bounds)
        self.taken = end
        return slice(first, end)


class SupervisedRows:
    """The requests in progress."""

    def __init__(self, log_probs: LogProbs) -> None:
        """`log_probs` takes hidden states [n, H], observed tokens, given ids and k."""
        self.log_probs = log_probs
        self.progress: dict[str, _Progress] = {}

    def add(self, name: str, request: RowRequest) -> None:
        self.progress[name] = _Progress(request)

    def remove(self, name: str) -> None:
        self.progress.pop(name, None)

    def step(self, hidden_TH: Tensor, spans: Iterable[Span]) -> dict[str, Columns]:
        """Compute the rows of a step; returns those of the prompts that end with it."""
        spans = [span for span in spans if span.request in self.progress]
        taken = [self.progress[span.request].take(span) for span in spans]
        if any(rows.start < rows.stop for rows in taken):
            self._compute(hidden_TH, spans, taken)
        ended = [span.request for span in spans if span.is_last]
        return {name: _joined(self.progress.pop(name).parts, hidden_TH) for name in ended}

    def _compute(self, hidden_TH: Tensor, spans: list[Span], taken: list[slice]) -> None:
        requests = [self.progress[span.request].request for span in spans]
        (top_k,) = {request.top_k for request in requests}  # an engine scores with one at a time
        counts = [rows.stop - rows.start for rows in taken]
        width = max(request.given.shape[1] for request in requests)
        asked_nc = np.full((sum(counts), 2 + width), -1, np.int64)
        at = 0
        for span, rows, request in zip(spans, taken, requests, strict=True):
            some_c = asked_nc[at : at + rows.stop - rows.start]
            some_c[:, 0] = request.rows[rows] - span.start + span.offset
            some_c[:, 1] = request.observed[rows]
            some_c[:, 2 : 2 + request.given.shape[1]] = request.given[rows]
            at += len(some_c)
        columns = self._columns(hidden_TH, _on_device(asked_nc, hidden_TH), top_k)
        by_span = zip(*(tensor.split(counts) for tensor in columns), strict=True)
        for span, request, (ids, log_probs, ranks) in zip(spans, requests, by_span, strict=True):
            own = 1 + top_k + request.given.shape[1]
            part = Columns(ids[:, :own], log_probs[:, :own], ranks)
            self.progress[span.request].parts.append(part)

    def _columns(self, hidden_TH: Tensor, asked_nc: Tensor, top_k: int) -> Columns:
        parts = []
        for some_c in asked_nc.split(CHUNK_ROWS):
            # kernels read whole tensors, not columns
            place_n, observed_n = some_c[:, :2].T.contiguous()
            given_nw = some_c[:, 2:].contiguous()
            found = self.log_probs(hidden_TH[place_n], observed_n, given_nw, top_k)
            ids_nc = torch.cat((observed_n[:, None], found.ids_nk, given_nw), dim=1)
            log_probs_nc = torch.cat(
                (found.observed_n[:, None], found.top_nk, found.given_nw), dim=1
            )
            parts.append(Columns(ids_nc.int(), log_probs_nc.float(), found.ranks_n))
        return _joined(parts, hidden_TH)


def _joined(parts: list[Columns], like: Tensor) -> Columns:
    """Parts one after another; none is no rows."""
    if not parts:
        nothing = torch.empty((0, 1), device=like.device)
        return Columns(nothing.int(), nothing, nothing[:, 0].long())
    if len(parts) == 1:
        return parts[0]
    return Columns(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _on_device(array: np.ndarray, like: Tensor) -> Tensor:
    tensor = torch.from_numpy(array)
    if like.device.type != "cuda":
        return tensor.to(like.device)
    return tensor.pin_memory().to(like.device, non_blocking=True)  # the step goes on meanwhile
