"""Models and folders of the tests of `qpipe score --at`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from qpipe.pipeline.format.records import Example

from .folders import SHARDS, Dense, another_model, make_folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return another_model(tmp_path_factory.mktemp("models") / "teacher", tiny_model, seed=1)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder of the base's scores. Not to be changed."""
    return make_folder(tmp_path_factory.mktemp("base") / "scores", tiny_model, SHARDS)


@pytest.fixture(scope="module")
def dense(teacher: Path) -> Dense:
    """The teacher's log-probabilities [N, V], in float64 throughout."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()

    @torch.inference_mode()
    def log_probs(one: Example) -> NDArray[np.float64]:
        logits_TV = model(torch.from_numpy(one.input_ids.astype(np.int64))[None]).logits[0]
        return logits_TV[one.positions - 1].log_softmax(-1).numpy()

    return log_probs
