"""`qpipe score --show N`: the first demonstrations as text, with what is supervised marked.

Rows are read and encoded as in scoring. Weights are neither fetched nor loaded.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from ...pipeline.errors import escaped
from ...pipeline.format.records import Reject, WeightedExample
from ...trainer.models.files import find_model
from ..demonstrations.columns import parse_columns
from ..demonstrations.formats import check_readable
from ..demonstrations.sources import open_sources
from .from_demonstrations import Demonstrations
from .settings import ScoreSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def show(settings: ScoreSettings, count: int) -> Iterator[str]:
    """Yield a text for each of the first `count` rows, and at last for those of them rejected."""
    rows = replace(settings.rows, strict=False, shard_size=count)
    sources = open_sources(rows.demonstrations)
    check_readable(sources, rows.format, parse_columns(rows.columns))
    model = find_model(settings.model, settings.revision, weights=False)
    shard = Demonstrations(rows, sources, model).read(0)
    if shard is not None:
        yield from (_example_text(each, model.tokenizer) for each in shard.examples)
        yield from map(_reject_text, shard.content.rejects)


def _example_text(example: WeightedExample, tokenizer: "PreTrainedTokenizerFast") -> str:
    counts = f"{len(example.input_ids):,} tokens, {len(example.positions):,} supervised"
    return f"{example.id}: {counts}\n{marked_text(example, tokenizer).rstrip()}\n"


def _reject_text(reject: Reject) -> str:
    return f"{reject.source}, line {reject.line}: rejected: {reject.reason}\n"


def marked_text(example: WeightedExample, tokenizer: "PreTrainedTokenizerFast") -> str:
    """The text with ⟦ and ⟧ about what is supervised, and its weight in front unless that is 1."""
    weights = dict(zip(example.positions.tolist(), example.token_weights.tolist(), strict=True))
    tokens = enumerate(example.input_ids.tolist())
    parts: list[str] = []
    for weight, run in groupby(tokens, lambda token: weights.get(token[0])):
        text = escaped(str(tokenizer.decode([token_id for _, token_id in run])))
        before = "" if weight in (None, 1) else f"{weight:g}: "
        parts.append(text if weight is None else f"⟦{before}{text}⟧")
    return "".join(parts)
