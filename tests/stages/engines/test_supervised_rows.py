"""The computation of supervised rows alone: its parts against plain ones."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from qpipe.stages.engines.supervised_rows import worker as rows_worker
from qpipe.stages.engines.supervised_rows.gather import (
    Gathered,
    gathered_log_probs,
    triton_log_probs,
)
from qpipe.stages.engines.supervised_rows.request import RowRequest, unpacked
from qpipe.stages.engines.supervised_rows.shards import shard_log_probs
from qpipe.stages.engines.supervised_rows.steps import Columns, Span, SupervisedRows
from qpipe.stages.engines.supervised_rows.worker import RowsExtension, knows_v1, knows_v2
from torch import Tensor

V, H, K = 50, 6, 4
HEAD_HV = torch.randn(H, V, generator=torch.Generator().manual_seed(0))


def log_probs(hidden_nH: Tensor, observed_n: Tensor, given_nw: Tensor, top_k: int) -> Gathered:
    assert all(tensor.is_contiguous() for tensor in (hidden_nH, observed_n, given_nw))
    return gathered_log_probs(hidden_nH @ HEAD_HV, observed_n, given_nw, top_k)


def asked(seed: int, rows: list[int], width: int = 2) -> RowRequest:
    rng = np.random.default_rng(seed)
    n = len(rows)
    given = rng.integers(-1, V, (n, width)).astype(np.int32)
    return RowRequest(np.array(rows, np.int32), rng.integers(0, V, n), given, K)


def check(found: Columns, request: RowRequest, hidden_TH: Tensor) -> None:
    """Against one computation of the whole prompt in float64."""
    dense_nV = (hidden_TH @ HEAD_HV).double().log_softmax(1)[torch.from_numpy(request.rows)]
    n = len(request.rows)
    assert found.ids_nc.shape == found.log_probs_nc.shape == (n, 1 + K + request.given.shape[1])
    assert (found.ids_nc.dtype, found.log_probs_nc.dtype) == (torch.int32, torch.float32)
    np.testing.assert_array_equal(found.ids_nc[:, 0], request.observed)
    np.testing.assert_array_equal(found.ids_nc[:, 1 + K :], request.given)
    at_nc = dense_nV.gather(1, found.ids_nc.long().clamp_min(0))
    is_id_nc = found.ids_nc >= 0
    torch.testing.assert_close(
        found.log_probs_nc[is_id_nc].double(), at_nc[is_id_nc], atol=1e-5, rtol=0
    )
    top_nk = dense_nV.topk(K, dim=1).values
    torch.testing.assert_close(found.log_probs_nc[:, 1 : 1 + K].double(), top_nk, atol=1e-5, rtol=0)
    assert found.ranks_n.tolist() == (dense_nV >= at_nc[:, :1]).sum(1).tolist()


def test_requests_keep_their_arrays_on_the_way() -> None:
    import msgspec

    sent = asked(0, [3, 4, 9])
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(sent.packed()))
    came = unpacked(SimpleNamespace(extra_args=travelled))
    assert came is not None
    assert came.top_k == K
    for name in ("rows", "observed", "given"):
        np.testing.assert_array_equal(getattr(came, name), getattr(sent, name))
    assert unpacked(SimpleNamespace(extra_args=None)) is None
    assert unpacked(SimpleNamespace(extra_args={"other": 1})) is None


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_prompts_in_parts_give_the_rows_of_whole_prompts(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts whose parts share steps, with logits of five rows at a time."""
    monkeypatch.setattr("qpipe.stages.engines.supervised_rows.steps.CHUNK_ROWS", 5)
    hidden = {name: torch.randn(20 + i, H) for i, name in enumerate("abc")}
    requests = {"a": asked(1, [0, 5, 6, 18]), "b": asked(2, [19], 0), "c": asked(3, [*range(21)])}
    rows = SupervisedRows(log_probs)
    for name, request in requests.items():
        rows.add(name, request)
    found: dict[str, Columns] = {}
    for start in range(0, 22, chunk):
        spans, tensors = [], [torch.full((2, H), torch.nan)]  # another request's tokens
        for name, states_TH in hidden.items():
            part = states_TH[start : start + chunk]
            if len(part):
                offset = sum(map(len, tensors))
                spans.append(Span(name, offset, start, len(part), len(states_TH)))
                tensors.append(part)
        spans.append(Span("unknown", 0, 0, 2, 9))
        found |= rows.step(torch.cat(tensors), spans)
    assert not rows.progress
    for name, request in requests.items():
        check(found[name], request, hidden[name])


