"""`qpipe build-targets`: score shards in, target shards out, one for one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import Identity, ShardEntry, identity_schema
from ...pipeline.folders.provenance import package_versions
from ...pipeline.folders.shard_run import Job, StageResult, folder_in
from ...pipeline.folders.shards import ShardContent
from ...pipeline.folders.tasks import TaskResult
from ...pipeline.folders.watch import Report
from ...pipeline.format.batches import FlatBatch, join
from ...pipeline.format.schema import TARGETS_VERSION, packing_of, schema_of
from ...pipeline.methods.definition import Choice
from ...pipeline.methods.table import choose
from ...pipeline.storage.json_files import sha256_of_json
from ...pipeline.targets.build import Evidence, Truncation, flat_targets, targets_of
from ...pipeline.targets.ceiling import ceiling_sums
from ...pipeline.targets.quantiles import OrderStatistics
from ...pipeline.threads import in_order
from ..execution.run import run_stage
from ..execution.settings import Execution
from .inputs import Inputs, open_inputs
from .settings import BuildSettings
from .teacher_by_column import TeacherByColumn


def build_targets(
    settings: BuildSettings, execution: Execution | None = None
) -> StageResult | TaskResult:
    """Make the target folder, or its missing shards."""
    inputs = _open_inputs(settings)
    lacking = inputs.lacking(settings.choice)
    if lacking is not None:
        needed, way_out = lacking
        raise UserError(f"{settings.choice.method.name} needs {needed}: {way_out}")
    (choice,) = with_statistics(inputs, [settings.choice])
    settings = replace(settings, choice=choice)
    return run_stage(BuildStage(settings, inputs, _job(settings, inputs)), execution)


def _open_inputs(settings: BuildSettings) -> Inputs:
    return open_inputs(
        settings.scores,
        settings.teacher,
        settings.temperature,
        settings.teacher_temperature,
        settings.pooling,
        settings.tokenizer,
        settings.by_column,
    )


class BuildStage:
    """The work of one `qpipe build-targets`; the method's parameters are settled."""

    gpus = 0

    def __init__(self, settings: BuildSettings, inputs: Inputs, job: Job) -> None:
        self.settings = settings
        self.truncation = Truncation(settings.top_p, settings.max_support)
        self.inputs = inputs
        self.job = job

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the method by its name, since its rules are functions."""
        settings = {each.name: getattr(self.settings, each.name) for each in fields(BuildSettings)}
        choice = settings.pop("choice")
        return _rebuilt, (settings, choice.method.name, choice.form, choice.parameters, self.job)

    @property
    def shard_count(self) -> int | None:
        return len(self.inputs.scores.shards)

    @property
    def demonstrations(self) -> int | None:
        return self.inputs.scores.manifest.totals["rows"]

    def start(self) -> None:
        """Nothing needs to be started."""

    def read(self, index: int) -> Iterator[list[Evidence]]:
        """The evidence of a shard, which is read while the targets are built."""
        return self.inputs.evidence(index)

    def make(self, evidence: Iterator[list[Evidence]], report: Report) -> ShardContent:
        """Build a shard's targets."""
        choice = self.settings.choice

        def build(pieces: list[Evidence]) -> list[tuple[FlatBatch, dict[str, float]]]:
            return [_build(evidence, choice, self.truncation) for evidence in pieces]

        content = ShardContent()
        for pieces in in_order(build, evidence):
            batch = join([batch for batch, _ in pieces])
            content.batches.append(batch)
            report(len(batch.ids), int(batch.lengths["position"].sum()))
            for _, sums in pieces:
                content.add_sums(**sums)
        return content

    def check(self, shards: Sequence[ShardEntry]) -> None:
        """Targets of sealed scores can always be sealed."""


def _rebuilt(
    settings: dict[str, Any], method: str, form: str, parameters: dict[str, Any], job: Job
) -> BuildStage:
    choice = replace(choose(method, form), parameters=parameters)
    built = BuildSettings(choice=choice, **settings)
    return BuildStage(built, _open_inputs(built), job)


