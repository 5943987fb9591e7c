"""A base and a teacher of the same demonstrations."""

from pathlib import Path

import pytest

from .folders import base_examples, folder_of, taught


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Seven demonstrations in three shards."""
    return folder_of(tmp_path / "base", base_examples())


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """The same, as `score --at` makes them."""
    return folder_of(tmp_path / "teacher", taught())