def test_rows_that_never_ran_are_missing_and_repeated_ones_count_once() -> None:
    hidden_TH = torch.randn(10, H)
    request = asked(0, [1, 4, 8])
    rows = SupervisedRows(log_probs)

    def step(start: int, end: int) -> dict[str, Columns]:
        return rows.step(hidden_TH[start:end], [Span("r", 0, start, end - start, 10)])

    rows.add("r", request)
    assert len(step(4, 10)["r"].ranks_n) == 2  # row 1 was in a prefix cache
    rows.add("r", request)
    assert not step(0, 6)
    check(step(3, 10)["r"], request, hidden_TH)  # it lost its place, and some rows ran again
    rows.add("r", request)
    assert len(step(9, 10)["r"].ranks_n) == 0
    rows.add("r", request)
    rows.remove("r")
    assert not step(0, 10)


@pytest.mark.parametrize("sizes", [(50,), (20, 30), (48, 2), (17, 17, 16), (49, 1, 0)])
def test_a_divided_vocabulary_gives_what_the_whole_one_gives(sizes: tuple[int, ...]) -> None:
    """Each part in a thread of its own, whose gathering waits for all."""
    torch.manual_seed(1)
    n, count = 9, len(sizes)
    logits_nV = torch.randn(n, V) * 5
    logits_nV[0, [3, 44]] = logits_nV[0].max()  # a tie between parts
    observed_n = torch.tensor([3, 44, 0, 49, 20, 21, 16, 17, 33])
    given_nw = torch.randint(-1, V, (n, 3))
    barrier, shelf = Barrier(count), [torch.empty(0)] * count

    def all_gather(part: int, tensor_nc: Tensor) -> Tensor:
        shelf[part] = tensor_nc
        barrier.wait()
        whole = torch.stack(shelf, dim=1)
        barrier.wait()
        return whole

    def of_part(part: int) -> Gathered:
        first = sum(sizes[:part])
        own = logits_nV[:, first : first + sizes[part]]
        return shard_log_probs(own, first, observed_n, given_nw, K, partial(all_gather, part))

    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(of_part, range(count)))
    whole = gathered_log_probs(logits_nV, observed_n, given_nw, K)
    for found in parts:
        torch.testing.assert_close(found.observed_n, whole.observed_n, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.top_nk, whole.top_nk, atol=1e-5, rtol=0)
        is_id = given_nw >= 0
        torch.testing.assert_close(found.given_nw[is_id], whole.given_nw[is_id], atol=1e-5, rtol=0)
        assert found.ranks_n.tolist() == whole.ranks_n.tolist()
        assert found.ids_nk[1:].tolist() == whole.ids_nk[1:].tolist()
        assert set(found.ids_nk[0].tolist()) == set(whole.ids_nk[0].tolist())


def of_top(logits: Tensor, num_logprobs: int, sampled_token_ids: Tensor, *_: Any) -> Any:
    """vLLM's function of the top k, whose answer may have more fields, as `LogprobsTensors`."""
    dense = logits.log_softmax(1)
    ids = torch.cat((sampled_token_ids[:, None], dense.topk(num_logprobs, 1).indices), 1)
    ranks = (dense >= dense.gather(1, sampled_token_ids[:, None])).sum(1)
    return ids, dense.gather(1, ids), ranks, None, None


def of_ids(logits: Tensor, token_ids: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, token_ids)


