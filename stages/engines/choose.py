"""Chooses and starts an engine."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ...pipeline.errors import UserError
from ...pipeline.progress import say_once
from ...trainer.models.files import ModelFiles
from .base import Scorer
from .settings import DTYPES, ENGINES, Dtype, EngineSettings, Host


def make_scorer(model: ModelFiles, settings: EngineSettings) -> Scorer:
    """Load the model into the engine of the settings."""
    match settings.engine:
        case "vllm":
            from .vllm_engine import VllmScorer

            return VllmScorer(model, settings)
        case "transformers":
            from .in_transformers.scorer import TransformersScorer

            return TransformersScorer(model, settings)
        case "server":
            from .server.scorer import ServerScorer

            return ServerScorer(model, settings)
        case other:
            names = ", ".join((*ENGINES, "server"))
            raise UserError(f"engine {other!r} is not known: choose one of {names}")


def this_host() -> Host:
    """What this machine has."""
    import torch

    return Host(torch.cuda.is_available(), find_spec("vllm") is not None, _has_float32_head())


def _has_float32_head() -> bool:
    """Whether the installed vLLM computes logits in `head_dtype` (0.26 or later), by its source: it
    takes seconds to import."""
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return False
    layers = Path(found.submodule_search_locations[0]) / "model_executor" / "layers"
    try:
        return "head_dtype" in (layers / "logits_processor.py").read_text()
    except OSError:
        return False


def choose_engine(option: str, host: Host, gathers: bool = False) -> str:
    """Resolve `--engine` for the machine that runs it; `auto` is vLLM if it is installed there.

    `gathers` is whether ids are given.
    """
    if option == "vllm" and not host.has_vllm:
        raise UserError(
            "engine vllm is not installed: pip install 'qpipe[vllm]', or use --engine transformers"
        )
    if option == "server" and gathers:
        raise UserError(
            "--engine server cannot score given ids, which --at needs: use --engine vllm or "
            "transformers"
        )
    if option != "auto":
        return option
    return "vllm" if host.has_vllm else "transformers"


def choose_dtype(option: str, config: Any, host: Host | None = None) -> Dtype:
    """Resolve `--dtype`: `auto` is the model's own number format on a GPU, otherwise float32.

    None is this machine.
    """
    if option == "auto":
        own = str(config.get_text_config().dtype or config.dtype).removeprefix("torch.")
        option = own if (host or this_host()).has_gpu else "float32"
    return option if option in DTYPES else "float32"


def choose_head(
    option: str, engine: str, dtype: Dtype, config: Any, host: Host
) -> Literal["float32", "model"]:
    """Resolve `--head-dtype`; "model" where the model is in float32 anyway.

    Raises UserError for a float32 head that the engine does not have.
    """
    quantised = getattr(config, "quantization_config", None) is not None
    able = engine == "vllm" and host.has_float32_head and not quantised
    if option == "float32" and dtype != "float32" and not able:
        raise UserError(
            "--head-dtype float32: goes with vLLM 0.26 or later and weights that are not "
            "quantised: leave it out"
        )
    return "model" if option == "model" or dtype == "float32" or not able else "float32"


def say_float32(dtype: Dtype, on_gpu: bool) -> None:
    """Say that float32 is slow on a GPU."""
    if on_gpu and dtype == "float32":
        say_once(
            "dtype float32 on a GPU is many times slower than bfloat16: give --dtype bfloat16 "
            "unless the scores must be those of float32"
        )
