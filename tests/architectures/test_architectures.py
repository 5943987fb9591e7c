"""Tiny models of every architecture: scores, gradients, saving, adapters.

`table` makes a table of the same examinations.
"""

from pathlib import Path

import pytest

from .examination import examine
from .zoo import model_types

# caps and windows; a window by the mask alone, experts; chunks; states; sinks
IN_SHORT = {"gemma2", "qwen2_moe", "llama4_text", "falcon_h1", "gpt_oss", "bert"}


@pytest.mark.parametrize(
    "model_type",
    [
        each if each in IN_SHORT else pytest.param(each, marks=pytest.mark.slow)
        for each in model_types()
    ],
)
def test_an_architecture_is_right_or_refused(model_type: str, tmp_path: Path) -> None:
    examine(model_type, tmp_path)
