"""Hashes of folders without versions, and the fingerprint of what their bytes depend on besides."""

import hashlib
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 16  # of a SHA-256, in hexadecimal digits, that is kept of each file


def hashes_of(folder: Path) -> dict[str, str]:
    """The hash of each file of a folder; JSON files without what depends on time or machine."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return {path.name: _digest(_content(path)) for path in files}


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    value = json.loads(content)
    if path.name == "manifest.json":
        del value["seal"]  # a hash over the versions too
    return json.dumps(_lasting(value), indent=1, ensure_ascii=False).encode()


def _lasting(value: Any) -> Any:
    """A JSON value without the versions of packages, its keys in the order of the file."""
    if isinstance(value, list):
        return [_lasting(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: _lasting(each) for name, each in value.items() if not name.endswith("_versions")}


def arithmetic(*packages: str) -> str:
    """A name for this machine's rounding and compression: versions, and a hash of functions."""
    versions = [f"{name} {version(name)}" for name in ("numpy", "pyarrow", *packages)]
    return ", ".join([*versions, f"functions {_digest(_function_values())}"])


def _function_values() -> bytes:
    grid = np.arange(1, 4097, dtype=np.float64) / 128
    values = [f"{sum([0.1] * 10)} {[math.log1p(each) + math.exp(-each) for each in grid]}".encode()]
    for x in (grid, grid.astype(np.float32)):
        functions = (np.exp(-x), np.expm1(-x), np.log(x), np.log1p(x), x**1.7, np.logaddexp(x, 1))
        sums = [function.sum() for function in functions]
        values += [np.asarray(each).tobytes() for each in (*functions, *sums)]
    return b"".join(values)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:LENGTH]
