"""The message of a choice that is refused."""

from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.methods.table import choose


def refusal(*arguments: Any, **keywords: Any) -> str:
    """What choose says, which must be one line."""
    with pytest.raises(UserError) as refused:
        choose(*arguments, **keywords)
    message = str(refused.value)
    assert message
    assert message == message.strip()
    assert len(message.splitlines()) == 1
    return message
