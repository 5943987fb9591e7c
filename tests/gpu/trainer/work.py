"""The model and the examples of whole steps."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from qpipe.pipeline.format.records import TargetExample
from transformers import Qwen3Config, Qwen3ForCausalLM

from .measure import DEVICE, REHEARSE

Times = Iterator[tuple[int, float]]  # the tokens and the seconds of some steps
SUPPORT = 32
SIZES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}
LAYERS, PACK, MEAN_LENGTH, VOCABULARY = 28, 8192, 500, 151_936
if REHEARSE:
    SIZES = {name: {"hidden_size": 64, "intermediate_size": 128} for name in SIZES}
    LAYERS, PACK, MEAN_LENGTH, VOCABULARY = 2, 256, 40, 1_000


def make_model(size: str, layers: int = LAYERS, window: int | None = None) -> Any:
    """A random model of real dimensions."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **SIZES[size],
        num_hidden_layers=layers,
        num_attention_heads=16 if not REHEARSE else 4,
        num_key_value_heads=8 if not REHEARSE else 2,
        head_dim=128 if not REHEARSE else 16,
        vocab_size=VOCABULARY,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=0,
    )
    with torch.device(DEVICE):
        return Qwen3ForCausalLM(config)


def make_examples(count: int, rng: np.random.Generator, shared: int = 0) -> list[TargetExample]:
    """Chats of log-normal lengths, of which the last half is supervised."""
    beginning = rng.integers(0, VOCABULARY, shared)
    made = []
    for number in range(count):
        length = int(np.clip(rng.lognormal(np.log(MEAN_LENGTH) - 0.2, 0.6), 16, PACK // 2))
        positions = np.arange(max(shared, length // 2) + 1, max(shared, length // 2) + length // 2)
        size = int(positions[-1]) + 1
        ids = np.concatenate([beginning, rng.integers(0, VOCABULARY, size - shared)])
        part = VOCABULARY // SUPPORT
        support = rng.integers(0, part, (len(positions), SUPPORT)) + part * np.arange(SUPPORT)
        observed = ids[positions]
        support[np.arange(len(positions)), observed // part % SUPPORT] = observed
        probs = rng.random(support.shape) + 0.01
        probs *= 0.9 / probs.sum(1, keepdims=True)
        ones = np.ones(len(positions), np.float32)
        made.append(
            TargetExample(
                id=str(number),
                input_ids=ids.astype(np.int32),
                positions=positions.astype(np.int32),
                trust=0.5 * ones,
                counts=np.full(len(positions), SUPPORT, np.int32),
                support_ids=support.ravel().astype(np.int32),
                support_probs=probs.ravel().astype(np.float32),
                tail_mass=0.1 * ones,
                weights=ones,
            )
        )
    return made


def make_steps(count: int) -> list[list[TargetExample]]:
    """The examples of some steps, at most one full pack each."""
    rng = np.random.default_rng(1)
    steps = []
    for _ in range(count):
        examples, total = [], 0
        for each in make_examples(PACK // 16, rng):
            if total + len(each.input_ids) > PACK:
                break
            examples.append(each)
            total += len(each.input_ids)
        steps.append(examples)
    return steps


def tokens_of(examples: list[TargetExample]) -> int:
    """The number of their tokens."""
    return sum(len(each.input_ids) for each in examples)
