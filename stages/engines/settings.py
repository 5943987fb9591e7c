"""The settings of an engine, each an option of `qpipe score`."""

from dataclasses import dataclass, field
from typing import Literal

from ...pipeline.errors import UserError
from ...pipeline.options import Range, check, option

ENGINES = ("vllm", "transformers")  # those that run in this process, unlike "server"
EngineName = Literal["auto", "vllm", "transformers", "server"]
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")

_COUNT = Range(1, 10**6)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Access to a vLLM server. Only `model`, the model's name there, changes what is stored."""

    url: str | None = option(
        None,
        "URL of a vLLM server started with --max-logprobs -1, for example "
        "http://host:8000. The API key is read from VLLM_API_KEY.",
        metavar="URL",
        names=("--server-url",),
    )
    model: str | None = option(
        None,
        "Name of the model on the server.  [default: the only model served]",
        metavar="NAME",
        names=("--server-model",),
    )
    concurrency: int = option(
        32, "Maximum number of concurrent requests.", range=_COUNT, names=("--server-requests",)
    )
    timeout: float = option(
        600.0,
        "Time limit for a whole response. Requests that time out or fail are retried.",
        range=Range(0, above=True),
        metavar="SECONDS",
        names=("--server-timeout",),
    )
    tries: int = 8  # of a request, while the server is busy, failing or unreachable
    first_wait: float = 0.5  # seconds before the second try, doubled for each one after

    def __post_init__(self) -> None:
        check(self)
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"--server-url {self.url}: not an address: give one as in http://host:8000"
            )

    @property
    def address(self) -> str:
        """The URL without the path of the API."""
        return (self.url or "").rstrip("/").removesuffix("/v1")


@dataclass(frozen=True, slots=True)
class Host:
    """The machine that runs an engine."""

    has_gpu: bool
    has_vllm: bool
    has_float32_head: bool = False  # its vLLM can compute logits in float32


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The engine and its options. `auto` is resolved, and `max_length` set, before it starts.

    The parallel sizes and the memory utilization are vLLM's and do not change what is stored.
    """

    engine: EngineName = option(
        "auto",
        "Engine that runs the model. auto is vLLM if it is installed, else transformers. "
        "server needs --server-url and reads only the tokenizer and configuration of "
        "--model.",
    )
    dtype: Literal["auto", Dtype] = option(
        "auto",
        "Floating-point format of the model. auto is the model's own on a GPU and float32"
        " on a CPU.",
    )
    top_k: int = option(64, "Entries stored per position.", range=_COUNT)
    head_dtype: Literal["auto", "float32", "model"] = option(
        "auto",
        "Floating-point format of the output head (vLLM). auto is float32 where vLLM can "
        "compute it (0.26 or later, weights not quantised), else that of the model. In "
        "bfloat16, half of the neighbouring entries have equal log-probabilities.",
    )
    tensor_parallel_size: int = option(
        1, "Number of GPUs that share each layer of the model (vLLM).", range=_COUNT
    )
    pipeline_parallel_size: int = option(
        1, "Number of groups of GPUs that the layers are divided among (vLLM).", range=_COUNT
    )
    gpu_memory_utilization: float | None = option(
        None,
        "Maximum fraction of GPU memory that vLLM reserves. Prompt log-probabilities need"
        " additional memory.  [default: what they leave, at most 0.92]",
        range=Range(0, 1, above=True),
    )
    max_length: int = 4096  # tokens of the longest example
    host: Host | None = None  # None is this machine
    reads_prefixes: bool = True  # shared beginnings are computed once
    rows_alone: bool = True  # vLLM computes log-probabilities of supervised tokens alone
    server: ServerSettings = field(default_factory=ServerSettings)

    def __post_init__(self) -> None:
        check(self)
        url, model = self.server.url, self.server.model
        if self.engine == "server":
            if url is None:
                raise UserError("--engine server needs --server-url, as in http://host:8000")
            return
        for name, value in (("--server-url", url), ("--server-model", model)):
            if value is not None:
                raise UserError(f"{name} {value}: goes with --engine server: give that as well")

    @property
    def logits_dtype(self) -> str:
        """The number format of the logits, once `auto` is resolved."""
        return "float32" if self.head_dtype == "float32" else self.dtype

    @property
    def gpus(self) -> int:
        """The number of GPUs that share the model; 0 with a server."""
        if self.engine == "server":
            return 0
        return self.tensor_parallel_size * self.pipeline_parallel_size
