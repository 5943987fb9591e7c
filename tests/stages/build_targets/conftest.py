"""Score folders of seven demonstrations."""

from pathlib import Path
from typing import Any

import pytest
from qpipe.tests.support.tokenizers import save_mistral
from transformers import AutoTokenizer

from .made import (
    VOCAB,
    Made,
    made_in,
)


@pytest.fixture(autouse=True)
def _no_sync(no_sync: None) -> None:
    """For every test here."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """In three shards, with token weights. Not to be changed."""
    return made_in(tmp_path_factory.mktemp("made"))


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A folder of its own for a test."""
    return made_in(tmp_path / "own").scores


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Scores of the whole vocabulary."""
    return made_in(tmp_path_factory.mktemp("whole"), top_k=VOCAB)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Made]:
    """The same demonstrations in shards of several sizes."""
    root = tmp_path_factory.mktemp("sharded")
    return {size: made_in(root / str(size), size) for size in (1, 3, 100)}


@pytest.fixture(scope="session")
def mistral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with Mistral's tokenizer. Not to be changed."""
    return save_mistral(tmp_path_factory.mktemp("tokenizers") / "mistral")


@pytest.fixture(scope="session")
def mistral(mistral_folder: Path) -> Any:
    """That tokenizer."""
    return AutoTokenizer.from_pretrained(mistral_folder)
