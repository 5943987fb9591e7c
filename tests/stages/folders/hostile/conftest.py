"""Folders to be damaged."""

import shutil
from pathlib import Path

import pytest
from qpipe.tests.support.folders import build, seal_scores


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of scores/ and targets/. Not to be changed."""
    root = tmp_path_factory.mktemp("hostile")
    build(seal_scores(root / "scores"), root / "targets")
    return root


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """Targets to be damaged."""
    return Path(shutil.copytree(made / "targets", tmp_path / "targets"))
