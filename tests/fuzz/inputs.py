"""What all fuzz tests share: how they are run, odd values, values spoilt, and what must come out.

A fuzz test is a hypothesis test of a module here. pytest runs each on a few inputs, always the
same; `run.py` on as many as there is time for, led by the code that they reach.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qpipe.pipeline.errors import UserError

Made = TypeVar("Made")
Draw = st.DrawFn
LONGEST_ERROR = 1500  # characters; a line that names a folder or two


def fuzz(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A fuzz test, of which pytest runs so many examples."""
    fixed = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: fixed(given(**strategies)(test))


def folder_until_exit() -> Path:
    """A folder for what many inputs start from, removed at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="qpipe-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def made_or_refused(make: Callable[[], Made]) -> Made | None:
    """What comes of an input: something, or a UserError of one line; None for that."""
    try:
        return make()
    except UserError as error:
        said = str(error)
        assert said, "an error says something"
        assert "\n" not in said, f"more than a line: {said!r}"
        assert len(said) < LONGEST_ERROR, f"no line to read: {said[:LONGEST_ERROR]}"
        said.encode()  # half a surrogate pair cannot be printed
    return None


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


ODD_TEXTS = (
    "",
    " ",
    "\n",
    "\0",
    "x",
    "1",
    "-1",
    "nan",
    "\ud800",
    "é",
    "e\u0301",
    "\u2028",
    "\x1b[2J",
)
ODD_NUMBERS = (0, -1, 1, 2, 255, 2**31 - 1, 2**31, -(2**31), 2**53, 2**63, 2**64, -(10**30))
ODD_FLOATS = (0.0, -0.0, 0.5, 1.5, -1e-45, 1e-45, 1e39, 1e308, float("inf"), float("nan"))

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(ODD_NUMBERS)
    | st.integers()
    | st.sampled_from(ODD_FLOATS)
    | st.floats()
    | st.sampled_from(ODD_TEXTS)
    | st.text(max_size=8)
)
odd_values = st.recursive(
    scalars | (st.sampled_from([100, 300, 700]) | st.integers(850, 990)).map(_nested),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@st.composite
def spoilt(draw: Draw, value: Any, odd: st.SearchStrategy[Any] = odd_values, most: int = 3) -> Any:
    """A JSON value, up to `most` of its parts changed: replaced, left out, doubled or swapped."""
    whole = [deepcopy(value)]
    for _ in range(draw(st.integers(0, most))):
        _spoil(draw, whole, odd)
    return whole[0]


def _spoil(draw: Draw, whole: list[Any], odd: st.SearchStrategy[Any]) -> None:
    place: Any = whole
    key: Any = 0
    while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 5)):
        place = place[key]
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    change = draw(st.sampled_from(["replace", "replace", "leave out", "double", "swap", "rename"]))
    if change == "rename" and isinstance(place, dict):
        place[draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=3))] = place.pop(key)
    elif change == "leave out" and place is not whole:
        del place[key]
    elif change == "double" and isinstance(place, list) and place is not whole:
        place.insert(key, place[key])
    elif change == "swap" and place is not whole:
        other = draw(
            st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))
        )
        place[key], place[other] = place[other], place[key]
    else:
        place[key] = draw(odd)


@st.composite
def damaged(draw: Draw, content: bytes, most: int = 4) -> bytes:
    """Bytes, up to `most` stretches of them changed, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        place = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from([1, 1, 1, 2, 4, 8, 64]))
        match draw(st.sampled_from(["flip", "write", "cut out", "double", "put in", "end"])):
            case "flip" if place < len(data):
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "cut out":
                del data[place : place + size]
            case "double":
                data[place:place] = data[place : place + size]
            case "put in":
                data[place:place] = draw(st.binary(max_size=8))
            case "end":
                del data[max(place, len(data) - 64) :]
            case _:
                data[place : place + size] = draw(st.binary(min_size=size, max_size=size))
    return bytes(data)
