"""The card of a shared folder: what it is, what made it, how it is opened."""

import html
import re
from collections.abc import Iterator

import yaml

from ..pipeline.manifest import Manifest
from .lineage import described, generations


def card(manifest: Manifest, title: str, license_id: str | None) -> str:
    """A `README.md` with the front matter that the Hugging Face hub reads."""
    front = {"license": license_id or "other", "tags": ["qpipe", "soft-targets", "distillation"]}
    header = yaml.safe_dump(front, sort_keys=False).strip()
    lines = ["---", header, "---", "", f"# {plain(title)}", "", *_body(manifest)]
    return "\n".join(lines) + "\n"


def plain(words: str) -> str:
    """Words of others on one line of Markdown that show as they are, whatever they hold."""
    escaped = re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", " ".join(words.split()))
    return html.escape(escaped, quote=False)


def _body(manifest: Manifest) -> Iterator[str]:
    totals, stage = manifest.totals, manifest.identity.stage
    what = "Target distributions" if stage == "build-targets" else "Scores"
    made = plain(described(manifest.identity))
    yield f"{what} for supervised fine-tuning, made by qpipe: {made}."
    yield ""
    yield "| | |"
    yield "| --- | --- |"
    for name, value in _facts(manifest):
        yield f"| {name} | {plain(value)} |"
    yield ""
    yield "## How it was made"
    yield ""
    for depth, words in generations(manifest):
        yield f"{'  ' * depth}- {plain(words)}"
    yield ""
    yield "## Loading it"
    yield ""
    yield "```python"
    reader = "read_targets" if stage == "build-targets" else "read_scores"
    yield f"from qpipe.pipeline import {reader}"
    yield ""
    yield f'for example in {reader}("path or URL of this folder"):'
    yield "    print(example.id, example.input_ids, example.positions)"
    yield "```"
    yield ""
    yield f"`qpipe verify` checks every byte of it. {totals['bytes']:,} bytes of Arrow files."
    yield ""
    yield "The demonstrations and the models keep their own licences; mind both when passing it on."


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    totals, made_by = manifest.totals, manifest.provenance
    yield "demonstrations", f"{totals['rows']:,}"
    yield "tokens", f"{totals['tokens']:,}, {totals['positions']:,} of them supervised"
    yield "bytes a supervised token", f"{totals['bytes'] / max(1, totals['positions']):.1f}"
    yield "base model", _model(made_by)
    if "teacher" in made_by:
        yield "teacher", _model(made_by["teacher"])
    yield "vocabulary", f"{manifest.settings['vocab_size']:,} tokens"
    yield "tokenizer's hash", str(manifest.settings["tokenizer_hash"])
    yield "fingerprint", manifest.fingerprint


def _model(provenance: dict[str, object]) -> str:
    revision = provenance.get("revision")
    return f"{provenance['model']}" + (f" at {revision}" if revision else "")
