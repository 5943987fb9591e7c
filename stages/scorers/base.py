"""What a scoring engine is: token ids in, log-probabilities at the supervised positions out.

Array names end in their shape: N supervised positions, k the size of the top k, V the vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError
from ...pipeline.records import Example, ScoredExample
from ...trainer.models import ModelFiles

ENGINES = ("vllm", "transformers")
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ScorerSettings:
    """What an engine is started with.

    `tensor_parallel_size` and `gpu_memory_utilization` are vLLM's own and change nothing stored.
    """

    engine: str
    dtype: Dtype
    max_length: int  # tokens of the longest example
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.8


class Scorer(Protocol):
    """A loaded model that scores examples.

    The log-probabilities are natural, at temperature 1, normalised over the whole vocabulary in
    float32; a rank counts the tokens at least as probable as the observed one, itself included.
    """

    def score(self, examples: Sequence[Example], top_k: int) -> Iterator[tuple[int, ScoredExample]]:
        """Each example's place in `examples` and its scores, in the order the engine likes."""
        ...


def make_scorer(model: ModelFiles, settings: ScorerSettings) -> Scorer:
    """Load the model into the engine that the settings name."""
    match settings.engine:
        case "vllm":
            from .vllm_engine import VllmScorer

            return VllmScorer(model, settings)
        case "transformers":
            from .transformers_model import TransformersScorer

            return TransformersScorer(model, settings)
        case other:
            raise UserError(f"engine {other!r} is not known: choose one of {', '.join(ENGINES)}")


def choose_engine(option: str) -> str:
    """The engine that an option means: `auto` is vLLM where it is installed."""
    installed = find_spec("vllm") is not None
    if option == "auto":
        return "vllm" if installed else "transformers"
    if option == "vllm" and not installed:
        raise UserError(
            "engine vllm is not installed: pip install 'qpipe[vllm]', or use --engine transformers"
        )
    return option


def choose_dtype(option: str, config: Any) -> Dtype:
    """The number format that an option means: `auto` is the model's own on a GPU, else float32."""
    import torch

    if option == "auto":
        own = str(config.get_text_config().dtype).removeprefix("torch.")
        option = own if torch.cuda.is_available() else "float32"
    known: dict[str, Dtype] = {dtype: dtype for dtype in DTYPES}
    return known.get(option, "float32")


def scored(
    example: Example,
    observed_log_probs_N: NDArray[np.float32],
    observed_ranks_N: NDArray[np.integer],
    topk_ids_Nk: NDArray[np.integer],
    topk_log_probs_Nk: NDArray[np.float32],
    vocab_size: int,
) -> ScoredExample:
    """A scored example of an engine's arrays; the tail is what the top k leaves of 1."""
    if not np.isfinite(observed_log_probs_N).all() or np.isnan(topk_log_probs_Nk).any():
        raise UserError(
            f"example {example.id}: the model gives log-probabilities that are no numbers: its "
            "weights are damaged, or the number format overflows: try --dtype float32"
        )
    N, k = topk_ids_Nk.shape
    kept_mass_N = np.exp(topk_log_probs_Nk.astype(np.float64)).sum(axis=1)
    tail_mass_N = np.maximum(1 - kept_mass_N, 0) if k < vocab_size else np.zeros(N)
    return ScoredExample(
        id=example.id,
        input_ids=example.input_ids,
        positions=example.positions,
        observed_log_probs=observed_log_probs_N.astype(np.float32, copy=False),
        observed_ranks=observed_ranks_N.astype(np.int32, copy=False),
        counts=np.full(N, k, np.int32),
        topk_ids=topk_ids_Nk.astype(np.int32, copy=False).ravel(),
        topk_log_probs=topk_log_probs_Nk.astype(np.float32, copy=False).ravel(),
        tail_mass=tail_mass_N.astype(np.float32),
        token_weights=np.ones(N, np.float32),
    )
