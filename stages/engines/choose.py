"""Chooses and starts an engine."""

from importlib.util import find_spec
from typing import Any

from ...pipeline.errors import UserError
from ...trainer.models.files import ModelFiles
from .base import Scorer
from .settings import DTYPES, ENGINES, Dtype, EngineSettings


def make_scorer(model: ModelFiles, settings: EngineSettings) -> Scorer:
    """Load the model into the engine of the settings."""
    match settings.engine:
        case "vllm":
            from .vllm_engine import VllmScorer

            return VllmScorer(model, settings)
        case "transformers":
            from .transformers_engine import TransformersScorer

            return TransformersScorer(model, settings)
        case "server":
            from .server import ServerScorer

            return ServerScorer(model, settings)
        case other:
            names = ", ".join((*ENGINES, "server"))
            raise UserError(f"engine {other!r} is not known: choose one of {names}")


def choose_engine(option: str, gathers: bool = False) -> str:
    """Resolve `--engine`; `auto` is vLLM if it is installed. `gathers` is whether ids are given."""
    installed = find_spec("vllm") is not None
    if option == "vllm" and not installed:
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
    return "vllm" if installed else "transformers"


def choose_dtype(option: str, config: Any, on_gpu: bool | None = None) -> Dtype:
    """Resolve `--dtype`: `auto` is the model's own number format on a GPU, otherwise float32.

    `on_gpu` defaults to whether this machine has a GPU.
    """
    import torch

    if option == "auto":
        own = str(config.get_text_config().dtype).removeprefix("torch.")
        has_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
        option = own if has_gpu else "float32"
    return option if option in DTYPES else "float32"
