"""How vLLM divides the layers of a model among the groups of GPUs of a pipeline, and its ends.

The GPUs of a group share every matrix by tensor parallelism.
"""

import os

from ...pipeline.errors import UserError
from ...trainer.models.files import ModelFiles
from ...trainer.models.size import VALUE_BYTES
from .settings import EngineSettings

# Types of models whose embedding vLLM keeps on the first group of a pipeline alone and the head on
# the last, a tied matrix on both. Those of other types, such as Gemma's and most mixtures of
# experts, may be on every group, as the files in vllm/model_executor/models tell.
DIVIDES_ENDS = frozenset(
    {"deepseek_v3", "glm4_moe", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3"}
)


def most_weights(model: ModelFiles, settings: EngineSettings, total: int) -> int:
    """Bytes of the weights on the group of GPUs that has the most, of `total` in a pipeline.

    Layers count alike; the final norm counts with them.
    """
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    groups = layers_of_groups(layers, settings.pipeline_parallel_size)
    if len(groups) == 1:
        return total
    matrix = model.vocab_size * config.hidden_size * VALUE_BYTES[settings.dtype]
    both = matrix if getattr(config, "tie_word_embeddings", False) else 2 * matrix
    inside, at_ends = (0, matrix) if config.model_type in DIVIDES_ENDS else (both, both)
    beside = [at_ends, *[inside] * (len(groups) - 2), at_ends]
    return max(
        (total - both) * own // layers + ends for own, ends in zip(groups, beside, strict=True)
    )


def layers_of_groups(layers: int, groups: int) -> list[int]:
    """The number of layers on each group of a pipeline.

    As `get_pp_indices` in vllm/distributed/utils.py divides them: what remains goes to groups
    before the last, the latest first, and the user's VLLM_PP_LAYER_PARTITION comes before that.
    """
    given = os.environ.get("VLLM_PP_LAYER_PARTITION")
    if given is None:
        even, rest = divmod(layers, groups)
        return [even + (groups - 1 - rest <= group < groups - 1) for group in range(groups)]
    words = given.split(",")
    numbers = [int(word) for word in words if word.strip().isdecimal()]
    if not len(words) == len(numbers) == groups or sum(numbers) != layers:
        raise UserError(
            f"VLLM_PP_LAYER_PARTITION {given}: does not divide {layers} layers among "
            f"--pipeline-parallel-size {groups}: correct it, or unset it"
        )
    return numbers
