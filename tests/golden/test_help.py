"""The help of every command is, byte for byte, the one that was pinned."""

import pytest
from qpipe.tests.golden.helps import helps, pinned


def test_each_command_has_a_file_and_each_file_a_command() -> None:
    assert sorted(helps()) == sorted(pinned())


@pytest.mark.parametrize("name", sorted(helps()))
def test_the_help_is_the_one_that_was_pinned(name: str) -> None:
    assert helps()[name] == pinned().get(name), "if meant: python -m qpipe.tests.golden --write"


def test_the_terminal_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = helps()
    monkeypatch.setenv("COLUMNS", "40")
    assert helps() == before
