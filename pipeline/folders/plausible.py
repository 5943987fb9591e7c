"""What a manifest may say: every value of the kind that its readers take it for."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..format.packing import PRECISIONS
from ..format.records import Reject
from ..storage.json_files import is_number

MOST = 2**53  # of anything that is counted
_Rule = Callable[[Any], bool]


def check_identity(identity: Any) -> None:
    """Raises ValueError for an identity whose folder cannot be read."""
    if identity.stage not in _REQUIRED:
        known = " or ".join(_REQUIRED)
        raise ValueError(f"stage cannot be {_shown(identity.stage)}: it is {known}")
    check_maps(settings=identity.settings)
    for name in ("inputs", "schema"):
        if not _is_map(getattr(identity, name), _is_text):
            raise ValueError(f"{name} cannot be {_shown(getattr(identity, name))}")
    for name in _REQUIRED[identity.stage]:
        if name not in identity.settings:
            raise ValueError(f"setting {name} is missing")
    for name, value in identity.settings.items():
        if not _SETTINGS.get(name, _is_anything)(value):
            raise ValueError(f"setting {name} cannot be {_shown(value)}")
    if identity.settings.get("precision") is not None and "max_support" not in identity.settings:
        raise ValueError("setting max_support is missing")


def check_kinds(identity: Any) -> None:
    """Raises ValueError for what is no stage's identity, known or not."""
    if not _is_text(identity.stage):
        raise ValueError(f"stage cannot be {_shown(identity.stage)}")
    check_maps(settings=identity.settings, inputs=identity.inputs, schema=identity.schema)


def check_counts(counts: Any) -> None:
    """Raises ValueError for the counts of a plan that are none."""
    if not _is_map(counts, _or_none(_is_count)):
        raise ValueError(f"counts cannot be {_shown(counts)}")


def check_maps(**values: Any) -> None:
    """Raises ValueError for one that is no map."""
    for name, value in values.items():
        if not _is_map(value, _is_anything):
            raise ValueError(f"{name} cannot be {_shown(value)}")


def check_frequent_ids(ids: tuple[int, ...], vocab_size: int) -> None:
    """Raises ValueError for ranks that no packing has."""
    if len(set(ids)) < len(ids) or not all(0 <= each < vocab_size for each in ids):
        raise ValueError("frequent_ids holds an id twice, or one outside of the vocabulary")


def check_entry(entry: Any, file: str, fingerprint: str) -> None:
    """Raises ValueError for a shard that cannot be the folder's own, or counts that are none."""
    fixed = {"file": file, "fingerprint": fingerprint}
    for name, wanted in fixed.items():
        if getattr(entry, name) != wanted:
            raise ValueError(f"{file}: {name} cannot be {_shown(getattr(entry, name))}")
    for name, is_right in _ENTRY.items():
        if not is_right(getattr(entry, name)):
            raise ValueError(f"{file}: {name} cannot be {_shown(getattr(entry, name))}")


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _is_anything(_: Any) -> bool:
    return True


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _is_map(value: Any, is_right: _Rule) -> bool:
    return isinstance(value, Mapping) and all(is_right(each) for each in value.values())


def _is_reject(value: Any) -> bool:
    names = Reject.__dataclass_fields__.keys()
    is_whole = isinstance(value, Mapping) and value.keys() == names
    return is_whole and _is_count(value["line"]) and all(map(_is_text, _but(value, "line")))


def _but(value: Mapping[str, Any], left_out: str) -> Iterable[Any]:
    return (each for name, each in value.items() if name != left_out)


def _or_none(is_right: _Rule) -> _Rule:
    return lambda value: value is None or is_right(value)


_ENTRY: dict[str, _Rule] = {
    **dict.fromkeys(("rows", "tokens", "positions", "entries", "bytes"), _is_count),
    "sha256": lambda value: _is_text(value) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    "rejects": lambda value: isinstance(value, list) and all(map(_is_reject, value)),
    "sums": lambda value: _is_map(value, is_number),
}
_SETTINGS: dict[str, _Rule] = {
    "vocab_size": lambda value: _is_count(value) and 0 < value <= 2**31,
    "tokenizer_hash": _is_text,
    "top_k": _is_count,
    "max_length": _is_count,
    "method": _is_text,
    "form": _is_text,
    "parameters": lambda value: _is_map(value, lambda each: is_number(each) or _is_text(each)),
    "residual": _is_text,
    "tail_shape": lambda value: value in ("student", "uniform"),
    "top_p": _or_none(is_number),
    "max_support": _or_none(_is_count),
    "precision": lambda value: value in (None, *PRECISIONS),
    "temperature": is_number,
    "teacher_temperature": is_number,
}
_REQUIRED: dict[str, tuple[str, ...]] = {
    "score": ("vocab_size", "tokenizer_hash", "top_k"),
    "build-targets": (
        *("vocab_size", "tokenizer_hash", "method", "form", "parameters"),
        *("residual", "tail_shape", "top_p"),
    ),
    "mix": ("vocab_size", "tokenizer_hash", "residual", "tail_shape", "weights"),
}
