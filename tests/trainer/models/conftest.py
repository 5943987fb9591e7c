"""Examples that begin alike, for the tests of packed attention."""

from dataclasses import replace

import numpy as np
import pytest
from qpipe.pipeline.format.records import TargetExample

from ...support.runs import Examples


@pytest.fixture(params=[0, 1, 4])
def examples(request: pytest.FixtureRequest, make_examples: Examples) -> list[TargetExample]:
    """Seven examples that begin with so many tokens in common; none of these is supervised."""
    beginning = np.arange(10, 10 + request.param, dtype=np.int32)
    return [
        replace(
            each,
            input_ids=np.concatenate([beginning, each.input_ids]),
            positions=each.positions + np.int32(len(beginning)),
        )
        for each in make_examples(7)
    ]
