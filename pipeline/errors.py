"""The one error that is the user's to mend."""

import reprlib

_MOST_SAID = 300  # characters


class UserError(Exception):
    """Something the user can put right: the message names the thing, its value and the way out.

    The command line prints it as one line and exits with status 2. Any other exception is a defect
    of qpipe and keeps its traceback.
    """


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:_MOST_SAID] or type(error).__name__


def reason(error: BaseException) -> str:
    """What an error says of a row, at most 300 characters, which any file can hold."""
    said = str(error)[:_MOST_SAID] or type(error).__name__
    return said.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair, spelt out


def quoted(text: str) -> str:
    """A text from a file as an error may show it: cut, on one line, nothing that moves a cursor."""
    return repr(text[:80])


def shown(value: object) -> str:
    """Any value from a file as an error may show it: short, whatever lies within what."""
    return reprlib.repr(value)[:80]
