"""The one error that is the user's to mend, and how values are shown in it."""

import reprlib

_MOST_SAID = 300  # characters


class UserError(Exception):
    """Something the user can put right: the message names the thing, its value and the way out.

    The command line prints it as one line and exits with status 2. Any other exception is a defect
    of qpipe and keeps its traceback.
    """


def option_of(name: str) -> str:
    """The option of a setting: "--top-k" of "top_k"."""
    return "--" + name.replace("_", "-")


def require(holds: bool, option: str, value: object, allowed: str) -> None:
    """Raises UserError for an option, such as "--top-k", whose value is out of range."""
    if not holds:
        said = f"{value:g}" if isinstance(value, float) else value
        raise UserError(f"{option} {said} is out of range: give {allowed}")


def require_utf8(what: str, name: str) -> None:
    """Raises UserError for a file's name that a manifest, which is UTF-8, cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} {quoted(name)}: its name is not UTF-8: rename it") from error


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:_MOST_SAID] or type(error).__name__


def reason(error: BaseException) -> str:
    """What an error says of a row, at most 300 characters, which any file can hold."""
    said = str(error)[:_MOST_SAID].encode("utf-8", "backslashreplace")  # half a pair, spelt out
    return said.decode()[:_MOST_SAID] or type(error).__name__


def quoted(text: str) -> str:
    """A text from a file as an error may show it: cut, on one line, nothing that moves a cursor."""
    return repr(text[:80])


def shown(value: object) -> str:
    """Any value from a file as an error may show it: short, whatever lies within what."""
    return reprlib.repr(value)[:80]