@pytest.mark.parametrize("name", ["compute_topk_logprobs", "compute_topk_scores"])
@pytest.mark.parametrize("width", [0, 3])
def test_the_second_runners_functions_go_by_both_names(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of 0.25 and that of 0.33."""
    import vllm.v1.worker.gpu.sample as package

    stand_in = SimpleNamespace(**{name: of_top, "compute_token_logprobs": of_ids})
    monkeypatch.setattr(package, "logprob", stand_in, raising=False)
    logits_nV, observed_n = torch.randn(5, V), torch.randint(0, V, (5,))
    given_nw = torch.randint(-1, V, (5, width))
    found = triton_log_probs(logits_nV, observed_n, given_nw, K)
    for one, other in zip(
        found, gathered_log_probs(logits_nV, observed_n, given_nw, K), strict=True
    ):
        torch.testing.assert_close(one, other)


class Runner:
    """As much of vLLM's model runners as is replaced, with a head of its own."""

    device = torch.device("cpu")
    model_config = SimpleNamespace(get_hidden_size=lambda: H, dtype=torch.float32)

    def __init__(self) -> None:
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden @ HEAD_HV)


def sampling(request: RowRequest | None) -> Any:
    extra = None if request is None else request.packed()
    return SimpleNamespace(extra_args=extra, prompt_logprobs=K, prompt_logprob_token_ids=None)


