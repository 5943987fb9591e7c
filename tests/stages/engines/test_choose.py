"""Engine and number format are those of the machine that runs the engine."""

from types import SimpleNamespace
from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.progress import say_once
from qpipe.stages.engines.choose import (
    choose_dtype,
    choose_engine,
    choose_head,
    say_float32,
    this_host,
)
from qpipe.stages.engines.settings import Host
from qpipe.stages.execution import ray as on_ray
from qpipe.stages.execution.run import host_of_workers
from qpipe.stages.execution.settings import Execution

GPU = Host(has_gpu=True, has_vllm=True)
HEAD = Host(has_gpu=False, has_vllm=False)


def config(dtype: str) -> Any:
    text = SimpleNamespace(dtype=f"torch.{dtype}")
    return SimpleNamespace(get_text_config=lambda: text)


def test_auto_is_what_the_machine_of_the_engine_has() -> None:
    assert [choose_engine("auto", host) for host in (GPU, HEAD)] == ["vllm", "transformers"]
    assert choose_engine("auto", GPU, gathers=True) == "vllm"
    assert choose_engine("transformers", GPU) == "transformers"
    with pytest.raises(UserError, match="engine vllm is not installed"):
        choose_engine("vllm", HEAD)
    own = config("bfloat16")
    assert [choose_dtype("auto", own, host) for host in (GPU, HEAD)] == ["bfloat16", "float32"]
    assert choose_dtype("float16", own, HEAD) == "float16"
    assert choose_dtype("auto", config("float8_e4m3fn"), GPU) == "float32"
    of_images = SimpleNamespace(
        dtype="bfloat16", get_text_config=lambda: SimpleNamespace(dtype=None)
    )
    assert choose_dtype("auto", of_images, GPU) == "bfloat16"  # as Gemma 3 and Qwen2.5-VL say it


def test_the_head_is_float32_where_vllm_can() -> None:
    new, old = Host(True, True, has_float32_head=True), GPU
    plain, quantised = SimpleNamespace(), SimpleNamespace(quantization_config={"bits": 4})

    def head(option: str, engine: str, dtype: Any, model: Any, host: Host) -> str:
        return choose_head(option, engine, dtype, model, host)

    assert head("auto", "vllm", "bfloat16", plain, new) == "float32"
    assert head("float32", "vllm", "float16", plain, new) == "float32"
    assert head("model", "vllm", "bfloat16", plain, new) == "model"
    for engine, model, host in (
        ("vllm", plain, old),
        ("vllm", quantised, new),
        ("transformers", plain, new),
        ("server", plain, new),
    ):
        assert head("auto", engine, "bfloat16", model, host) == "model"
        assert head("float32", engine, "float32", model, host) == "model"  # it is anyway
        with pytest.raises(UserError, match=r"--head-dtype float32: goes with vLLM 0\.26"):
            head("float32", engine, "bfloat16", model, host)
    assert this_host().has_float32_head  # the engine of the tests


def test_float32_on_a_gpu_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    say_once.cache_clear()
    for dtype, on_gpu in (("float32", False), ("bfloat16", True)):
        say_float32(dtype, on_gpu)  # pyright: ignore[reportArgumentType]
    assert capsys.readouterr().err == ""
    for _ in range(2):
        say_float32("float32", on_gpu=True)
    said = capsys.readouterr().err
    assert said.count("float32 on a GPU is many times slower") == 1
    assert "--dtype bfloat16" in said


class Cluster:
    """As much of Ray as is asked for."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self.machines = machines
        self.options_given: dict[str, float] = {}

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": machine} for machine in self.machines]

    def remote(self, function: Any) -> "Cluster":
        self.function = function
        return self

    def options(self, **given: float) -> Any:
        self.options_given = given
        return SimpleNamespace(remote=lambda: "asked")

    def get(self, reference: str) -> Host:
        assert reference == "asked"
        return GPU if self.options_given["num_gpus"] else HEAD


@pytest.mark.parametrize(
    ("machines", "host"), [(({"CPU": 4}, {"CPU": 8, "GPU": 8}), GPU), (({"CPU": 4},), HEAD)]
)
def test_a_cluster_is_asked_on_a_machine_with_a_gpu_if_it_has_one(
    machines: Any, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(*machines)
    monkeypatch.setattr(on_ray, "connected", lambda address: cluster)
    assert host_of_workers(Execution(executor="ray", ray_address="auto")) == host
    assert cluster.options_given["num_cpus"] == 0
    assert host_of_workers(Execution(executor="ray")) is None  # on this machine
    assert host_of_workers(None) is None
