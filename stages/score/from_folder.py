"""`qpipe score --at`: scores the examples of a score folder with another model of its tokenizer.

Shard i covers shard i of that folder. Each position holds this model's top k and, in addition, its
log-probabilities at the ids that the folder holds there, so that the two share a support.
"""

from typing import Any

from ...pipeline.errors import UserError
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ...pipeline.folders.shard_run import Job, StageResult
from ...pipeline.folders.tasks import TaskResult
from ...pipeline.format.batches import split
from ...pipeline.format.records import ScoredExample, WeightedExample
from ...trainer.models.files import ModelFiles, find_model
from ..engines.base import GivenIds
from ..execution.run import host_of_workers, run_stage
from ..execution.settings import Execution
from .in_context import ExamplesInContext
from .settings import ScoreSettings
from .stage import ScoreStage, ShardInput


def score_at(
    settings: ScoreSettings, execution: Execution | None = None
) -> StageResult | TaskResult:
    """Make the score folder of another folder's examples, or its missing shards."""
    return run_stage(stage_at(settings.on(host_of_workers(execution))), execution)


def stage_at(settings: ScoreSettings, job: Job | None = None) -> ScoreStage:
    """The stage of these settings; a worker passes the job of its driver."""
    at = settings.at
    assert at is not None
    folder = open_sealed(at, "score")
    model = find_model(settings.model, settings.revision)
    if job is None:
        _check_tokenizer(folder, model)
    if settings.context is not None:
        return ScoreStage(
            settings, ExamplesInContext(settings, folder, model, stage_at), model, job
        )
    if job is None:
        _check_examples(folder, model)
    return ScoreStage(settings, _FolderExamples(folder, model), model, job)


class _FolderExamples:
    """Reads the examples of a score folder with the ids stored at each position."""

    gathers = True

    def __init__(self, folder: SealedFolder, model: ModelFiles) -> None:
        self.folder = folder
        self.vocab_size = model.vocab_size
        # `_check_examples` refuses longer ones
        longest = folder.settings.get("max_length", model.max_length)  # imported scores have none
        self.max_length = min(longest, model.max_length)

    def settings(self) -> dict[str, Any]:
        """The settings of the other folder, above all how rows were read, without its engine's."""
        theirs = ("imported", "mass", "server_model", "head_dtype")
        own = self.folder.settings.items()
        return {name: value for name, value in own if name not in theirs}

    def inputs(self) -> dict[str, str]:
        return {"at": self.folder.manifest.fingerprint}

    def parents(self) -> dict[str, Any]:
        return {"at": self.folder.manifest.as_parent}

    def rebuild(self, settings: Any, job: Job) -> tuple[Any, ...]:
        return stage_at, (settings, job)

    @property
    def count(self) -> int | None:
        return self.folder.manifest.totals["rows"]

    @property
    def shard_count(self) -> int | None:
        return len(self.folder.shards)

    def read(self, index: int) -> ShardInput | None:
        at: list[GivenIds] = []
        shard = ShardInput(at=at)
        for batch in self.folder.batches(index):
            scored: ScoredExample
            for scored in split(self.folder.schema, batch):
                given = GivenIds(scored.counts, scored.topk_ids)
                of = scored.id, scored.input_ids, scored.positions, scored.token_weights
                shard.examples.append(WeightedExample(*of))
                # models pad their vocabularies differently: higher ids are not tokens
                at.append(given.below(self.vocab_size))
        return shard


def _check_tokenizer(folder: SealedFolder, model: ModelFiles) -> None:
    theirs, ours = folder.settings["tokenizer_hash"], model.tokenizer_hash
    if theirs != ours:
        raise UserError(
            f"{folder.path}: made with tokenizer hash {theirs}, model {model.name} has {ours}: "
            "give a model with the same tokenizer, or score the demonstrations without --at and "
            "build targets with --tokenizer"
        )


def _check_examples(folder: SealedFolder, model: ModelFiles) -> None:
    """Raise UserError for examples too long for the model, or with tokens outside its vocabulary.

    They are read for this only if the folder's own limits do not rule it out.
    """
    limit, vocab_size = model.max_length, model.vocab_size
    settings = folder.settings
    if settings.get("max_length", limit + 1) <= limit and settings["vocab_size"] <= vocab_size:
        return
    longest, largest = 0, 0
    for example in folder.records():
        longest = max(longest, len(example.input_ids))
        largest = max(largest, int(example.input_ids.max()))
    if longest > limit:
        raise UserError(
            f"{folder.path}: its longest example has {longest} tokens, model {model.name} takes "
            f"{limit}: score the demonstrations again with --max-length {limit}, or give "
            "another --model"
        )
    if largest >= vocab_size:
        raise UserError(
            f"{folder.path}: its examples hold token {largest}, the vocabulary of model "
            f"{model.name} has {vocab_size} tokens: give another --model"
        )
