"""Fixtures that several suites share: a tiny model with a real tokenizer, made once a session."""

import gc
import json
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from qpipe.tests.support.s3 import Bucket, lead_to, s3_server

os.environ["HF_HUB_OFFLINE"] = "1"  # a missing model must fail at once, not ask the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# what a shell starts behind `&` ignores Ctrl-C, and so would every command that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SHARE_AN_ENGINE = (
    "tests/stages/engines/test_engines.py",
    "tests/stages/engines/test_vllm.py",
    "tests/stages/engines/test_vllm_rows.py",
    "tests/stages/score/from_folder/test_given_ids.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What importing all tests makes lives to the end: the garbage collector leaves it out."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one process, and so do the files that share a vLLM engine.

    (xdist's own groups have no effect under pytest 9.2, whose node ids do not change.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "engine" if file in SHARE_AN_ENGINE else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and a byte-level tokenizer, vocabulary 320."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", vocab_size=320)


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """A server that speaks S3."""
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(s3_address: str, tmp_path: Path) -> Iterator[Bucket]:
    """An empty bucket there, `s3://bucket`, and an empty cache."""
    with patch.dict(os.environ, {"QPIPE_CACHE": str(tmp_path / "cache")}):
        lead_to(s3_address)
        bucket = Bucket(s3_address)
        bucket.remove(*bucket.names())
        yield bucket


def make_tiny_model(folder: Path, vocab_size: int, seed: int = 0) -> Path:
    """Save a random Llama whose head has `vocab_size` rows, and a tokenizer of 280 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant system the answer is"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=256,
            initializer_range=0.3,  # far from uniform predictions
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scores(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A real score folder: 30 demonstrations under the tiny model, in three shards. Not to be
    changed."""
    return make_scores(tmp_path_factory.mktemp("scored"), tiny_model)


def make_scores(root: Path, model: Path, top_k: int = 20) -> Path:
    """Score 30 demonstrations, twelve a shard."""
    from qpipe.stages.score.from_demonstrations import score
    from qpipe.tests.support.settings import score_settings

    rows = [
        {"prompt": f"user {'ab' * (number % 5)} the", "completion": f" answer is {number * 37}"}
        for number in range(30)
    ]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = score_settings(
        model=str(model),
        demonstrations=(str(root / "chats.jsonl"),),
        out=root / "scores",
        engine="transformers",
        top_k=top_k,
        shard_size=12,
    )
    score(settings)
    return root / "scores"


@pytest.fixture(scope="session")
def targets(scores: Path) -> Path:
    """Packed targets of those scores, with the defaults of the command. Not to be changed."""
    from qpipe.pipeline.methods import choose
    from qpipe.stages.build_targets.settings import BuildSettings
    from qpipe.stages.build_targets.stage import build_targets

    build_targets(BuildSettings(scores, scores.parent / "targets", choose("sft+kl")))
    return scores.parent / "targets"
