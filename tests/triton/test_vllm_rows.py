"""vLLM's second model runner against dense float64, in Triton's interpreter: its kernels, and its
worker of prompt log-probabilities with the computation of supervised rows in it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import vllm.triton_utils

# vLLM has stand-ins for both where it finds no GPU; its kernels must see the real ones
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl

from qpipe.stages.engines.supervised_rows import worker as rows_worker  # noqa: E402
from qpipe.stages.engines.supervised_rows.gather import triton_log_probs  # noqa: E402
from qpipe.stages.engines.supervised_rows.request import RowRequest  # noqa: E402
from torch import Tensor  # noqa: E402


@pytest.mark.parametrize(("vocab_size", "top_k", "given"), [(50, 1, 1), (1003, 8, 0), (3000, 7, 5)])
def test_rows_are_those_of_dense_log_probs(vocab_size: int, top_k: int, given: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 5
    logits = 3 * torch.randn(rows, vocab_size, generator=generator)
    observed = torch.randint(0, vocab_size, (rows,), generator=generator)
    observed[0] = logits[0].argmax()
    ids = torch.randint(0, vocab_size, (rows, given), generator=generator)
    found = triton_log_probs(logits, observed, ids, top_k)

    log_probs = logits.double().log_softmax(1)
    own = log_probs.gather(1, observed[:, None])
    torch.testing.assert_close(found.observed_n.double(), own[:, 0], rtol=1e-6, atol=2e-6)
    assert found.ranks_n.tolist() == (log_probs >= own).sum(1).tolist()
    top = log_probs.topk(top_k, dim=1)
    assert found.ids_nk.tolist() == top.indices.tolist()
    torch.testing.assert_close(found.top_nk.double(), top.values, rtol=1e-6, atol=2e-6)
    at = log_probs.gather(1, ids)
    torch.testing.assert_close(found.given_nw.double(), at, rtol=1e-6, atol=2e-6)


V, H, K = 60, 5, 3
HEAD_HV = torch.randn(H, V, generator=torch.Generator().manual_seed(1))
LENGTH = 7  # of each of two prompts: the steps compute 3 and then 4 tokens of both
IDS = torch.randint(0, V, (3, LENGTH + 1), generator=torch.Generator().manual_seed(2))
ROWS = [0, 2, 3, 5]


def step(start: int, tokens: int) -> Any:
    """As much of a step's batch as the worker reads: places 2 and 1 of the requests."""
    bounds = np.array([0, tokens, 2 * tokens], np.int32)
    places = np.array([2, 1])
    return SimpleNamespace(
        req_ids=["vllm", "own"],
        idx_mapping_np=places,
        idx_mapping=torch.from_numpy(places).int(),
        num_computed_prefill_tokens_np=np.array([start, start]),
        num_scheduled_tokens=np.array([tokens, tokens]),
        num_tokens=2 * tokens,
        query_start_loc_np=bounds,
        query_start_loc=torch.from_numpy(bounds),
        prefill_len_np=np.array([LENGTH, LENGTH]),
    )


def test_the_second_runners_worker_with_rows_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request by vLLM's own way beside one with supervised rows, over two steps."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    monkeypatch.setattr(rows_worker, "divided_log_probs", lambda model: None)
    extension = rows_worker.RowsExtension()
    extension.model_runner = runner = SimpleNamespace(
        device=torch.device("cpu"),
        model_config=SimpleNamespace(get_hidden_size=lambda: H, dtype=torch.float32),
        model=SimpleNamespace(compute_logits=lambda hidden: hidden @ HEAD_HV),
        prompt_logprobs_worker=PromptLogprobsWorker(3, torch.device("cpu")),
    )
    assert extension.qpipe_install_rows(K) is None
    worker: Any = runner.prompt_logprobs_worker
    given = np.array([[7, 59]] * len(ROWS), np.int32)
    asked = RowRequest(np.array(ROWS, np.int32), IDS[1, 1:][ROWS].numpy(), given, K)
    for name, place, extra in (("vllm", 2, None), ("own", 1, asked.packed())):
        sampling = SimpleNamespace(
            prompt_logprobs=K, prompt_logprob_token_ids=None, extra_args=extra
        )
        worker.add_request(name, place, sampling)
    hidden = {"vllm": torch.randn(LENGTH, H), "own": torch.randn(LENGTH, H)}
    found: dict[str, Any] = {}
    for start, tokens in ((0, 3), (3, 4)):
        assert not found
        states = torch.cat([each[start : start + tokens] for each in hidden.values()])
        computed = torch.full((3,), start, dtype=torch.int32)
        found = worker.compute_prompt_logprobs(
            runner.model.compute_logits,
            states,
            step(start, tokens),
            IDS.int(),
            computed,
            np.full(3, LENGTH),
        )
    check(found["vllm"], hidden["vllm"], IDS[2], list(range(LENGTH - 1)))
    check(found["own"], hidden["own"], IDS[1], ROWS)
    dense = (hidden["own"] @ HEAD_HV).double().log_softmax(1)[ROWS]
    torch.testing.assert_close(
        found["own"].logprobs[:, 1 + K :].double(), dense[:, [7, 59]], rtol=1e-5, atol=2e-6
    )


def check(found: Any, hidden_TH: Tensor, ids_T: Tensor, rows: list[int]) -> None:
    """Observed token and top k of some rows against float64."""
    dense = (hidden_TH @ HEAD_HV).double().log_softmax(1)[rows]
    own = dense.gather(1, ids_T[1:][rows][:, None])
    top = dense.topk(K, dim=1)
    values = torch.cat((own, top.values), dim=1)
    torch.testing.assert_close(found.logprobs[:, : 1 + K].double(), values, rtol=1e-5, atol=2e-6)
    assert found.logprob_token_ids[:, 1 : 1 + K].tolist() == top.indices.tolist()
    assert found.selected_token_ranks.tolist() == (dense >= own).sum(1).tolist()
