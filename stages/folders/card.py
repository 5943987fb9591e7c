"""The data set card of a shared folder: its content, its origin, and how to load it."""

import html
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ...pipeline.folders.manifest import Manifest
from .lineage import described, generations


def card(manifest: Manifest, title: str, license_id: str | None) -> str:
    """The text of a `README.md` with the front matter that the Hugging Face hub reads."""
    front = {
        "license": license_id or "other",
        "tags": ["qpipe", "soft-targets", "distillation"],
        # otherwise `datasets` would read the sidecars as data
        "configs": [{"config_name": "default", "data_files": "shard-*.arrow"}],
    }
    header = yaml.safe_dump(front, sort_keys=False).strip()
    lines = ["---", header, "---", "", f"# {plain(title)}", "", *_body(manifest)]
    return "\n".join(lines) + "\n"


def plain(words: str) -> str:
    """Untrusted text, escaped so that Markdown shows it unchanged on one line."""
    escaped = re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", " ".join(words.split()))
    return html.escape(escaped, quote=False)


def _body(manifest: Manifest) -> Iterator[str]:
    is_targets = manifest.identity.stage == "build-targets"
    what = "Target distributions" if is_targets else "Scores"
    made = plain(described(manifest.identity))
    yield f"{what} for supervised fine-tuning, made by qpipe: {made}."
    yield from ("", "| | |", "| --- | --- |")
    for name, value in _facts(manifest):
        yield f"| {name} | {plain(value)} |"
    yield from ("", "## How it was made", "")
    for depth, words in generations(manifest):
        yield f"{'  ' * depth}- {plain(words)}"
    yield ""
    yield from _LOADING.format(reader="read_targets" if is_targets else "read_scores").splitlines()
    yield ""
    yield f"`qpipe verify` checks every byte of it: {manifest.totals['bytes']:,} in Arrow files."
    yield ""
    yield "The demonstrations and the models keep their own licences; mind both when passing it on."


_LOADING = """\
## Loading it

```python
from qpipe.pipeline import {reader}

for example in {reader}("path or URL of this folder"):
    print(example.id, example.input_ids, example.positions)
```

As a data set, its rows decoded as they are read:

```python
from datasets import load_dataset
from qpipe.pipeline import decoder

rows = load_dataset("path of this folder, or its name on the hub", split="train")
rows = rows.with_transform(decoder("path or URL of this folder"))
```"""


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    totals, made_by = manifest.totals, manifest.provenance
    sums, positions = totals["sums"], max(1, totals["positions"])
    yield "demonstrations", f"{totals['rows']:,}"
    yield "tokens", f"{totals['tokens']:,}, {totals['positions']:,} of them supervised"
    yield "bytes a supervised token", f"{totals['bytes'] / positions:.1f}"
    yield "entries a supervised token", f"{totals['entries'] / positions:.1f}"
    for name, of in (("tail_mass", "probability outside the entries"), ("trust", "trust")):
        if name in sums:
            yield f"mean {of}", f"{sums[name] / positions:.4f}"
    yield "base model", _model(made_by)
    for name in made_by:
        if name.startswith("teacher"):
            yield name.replace("-", " "), _model(made_by[name])
    yield "vocabulary", f"{manifest.settings['vocab_size']:,} tokens"
    yield "tokenizer's hash", str(manifest.settings["tokenizer_hash"])
    yield "fingerprint", manifest.fingerprint


def _model(provenance: Any) -> str:
    if not isinstance(provenance, Mapping) or "model" not in provenance:
        return "not known"
    revision = provenance.get("revision")
    return f"{provenance['model']}" + (f" at {revision}" if revision else "")
