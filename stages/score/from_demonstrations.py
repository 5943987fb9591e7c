"""`qpipe score --demonstrations`: reads, encodes and scores demonstrations."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import MANIFEST, read_manifest
from ...pipeline.folders.shard_run import Job, StageResult, sidecar_indices
from ...pipeline.folders.shards import committed_shard
from ...pipeline.folders.tasks import TaskResult
from ...pipeline.format.records import Reject
from ...pipeline.progress import say_once
from ...pipeline.storage.json_files import sha256_of_json
from ...pipeline.threads import in_order
from ...trainer.models.files import ModelFiles, find_model
from ..demonstrations.columns import parse_columns
from ..demonstrations.formats import check_readable, parse_row
from ..demonstrations.sources import Facts, RowReader, Source, open_sources
from ..encoding.encoder import Encoded, Encoder
from ..encoding.template import load_template, load_tools_template, template_date
from ..execution.run import host_of_workers, run_stage
from ..execution.settings import Execution
from .settings import RowSettings, ScoreSettings
from .stage import ScoreStage, ShardInput

DEFAULT_MAX_LENGTH = 4096
_NEVER_ENDS = (
    "Warning: the chat template writes no token that ends an answer, so a model does not learn to "
    "stop: give a template that ends each with one (--template FILE, or none)"
)


def score(settings: ScoreSettings, execution: Execution | None = None) -> StageResult | TaskResult:
    """Make the score folder of demonstrations, or its missing shards."""
    stage = _stage(settings.on(host_of_workers(execution)))
    if settings.rows.strict:
        _refuse_rejects(stage.job)
    return run_stage(stage, execution)


def _refuse_rejects(job: Job) -> None:
    """Apply --strict to shards that were made without it."""
    folder, fingerprint = job.folder, job.identity.fingerprint
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        entries = manifest.shards if manifest.fingerprint == fingerprint else ()
    else:
        there = partial(committed_shard, folder, fingerprint=fingerprint, verify=False)
        entries = in_order(there, sidecar_indices(folder))
    for entry in entries:
        if entry is not None and entry.rejects:
            raise unusable(entry.rejects[0])


def _stage(
    settings: ScoreSettings, job: Job | None = None, facts: Sequence[Facts] | None = None
) -> ScoreStage:
    """The stage of these settings; a worker passes the job and the facts of its driver."""
    rows = settings.rows
    sources = open_sources(rows.demonstrations)
    if facts is None:
        check_readable(sources, rows.format, parse_columns(rows.columns))
    else:
        sources = [replace(one, known=known) for one, known in zip(sources, facts, strict=True)]
    model = find_model(
        settings.model, settings.revision, weights=settings.engine.engine != "server"
    )
    folder = None if settings.in_store else settings.out
    demonstrations = Demonstrations(rows, sources, model, folder)
    day = demonstrations.encoder.day
    if settings.in_store and day is not None and rows.date is None:
        raise UserError(
            "--store: the template writes today's date, and the name of the folder depends on it: "
            f"give a date, as in --date {day.isoformat()}"
        )
    return ScoreStage(settings, demonstrations, model, job)


class Demonstrations:
    """Reads rows of demonstrations and encodes them as examples."""

    gathers = False

    def __init__(
        self,
        options: RowSettings,
        sources: list[Source],
        model: ModelFiles,
        folder: Path | None = None,
    ) -> None:
        """`folder` is the output folder, whose plan may hold a date for the template."""
        self.options = options
        self.rows = RowReader(sources)
        self.columns = parse_columns(options.columns)
        self.max_length = _max_length(options, model)
        template = load_template(options.template, model.tokenizer)
        tools_template = load_tools_template(options.template, model.tokenizer)
        self.encoder = Encoder(
            model.tokenizer,
            template,
            supervise=options.supervise,
            max_length=self.max_length,
            too_long=options.too_long,
            vocab_size=model.vocab_size,
            day=template_date(f"{template}{tools_template}", options.date, folder),
            tools_template=tools_template,
        )

    def settings(self) -> dict[str, Any]:
        template, day = self.encoder.template, self.encoder.day
        special_tokens = self.encoder.special_tokens
        extra = {"special_tokens": special_tokens} if special_tokens else {}
        for_tools = self.encoder.tools_template
        extra |= {} if for_tools is None else {"tools_template_hash": sha256_of_json(for_tools)}
        extra |= {} if day is None else {"date": day.isoformat()}
        extra |= {"columns": self.columns} if self.columns else {}
        return extra | {
            "max_length": self.max_length,
            "too_long": self.options.too_long,
            "format": self.options.format,
            "template_hash": None if template is None else sha256_of_json(template),
            "supervise": self.options.supervise,
            "shard_size": self.options.shard_size,
        }

    def inputs(self) -> dict[str, str]:
        return {source.name: source.facts.fingerprint for source in self.rows.sources}

    def parents(self) -> dict[str, Any]:
        return {}

    def rebuild(self, settings: Any, job: Job) -> tuple[Any, ...]:
        facts = [source.facts for source in self.rows.sources]
        return _stage, (self.dated(settings), job, facts)

    def dated(self, settings: ScoreSettings) -> ScoreSettings:
        """The settings with the date that the template writes here."""
        day = self.encoder.day
        rows = replace(settings.rows, date=None if day is None else day.isoformat())
        return replace(settings, rows=rows)

    @property
    def count(self) -> int | None:
        return self.rows.count

    @property
    def shard_count(self) -> int | None:
        rows = self.rows.count
        return None if rows is None else -(-rows // self.options.shard_size)

    def read(self, index: int) -> ShardInput | None:
        size = self.options.shard_size
        shard = ShardInput()
        rows = (
            parse_row(source, line, raw, self.options.format, self.columns)
            for source, line, raw in self.rows.read(index * size, (index + 1) * size)
        )
        for encoded in self.encoder.encode_all(rows):
            if isinstance(encoded, Encoded):
                shard.examples.append(encoded.example)
                shard.content.add_sums(cut=encoded.cut)
                if encoded.empty:
                    shard.content.add_sums(empty_answers=encoded.empty)
                if encoded.masked:
                    shard.content.add_sums(masked=encoded.masked)
                for field in sorted(encoded.unread):
                    say_once(
                        f"Warning: the chat template does not read {field}: what it holds is not "
                        "in the scores"
                    )
                if encoded.never_ends:
                    say_once(_NEVER_ENDS)
            elif self.options.strict:
                raise unusable(encoded)
            else:
                shard.content.rejects.append(encoded)
        return shard if shard.examples or shard.content.rejects else None


def _max_length(settings: RowSettings, model: ModelFiles) -> int:
    if settings.max_length is None:
        return min(model.max_length, DEFAULT_MAX_LENGTH)
    if settings.max_length > model.max_length:
        raise UserError(
            f"--max-length {settings.max_length} is above the {model.max_length} tokens that model "
            f"{model.name} takes: give {model.max_length} or less"
        )
    return settings.max_length


def unusable(reject: Reject) -> UserError:
    """The error of --strict."""
    return UserError(
        f"{reject.source}, line {reject.line}: {reject.reason}: correct it, or leave --strict out"
    )
