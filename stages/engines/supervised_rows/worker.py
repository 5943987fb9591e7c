"""Puts `SupervisedRows` into the model runners of vLLM's workers.

vLLM's first runner (V1) has a method for prompt log-probabilities, its second (V2) a worker object.
Each is replaced by one that takes the requests with rows and passes all others to vLLM's own. A
runner of another form, or one whose rows differ from a plain computation, is left alone, and the
reason is returned.
"""

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ....pipeline.progress import say_once
from .cpu_layers import fuse_layers
from .gather import Gathered, gathered_log_probs, triton_log_probs
from .request import unpacked
from .shards import shard_log_probs, whole_log_probs
from .steps import LogProbs, Span, SupervisedRows
from .summary import has_kernels

_V1 = ("hidden_states", "num_scheduled_tokens")
_V2 = (
    "logits_fn",
    "hidden_states",
    "input_batch",
    "all_token_ids",
    "num_computed_tokens",
    "prompt_lens",
)
_PROBE_ROWS, _PROBE_TOLERANCE = 4, 1e-2  # nats; of bfloat16 logits that are summed in parts


class RowsExtension:
    """Methods that vLLM adds to its worker class (`worker_extension_cls`)."""

    model_runner: Any

    @torch.inference_mode()
    def qpipe_install_rows(self, top_k: int) -> str | None:
        """Install `SupervisedRows`, tried out with this top k; returns why not, or None."""
        runner = self.model_runner
        try:
            if hasattr(runner, "prompt_logprobs_worker"):
                return _install_v2(runner, top_k)
            return _install_v1(runner, top_k)
        except Exception as error:  # vLLM's internals may raise anything: its own path still works
            return f"{type(error).__name__}: {error}"

    @torch.inference_mode()
    def qpipe_fuse_layers(self) -> int:
        """On a CPU, let norms and activations use their kernels; returns the number of layers."""
        runner = self.model_runner
        if runner.device.type != "cpu":
            return 0
        return fuse_layers(runner.model, runner.model_config.dtype)


def knows_v1(runner_class: Any) -> bool:
    """Whether a class of the first model runner has the form that is replaced."""
    method = getattr(runner_class, "_get_prompt_logprobs_dict", None)
    return method is not None and tuple(signature(method).parameters)[-2:] == _V1


def knows_v2(worker_class: Any) -> bool:
    """Whether a class of the second runner's worker has the form that is replaced."""
    forms = {
        "add_request": ("req_id", "req_idx", "sampling_params"),
        "remove_request": ("req_id",),
        "compute_prompt_logprobs": _V2,
    }
    return all(
        tuple(signature(getattr(worker_class, name, print)).parameters)[1:] == names
        for name, names in forms.items()
    )


def _install_v1(runner: Any, top_k: int) -> str | None:
    if not knows_v1(type(runner)):
        return "the model runner has another form"
    log_probs = _checked_log_probs(runner, gathered_log_probs, top_k)
    runner._get_prompt_logprobs_dict = _V1Rows(runner, SupervisedRows(log_probs))
    return None


def _install_v2(runner: Any, top_k: int) -> str | None:
    stock = runner.prompt_logprobs_worker
    if stock is None:  # this process has no output head
        return None
    if not knows_v2(type(stock)) or not hasattr(stock, "uses_prompt_logprobs"):
        return "the second model runner has another form"
    log_probs = _checked_log_probs(runner, triton_log_probs, top_k)
    runner.prompt_logprobs_worker = _V2Rows(stock, SupervisedRows(log_probs))
    return None


