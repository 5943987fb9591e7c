"""How vLLM divides a model among the groups of GPUs of a pipeline."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.stages.engines.settings import EngineSettings
from qpipe.stages.engines.vllm_groups import DIVIDES_ENDS, layers_of_groups
from qpipe.stages.engines.vllm_memory import weights_on_each
from qpipe.trainer.models.files import ModelFiles
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3MoeConfig


@pytest.mark.parametrize(
    ("layers", "groups", "expected"),
    [
        (28, 1, [28]),
        (28, 3, [9, 10, 9]),
        (29, 3, [10, 10, 9]),
        (5, 4, [1, 1, 2, 1]),
        (7, 4, [2, 2, 2, 1]),
    ],
)
def test_layers_of_a_pipeline(layers: int, groups: int, expected: list[int]) -> None:
    assert layers_of_groups(layers, groups) == expected


def test_layers_of_a_pipeline_are_those_of_vllm() -> None:
    places = pytest.importorskip("vllm.distributed.utils").get_pp_indices
    for layers in range(1, 97):
        for groups in range(1, min(layers, 17) + 1):
            bounds = [places(layers, rank, groups) for rank in range(groups)]
            assert layers_of_groups(layers, groups) == [last - first for first, last in bounds]


def test_layers_that_the_user_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "6, 22")
    assert layers_of_groups(28, 2) == [6, 22]
    for given in ("6,22,0", "6,21", "6,x", "28", "", "-2,30", "6,22,"):
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", given)
        with pytest.raises(UserError, match=f"N {given}: does not divide 28 layers among .* 2: "):
            layers_of_groups(28, 2)


def piped(kind: Any, vocab_size: int, is_tied: bool) -> ModelFiles:
    """A model of 28 layers whose files are elsewhere."""
    config = kind(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=28,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, tie_word_embeddings=is_tied,
        **({"num_experts": 4, "moe_intermediate_size": 32} if kind is Qwen3MoeConfig else {}),
    )  # fmt: skip
    return ModelFiles("piped", None, Path("/nowhere"), config, cast(Any, None))


@pytest.mark.parametrize(
    ("kind", "vocab_size", "is_tied", "sizes", "layers", "matrices"),
    [
        (Qwen3Config, 4000, True, (1, 1), 28, 1),
        (Qwen3Config, 4000, False, (1, 1), 28, 2),
        (Qwen3Config, 4000, True, (1, 2), 14, 1),  # on the first and on the last
        (Qwen3Config, 4000, False, (1, 2), 14, 1),
        (Qwen3Config, 4000, False, (2, 2), 14, 1),
        (Qwen3Config, 4000, False, (1, 3), 9, 1),  # more than the ten layers between
        (Qwen3Config, 100, False, (1, 3), 10, 0),
        (Qwen3Config, 4000, True, (1, 28), 1, 1),
        (Gemma3TextConfig, 4000, True, (2, 3), 10, 1),  # on every one
        (Qwen3MoeConfig, 4000, False, (1, 3), 10, 2),
    ],
)
def test_weights_are_those_of_the_gpu_with_the_most(
    kind: Any, vocab_size: int, is_tied: bool, sizes: tuple[int, int], layers: int, matrices: int
) -> None:
    """By the shapes of the model's own tensors; the final norm is less than a thousandth."""
    model = piped(kind, vocab_size, is_tied)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(model.config).named_parameters()
    of_layer = sum(each.numel() for name, each in tensors if ".layers.0." in name)
    expected = 2 * (layers * of_layer + matrices * vocab_size * 64) / sizes[0]
    settings = EngineSettings(
        "vllm", "bfloat16", tensor_parallel_size=sizes[0], pipeline_parallel_size=sizes[1]
    )
    assert weights_on_each(model, settings) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("model_type", "file"),
    [
        ("deepseek_v3", "deepseek_v2"),
        ("glm4_moe", "glm4_moe"),
        ("granite", "granite"),
        ("llama", "llama"),
        ("mistral", "llama"),  # made of Llama's classes
        ("phi3", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen2"),  # of Qwen2's
    ],
)
def test_types_whose_ends_vllm_divides(model_type: str, file: str) -> None:
    """By its source, which takes seconds to import: other groups have a placeholder."""
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    assert model_type in DIVIDES_ENDS
    models = Path(found.submodule_search_locations[0]) / "model_executor" / "models"
    source = (models / f"{file}.py").read_text()
    for matrix in ("embed_tokens", "lm_head"):
        assert f"self.{matrix} = PPMissingLayer()" in source