def with_statistics(
    inputs: Inputs,
    choices: Sequence[Choice],
    leave_out: Callable[[Choice, str], None] | None = None,
) -> list[Choice]:
    """The choices with the parameters that are statistics of the data set, found in one pass.

    A choice whose parameter is then out of range is passed to `leave_out`, or raises UserError.
    """
    pairs = [(choice, OrderStatistics()) for choice in choices]
    wanted = [(c, numbers, c.unresolved) for c, numbers in pairs if c.unresolved]
    for evidence in inputs.all_evidence("statistics") if wanted else ():
        for choice, numbers, statistic in wanted:
            values = statistic.values
            numbers.add(values(evidence.signals(values.reads), choice.parameters))
    resolved = []
    for choice, numbers in pairs:
        try:
            resolved.append(_resolved(choice, numbers))
        except UserError as error:
            if leave_out is None:
                raise
            leave_out(choice, str(error))
    return resolved


def _resolved(choice: Choice, numbers: OrderStatistics) -> Choice:
    statistic = choice.unresolved
    if statistic is None:
        return choice
    places = statistic.places(numbers.count, choice.parameters)
    values = [numbers.at(place) for place in places]
    return choice.resolved(sum(values) / len(values) if values else statistic.otherwise)


def _job(settings: BuildSettings, inputs: Inputs) -> Job:
    choice = settings.choice
    is_cut = choice.stored in ("base", "teacher", "mixture", "contrast")
    folders = inputs.folders
    vocab_size = inputs.base_model.vocab_size
    frequent = inputs.frequent_ids(settings.top_p, settings.max_support) if is_cut else ()
    described = {
        "method": choice.method.name,
        "form": choice.form,
        "parameters": choice.parameters,
        "residual": choice.stored,
        "tail_shape": "uniform" if choice.stored == "uniform" else "student",
        # without effect on a residual that is the observed token alone
        "top_p": float(settings.top_p) if is_cut else None,
        "max_support": settings.max_support if is_cut else None,
        "precision": settings.precision if is_cut else "float32",
        "support_order": sha256_of_json(frequent),
        "temperature": settings.temperature,
        "teacher_temperature": settings.teacher_temperature,
        "vocab_size": vocab_size,
        "tokenizer_hash": inputs.scores.settings["tokenizer_hash"],
    }
    if inputs.pooling is not None:
        described |= {
            "teacher_weights": list(inputs.pooling.weights),
            "teacher_mean": inputs.pooling.mean,
        }
    if inputs.other_tokenizers:
        described["teacher_tokenizers"] = inputs.other_tokenizers
    if isinstance(inputs.teacher, TeacherByColumn):
        described |= inputs.teacher.described
    schema = schema_of(
        "build-targets", vocab_size, packing_of("build-targets", described, frequent)
    )
    provenance = inputs.scores.manifest.provenance | {
        "build_versions": package_versions("qpipe", "pyarrow")
    }
    provenance |= {
        name: folder.manifest.provenance for name, folder in folders.items() if name != "scores"
    }
    identity = Identity(
        stage="build-targets",
        settings=described,
        inputs={name: folder.manifest.fingerprint for name, folder in folders.items()},
        schema=identity_schema(schema),
        format_version=TARGETS_VERSION,
    )
    return Job(
        folder_in(settings.out, settings.in_store, identity),
        schema,
        identity,
        parents={name: folder.manifest.as_parent for name, folder in folders.items()},
        provenance=provenance,
    )


def _build(
    evidence: Evidence, choice: Choice, truncation: Truncation
) -> tuple[FlatBatch, dict[str, float]]:
    """The targets of some positions as they are stored, and their sums."""
    targets = targets_of(evidence, choice, truncation)
    sums = {
        "trust": float(targets.trust.sum()),
        "tail_mass": float(targets.residual.tail_mass.sum()),
        **bounds(evidence),
        **evidence.mapped_sums(),
        **ceiling_sums(evidence, choice, targets.residual),
    }
    return flat_targets(evidence, targets), sums


def bounds(evidence: Evidence) -> dict[str, float]:
    """The sums of the error bounds of the temperatures that are not 1."""
    sums = {}
    if evidence.base_model.temperature != 1:
        sums["temperature_bound"] = float(np.sum(evidence.base_and_bound[1]))
    if evidence.teacher_model is not None and evidence.teacher_model.temperature != 1:
        sums["teacher_temperature_bound"] = float(np.sum(evidence.teacher_and_bound[1]))
    return sums