class _V1Rows:
    """In place of `GPUModelRunner._get_prompt_logprobs_dict`."""

    def __init__(self, runner: Any, rows: SupervisedRows) -> None:
        self.runner, self.rows = runner, rows
        self.stock = runner._get_prompt_logprobs_dict

    def __call__(
        self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        from vllm.v1.outputs import LogprobsTensors

        waiting, requests = self.runner.num_prompt_logprobs, self.runner.requests
        for name in list(waiting):
            request = unpacked(requests[name].sampling_params)
            if request is not None:
                del waiting[name]  # which hides it from vLLM's own method
                self.rows.add(name, request)
        for name in self.rows.progress.keys() - requests.keys():
            self.rows.remove(name)
        found = self.rows.step(hidden_states, self._spans(num_scheduled_tokens))
        return self.stock(hidden_states, num_scheduled_tokens) | {
            name: LogprobsTensors(ids.cpu(), log_probs.cpu(), ranks.cpu())
            for name, (ids, log_probs, ranks) in found.items()
        }

    def _spans(self, num_scheduled_tokens: dict[str, int]) -> Iterator[Span]:
        for name in self.rows.progress:
            tokens = num_scheduled_tokens.get(name)
            if tokens is None:  # preempted
                continue
            request = self.runner.requests[name]
            place = self.runner.input_batch.req_id_to_index[name]
            offset = int(self.runner.query_start_loc.np[place])
            start, prompt = request.num_computed_tokens, len(request.prompt_token_ids)
            yield Span(name, offset, start, tokens, prompt)


class _V2Rows:
    """In place of `PromptLogprobsWorker`."""

    def __init__(self, stock: Any, rows: SupervisedRows) -> None:
        self.stock, self.rows = stock, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        self.stock.add_request(req_id, req_idx, sampling_params)
        request = unpacked(sampling_params)
        if request is not None:
            self.stock.uses_prompt_logprobs[req_idx] = False
            self.rows.add(req_id, request)

    def remove_request(self, req_id: str) -> None:
        self.stock.remove_request(req_id)
        self.rows.remove(req_id)

    def compute_prompt_logprobs(
        self,
        logits_fn: Callable[[Tensor], Tensor],
        hidden_states: Tensor,
        input_batch: Any,
        all_token_ids: Tensor,
        num_computed_tokens: Tensor,
        prompt_lens: Any,
    ) -> dict[str, Any]:
        from vllm.v1.outputs import LogprobsTensors

        own = self.stock.compute_prompt_logprobs(
            logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
        )
        found = self.rows.step(hidden_states, _v2_spans(input_batch, prompt_lens))
        return own | {name: LogprobsTensors(*columns) for name, columns in found.items()}


def _v2_spans(batch: Any, prompt_lens: Any) -> Iterator[Span]:
    for place, name in enumerate(batch.req_ids):
        yield Span(
            name,
            offset=int(batch.query_start_loc_np[place]),
            start=int(batch.num_computed_prefill_tokens_np[place]),
            tokens=int(batch.num_scheduled_tokens[place]),
            prompt=int(prompt_lens[batch.idx_mapping_np[place]]),
        )


def _checked_log_probs(runner: Any, plain: Callable[..., Gathered], top_k: int) -> LogProbs:
    """From hidden states to log-probabilities, compared with a plain computation once.

    With tensor parallelism the vocabulary stays divided, unless the model's logits do not allow it.
    `plain` takes whole rows of logits where the kernels cannot.
    """

    def whole(hidden_nH: Tensor, observed_n: Tensor, given_nw: Tensor, top_k: int) -> Gathered:
        logits_nV = runner.model.compute_logits(hidden_nH)
        of_logits = whole_log_probs if has_kernels(logits_nV, top_k) else plain
        return of_logits(logits_nV, observed_n, given_nw, top_k)

    def without_kernels(hidden_nH: Tensor, *asked: Any) -> Gathered:
        return plain(runner.model.compute_logits(hidden_nH), *asked)

    config = runner.model_config
    hidden_nH = torch.randn((_PROBE_ROWS, config.get_hidden_size()), dtype=config.dtype)
    hidden_nH = hidden_nH.to(runner.device)
    expected = runner.model.compute_logits(hidden_nH).float().log_softmax(dim=1)
    reasons: list[str] = []
    for log_probs in (divided_log_probs(runner.model), whole, without_kernels):
        reason = None if log_probs is None else _why_not(log_probs, hidden_nH, expected, top_k)
        if log_probs is not None and reason is None:
            for each in reasons:
                say_once(f"log-probabilities of supervised rows are computed another way: {each}")
            return log_probs
        reasons += filter(None, [reason])
    raise ValueError("; ".join(reasons))


def _why_not(log_probs: LogProbs, hidden_nH: Tensor, expected_nV: Tensor, top_k: int) -> str | None:
    try:
        if _agree(log_probs, hidden_nH, expected_nV, top_k):
            return None
    except Exception as error:  # of a compiler or a driver, for example
        return f"{type(error).__name__}: {error}"
    return "the log-probabilities of a trial differ from a plain computation"


def _agree(log_probs: LogProbs, hidden_nH: Tensor, expected_nV: Tensor, top_k: int) -> bool:
    """Whether some rows have the expected log-probabilities and ranks, and each id its own."""
    n, V = expected_nV.shape
    observed_n = torch.linspace(0, V - 1, n, device=hidden_nH.device).long()
    found = log_probs(hidden_nH, observed_n, observed_n[:, None], min(top_k, V))
    ids_nc = torch.cat((observed_n[:, None], observed_n[:, None], found.ids_nk.long()), dim=1)
    values_nc = torch.cat((found.observed_n[:, None], found.given_nw, found.top_nk), dim=1)
    at_nc = expected_nV.gather(1, ids_nc)
    top_nk = expected_nV.topk(found.top_nk.shape[1], dim=1).values
    close = [
        (error.abs() <= _PROBE_TOLERANCE).all()
        for error in (at_nc - values_nc, top_nk - found.top_nk)
    ]
    least_n = (expected_nV > at_nc[:, :1] + _PROBE_TOLERANCE).sum(dim=1)
    most_n = (expected_nV >= at_nc[:, :1] - _PROBE_TOLERANCE).sum(dim=1)
    close.append(((least_n <= found.ranks_n) & (found.ranks_n <= most_n)).all())
    return all(map(bool, close))


def divided_log_probs(model: Any) -> LogProbs | None:
    """Log-probabilities from a vocabulary that stays divided; None without tensor parallelism."""
    from vllm.distributed import get_tp_group
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    group = get_tp_group()
    heads = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    if group.world_size == 1 or len(heads) != 1:
        return None
    (head,) = heads

    def all_gather(tensor_nc: Tensor) -> Tensor:
        whole = group.all_gather(tensor_nc.contiguous(), dim=1)
        return whole.unflatten(1, (group.world_size, -1))

    def log_probs(hidden_nH: Tensor, observed_n: Tensor, given_nw: Tensor, top_k: int) -> Gathered:
        head._gather_logits = lambda logits: logits
        try:
            logits_nW = model.compute_logits(hidden_nH)
        finally:
            del head._gather_logits
        first_id = group.rank_in_group * logits_nW.shape[1]
        own = max(0, min(logits_nW.shape[1], head.org_vocab_size - first_id))
        return shard_log_probs(
            logits_nW[:, :own], first_id, observed_n, given_nw, top_k, all_gather
        )

    return log_probs
