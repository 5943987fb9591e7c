"""Hashes and versions of the model, tokenizer and packages that a folder was made with."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..storage.files import sha256_of_file
from ..storage.json_files import sha256_of_json

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")


def weights_hash(folder: Path) -> str:
    """The SHA-256 of the names and contents of a model's weights and configuration."""
    files = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
    files |= set(folder.glob("config.json"))
    return sha256_of_json({path.name: _content_hash(path) for path in sorted(files)})


def tokenizer_hash(tokenizer: Any) -> str:
    """The SHA-256 of a fast tokenizer's vocabulary, merges, rules and special tokens.

    It does not change if the tokenizer is saved again, elsewhere or by another library version.
    Truncation and padding, which are settings of a call, are left out.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    return sha256_of_json(kept)


def package_versions(*names: str) -> dict[str, str]:
    """The versions of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _content_hash(path: Path) -> str:
    # a large file in the hub's cache is named by its SHA-256: no need to read it
    blob = path.resolve().name
    named_by_hash = len(blob) == 64 and set(blob) <= set("0123456789abcdef")
    return blob if path.is_symlink() and named_by_hash else sha256_of_file(path)
