"""Tiny models and random target folders for the trainer's tests."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qpipe.pipeline.format.records import TargetExample
from qpipe.pipeline.storage.json_files import sha256_of_json
from qpipe.tests.support.folders import in_shards, seal_shards
from qpipe.trainer.models.files import find_model
from qpipe.trainer.settings import TrainSettings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 200


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a random Llama model with its tokenizer in a new folder."""

    def make(
        dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB_SIZE, **config: Any
    ) -> Path:
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(1)
        shape = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            **config,
        )
        LlamaForCausalLM(shape).to(dtype).save_pretrained(folder)
        words = WordLevel({f"w{index}": index for index in range(vocab_size)}, unk_token="w0")
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Path]) -> Path:
    """A random float32 model."""
    return make_model()


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., list[TargetExample]]:
    """Random consistent targets: residuals over a few ids, the observed one among them."""

    def make(count: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[TargetExample]:
        rng = np.random.default_rng(seed)
        return [_random_example(rng, f"example-{index}", vocab_size) for index in range(count)]

    return make


@pytest.fixture(scope="session")
def make_live_examples(
    make_examples: Callable[..., list[TargetExample]],
) -> Callable[..., list[TargetExample]]:
    """The random targets as a live folder holds them: trust and weight 1, and what is stored."""

    def make(count: int, stored: str, seed: int = 0) -> list[TargetExample]:
        return [_as_live(example, stored) for example in make_examples(count, seed)]

    return make


@pytest.fixture
def make_targets(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """Seals a target folder of given examples."""

    def make(
        examples: list[TargetExample], name: str = "targets", rows: int = 5, **settings: Any
    ) -> Path:
        folder = tmp_path / name
        own = {
            "method": "sft+kl",
            "form": "frozen-target",
            "parameters": {"lam": 0.1},
            "residual": "base",
            "tail_shape": "student",
            "top_p": 0.99,
            "max_support": 64,
            "temperature": 1.0,
            "teacher_temperature": 1.0,
            "vocab_size": VOCAB_SIZE,
            "tokenizer_hash": find_model(str(model)).tokenizer_hash,
        }
        seal_shards(
            folder,
            "build-targets",
            own | settings,
            in_shards(examples, rows),
            inputs={"scores": sha256_of_json(name)},
            parents={"scores": {"made": "up"}},
        )
        return folder

    return make


@pytest.fixture
def settings(
    make_targets: Callable[..., Path],
    make_examples: Callable[..., list[TargetExample]],
    model: Path,
    tmp_path: Path,
) -> TrainSettings:
    """A run over 17 examples: two steps of eight, and a last one of one."""
    targets = make_targets(make_examples(17))
    return TrainSettings(
        targets=targets, model=str(model), out=tmp_path / "run", learning_rate=1e-3
    )


def _as_live(example: TargetExample, stored: str) -> TargetExample:
    ones = np.ones_like(example.trust)
    live = replace(example, trust=ones, weights=ones)
    if stored not in ("observed", "base-observed"):
        return live
    is_observed = example.support_ids == np.repeat(example.observed_ids, example.counts)
    probs = ones if stored == "observed" else example.support_probs[is_observed]
    return replace(
        live,
        counts=np.ones_like(example.counts),
        support_ids=example.observed_ids,
        support_probs=probs,
        tail_mass=1 - probs,
    )


def _random_example(rng: np.random.Generator, name: str, vocab_size: int) -> TargetExample:
    length = int(rng.integers(4, 12))
    # a token is followed by its double, most of the time: something to be learned
    tokens = [int(rng.integers(1, vocab_size))]
    while len(tokens) < length:
        noise = rng.random() < 0.1
        tokens.append(int(rng.integers(1, vocab_size)) if noise else tokens[-1] * 2 % vocab_size)
    first = int(rng.integers(1, length - 1))
    positions = np.arange(first, length)
    counts = rng.integers(1, 6, len(positions))
    supports, probs, tails = [], [], []
    for position, size in zip(positions, counts, strict=True):
        others = rng.permutation(np.delete(np.arange(vocab_size), tokens[position]))[: size - 1]
        supports.append(rng.permutation(np.append(others, tokens[position])))
        mass = rng.dirichlet(np.ones(size + 1))
        probs.append(mass[:-1])
        tails.append(mass[-1])
    return TargetExample(
        id=name,
        input_ids=np.array(tokens, np.int32),
        positions=positions.astype(np.int32),
        trust=rng.uniform(0.5, 1, len(positions)).astype(np.float32),
        counts=counts.astype(np.int32),
        support_ids=np.concatenate(supports).astype(np.int32),
        support_probs=np.concatenate(probs).astype(np.float32),
        tail_mass=np.array(tails, np.float32),
        weights=rng.uniform(0.5, 1.5, len(positions)).astype(np.float32),
    )
