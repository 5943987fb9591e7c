"""The values of a JSON array, read in pieces: those of `json.loads`, whatever the pieces."""

import json
import random
from typing import Any

import pytest
from qpipe.stages.demonstrations.readers.json_array import array_values

VALUES: list[Any] = [1.5, -3, 0, True, None, 'a"\\\u00e9\n]', "ü😀" * 5, 10**20, 1e-300, [], {}]
NESTED = [*VALUES, [VALUES, {"a": VALUES}], {"ключ": {"]": ["[", {}]}}]


def read(content: bytes, size: int) -> list[Any]:
    return list(array_values(content[i : i + size] for i in range(0, len(content), size)))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 10**6])
def test_pieces_of_any_size(size: int, is_ascii: bool, indent: int | None) -> None:
    rng = random.Random(size)
    for count in range(20):
        values = rng.choices(NESTED, k=count)
        content = json.dumps(values, ensure_ascii=is_ascii, indent=indent).encode()
        assert read(b" " * count + content + b"\n" * count, size) == values


@pytest.mark.parametrize("size", [3, 10**6])
def test_an_array_that_is_cut_is_refused(size: int) -> None:
    content = json.dumps(NESTED, ensure_ascii=False).encode()
    for end in range(len(content)):
        with pytest.raises(ValueError, match=r"."):
            read(content[:end], size)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1,]", "value 2 of the array: Expecting value"),
        ("[1,,2]", "value 2 of the array: Expecting value"),
        ("[1 2]", "'2' where one of ,] should be, after 1 values"),
        ("[1]]", "more text after the end"),
        ("[1", "'the end' where one of ,] should be, after 1 values"),
        ('["\\q" ' + " " * 99, r"value 1 of the array: Invalid \\escape"),
        ('["a' + "b" * 99, "value 1 of the array: Unterminated string"),
    ],
)
def test_what_is_wrong_is_named(content: str, words: str) -> None:
    for size in (1, 10**6):
        with pytest.raises(ValueError, match=words):
            read(content.encode(), size)
