"""The kernels of vLLM's second model runner against dense float64, in Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl
import vllm.triton_utils

# vLLM has stand-ins for both where it finds no GPU; its kernels must see the real ones
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl

from qpipe.stages.engines.supervised_rows.gather import triton_log_probs  # noqa: E402


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