class FirstRunner(Runner):
    def __init__(self, requests: dict[str, Any]) -> None:
        super().__init__()
        self.requests = requests
        self.num_prompt_logprobs = dict.fromkeys(requests, K)
        self.query_start_loc = SimpleNamespace(np=np.array([0, 4, 10]))
        self.input_batch = SimpleNamespace(req_id_to_index={"own": 1, "other": 0})

    def _get_prompt_logprobs_dict(
        self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        return dict.fromkeys(self.num_prompt_logprobs, "vLLM's")


class RenamedRunner(FirstRunner):
    def _get_prompt_logprobs_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, states: Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        return {}


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process group, and the plain computation in place of the kernels of a GPU."""
    monkeypatch.setattr(rows_worker, "divided_log_probs", lambda model: None)
    monkeypatch.setattr(rows_worker, "triton_log_probs", gathered_log_probs)


def install(runner: Any) -> str | None:
    extension = RowsExtension()
    extension.model_runner = runner
    return extension.qpipe_install_rows(K)


@pytest.mark.usefixtures("one_process")
def test_the_first_runner_passes_other_requests_on() -> None:
    own, hidden_TH = asked(5, [0, 2, 4]), torch.randn(10, H)
    state: Any = partial(SimpleNamespace, num_computed_tokens=0, prompt_token_ids=[0] * 6)
    requests = {
        "other": state(sampling_params=sampling(None)),
        "own": state(sampling_params=sampling(own)),
    }
    runner: Any = FirstRunner(requests)
    assert install(runner) is None
    found = runner._get_prompt_logprobs_dict(hidden_TH, {"own": 6, "other": 4})
    assert found.pop("other") == "vLLM's"
    assert runner.num_prompt_logprobs == {"other": K}
    check(Columns(*found["own"][:3]), own, hidden_TH[4:])
    runner.num_prompt_logprobs["own"] = K
    assert not runner._get_prompt_logprobs_dict(hidden_TH, {}).keys() - {"other"}  # preempted
    del requests["own"]  # aborted
    runner._get_prompt_logprobs_dict(hidden_TH, {})
    assert not runner.__dict__["_get_prompt_logprobs_dict"].rows.progress


@pytest.mark.usefixtures("one_process")
def test_the_second_runner_passes_other_requests_on() -> None:
    """With vLLM's own worker, of whose kernels no request makes use."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    runner: Any = Runner()
    runner.prompt_logprobs_worker = stock = PromptLogprobsWorker(3, runner.device)
    assert install(runner) is None
    worker = runner.prompt_logprobs_worker
    own, hidden_TH = asked(5, [0, 2, 4]), torch.randn(6, H)
    worker.add_request("other", 2, sampling(None))
    worker.add_request("own", 1, sampling(own))
    assert stock.uses_prompt_logprobs.tolist() == [False, False, True]
    assert worker.num_prompt_logprobs is stock.num_prompt_logprobs
    found: dict[str, Any] = {}
    for start, end in ((0, 3), (3, 6)):
        assert not found
        batch = SimpleNamespace(
            req_ids=["own"],
            idx_mapping_np=np.array([1]),
            num_computed_prefill_tokens_np=np.array([start]),
            num_scheduled_tokens=np.array([3]),
            query_start_loc_np=np.array([1, 4]),
        )
        states = torch.cat((torch.full((1, H), torch.nan), hidden_TH[start:end]))
        unused = torch.empty(0)
        found = worker.compute_prompt_logprobs(
            runner.model.compute_logits, states, batch, unused, unused, np.array([9, 6, 9])
        )
    check(Columns(*found["own"][:3]), own, hidden_TH)
    worker.add_request("own", 1, sampling(own))
    worker.remove_request("own")
    worker.remove_request("other")
    assert not worker.rows.progress
    assert not stock.in_progress_prompt_logprobs


class Of025:
    """`PromptLogprobsWorker` of vLLM 0.25, which does not know its device."""

    def __init__(self, max_num_reqs: int) -> None: ...

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None: ...

    def remove_request(self, req_id: str) -> None: ...

    def compute_prompt_logprobs(
        self,
        logits_fn: Any,
        hidden_states: Any,
        input_batch: Any,
        all_token_ids: Any,
        num_computed_tokens: Any,
        prompt_lens: Any,
    ) -> None: ...


class Of033(Of025):
    """That of 0.33."""

    def __init__(self, max_num_reqs: int, device: Any, logprobs_mode: str = "") -> None: ...

    def compute_prompt_token_id_logprobs(self, *_: Any) -> None: ...


class WithoutLengths(Of033):
    """That of another version, which might know the lengths itself."""

    def compute_prompt_logprobs(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        logits_fn: Any,
        hidden_states: Any,
        input_batch: Any,
        all_token_ids: Any,
        num_computed_tokens: Any,
    ) -> None: ...


def test_forms_of_the_second_runner_are_told_apart() -> None:
    assert knows_v2(Of025)
    assert knows_v2(Of033)
    assert not knows_v2(WithoutLengths)
    assert not knows_v2(object)
    assert knows_v1(FirstRunner)
    assert not knows_v1(RenamedRunner)
    assert not knows_v1(object)


@pytest.mark.usefixtures("one_process")
def test_a_runner_of_another_form_is_left_alone() -> None:
    runner: Any = RenamedRunner({})
    assert install(runner) == "the model runner has another form"
    assert "_get_prompt_logprobs_dict" not in vars(runner)
    second: Any = Runner()
    second.prompt_logprobs_worker = SimpleNamespace(add_request=print)
    before = second.prompt_logprobs_worker
    assert install(second) == "the second model runner has another form"
    assert second.prompt_logprobs_worker is before
    second.prompt_logprobs_worker = None  # a stage of a pipeline without the head
    assert install(second) is None


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("field", Gathered._fields)
def test_a_trial_that_disagrees_leaves_vllms_own_path(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*asked: Any) -> Gathered:
        found = gathered_log_probs(*asked)
        return found._replace(**{field: getattr(found, field).flip(0)})

    monkeypatch.setattr(rows_worker, "gathered_log_probs", wrong)
    runner: Any = FirstRunner({})
    assert "differ from a plain computation" in (install(runner) or "")
    assert "_get_prompt_logprobs_dict" not in vars(runner)


def test_a_divided_vocabulary_that_disagrees_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(hidden_nH: Tensor, *asked: Any) -> Gathered:
        return log_probs(-hidden_nH, *asked)

    monkeypatch.setattr(rows_worker, "divided_log_probs", lambda model: wrong)
    runner: Any = FirstRunner({})
    assert install(runner) is None
    assert vars(runner)["_get_prompt_logprobs_dict"].rows.log_probs is not wrong
