"""Folders without `fsync`, and the one vLLM engine of `make test`, which its tests share."""

import os
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are not forced onto the disk, which takes most of the time of small folders."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def vllm_scorer(tiny_model: Path) -> Any:
    """A real engine with the tiny model in float32. To be left as it was."""
    from qpipe.stages.engines.choose import make_scorer
    from qpipe.stages.engines.settings import EngineSettings
    from qpipe.trainer.models.files import find_model

    settings = EngineSettings("vllm", "float32", max_length=256)
    return make_scorer(find_model(str(tiny_model)), settings)
