"""The exception for user errors, and helpers that format values in its messages."""

import re
import reprlib
import unicodedata
from functools import cache

_HARMLESS = "\n\t\u200c\u200d"  # line feed and tab; joiners, which some scripts need
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # invisible and control characters
_MOST_CHARACTERS = 300  # of another error's message


class UserError(Exception):
    """An error that the user can correct; the message names the thing, its value and the way out.

    The command line prints the message on one line and exits with status 2. Any other exception is
    a defect of qpipe and keeps its traceback. Secrets in web addresses are left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


def redacted(text: str) -> str:
    """Text without the passwords and queries of the web addresses in it, which may be secret."""
    text = re.sub(r"(\w://)[^\s/@]+@", r"\1…@", text)
    return re.sub(r"(https?://[^\s?'\"]+\?)[^\s'\"]+", r"\1…", text)


def option_of(name: str) -> str:
    """The option of a setting: "--top-k" for "top_k"."""
    return "--" + name.replace("_", "-")


def require(holds: bool, option: str, value: object, allowed: str) -> None:
    """Raise UserError for an option, such as "--top-k", unless its value is in range."""
    if not holds:
        number = f"{value:g}" if isinstance(value, float) else value
        raise UserError(f"{option} {number} is out of range: give {allowed}")


def require_utf8(what: str, name: str) -> None:
    """Raise UserError for a file name that a manifest, which is UTF-8, cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} {quoted(name)}: its name is not UTF-8: rename it") from error


def one_line(error: BaseException) -> str:
    """The message of an error on one line of at most 300 characters."""
    return " ".join(str(error).split())[:_MOST_CHARACTERS] or type(error).__name__


def escaped(text: str) -> str:
    """Text with control and invisible characters escaped, as in \\x1b.

    For whatever came from a file: it could control a terminal or a page.
    """
    return "".join(map(_shown, text))


def escaped_line(text: str) -> str:
    """As `escaped`, with line feeds and tabs as spaces."""
    return escaped(text.replace("\n", " ").replace("\t", " "))


@cache
def _shown(character: str) -> str:
    if character in _HARMLESS or unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if code < 0x100:
        return {"\r": "\\r"}.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def reason(error: BaseException) -> str:
    """The message of an error about a row, at most 300 characters; surrogates are escaped."""
    message = str(error)[:_MOST_CHARACTERS].encode("utf-8", "backslashreplace").decode()
    return message[:_MOST_CHARACTERS] or type(error).__name__


def quoted(text: str) -> str:
    """Text from a file for an error message: cut, on one line, control characters escaped."""
    return repr(text[:80])


def shown(value: object) -> str:
    """Any value from a file for an error message, cut at every level of nesting."""
    return reprlib.repr(value)[:80]
