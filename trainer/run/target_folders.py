"""The target folders of a run: one, or several that are mixed."""

from collections.abc import Sequence
from dataclasses import replace

from ...pipeline.errors import UserError
from ...pipeline.folders.mixing import is_mix, live_method, read_mix, refuse_to_mix
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ..data.mixture import mix
from ..data.steps import Samples
from ..data.stream import TargetStream, open_streams
from ..loss.objective import Objective, objective_of, settled_method
from ..models.files import ModelFiles
from ..settings import TrainSettings


def check_fit(folder: SealedFolder, base: ModelFiles) -> None:
    """Refuse targets made for another tokenizer or vocabulary."""
    for name, ours in (("tokenizer_hash", base.tokenizer_hash), ("vocab_size", base.vocab_size)):
        theirs = folder.settings[name]
        if theirs != ours:
            raise UserError(
                f"{folder.path}: made with {name.replace('_', ' ')} {theirs}, model "
                f"{base.name} has {ours}: train the model that was scored, or score again with "
                f"--model {base.origin}"
            )


def expand_mixture(settings: TrainSettings) -> TrainSettings:
    """The settings with the parts and weights of a mixture in place of its folder."""
    (folder, *others) = settings.folders
    if others or not is_mix(folder):
        return settings
    if settings.mixture_weights:
        raise UserError(
            f"--mixture-weights: {folder} is a mixture with weights of its own: leave them out, or "
            "give the folders themselves"
        )
    parts = read_mix(folder)
    return replace(
        settings,
        targets=tuple(part.folder.path for part in parts),
        mixture_weights=tuple(part.weight for part in parts),
    )


def open_folders(settings: TrainSettings) -> dict[str, SealedFolder]:
    """The target folders by their names among the inputs of the run: targets, targets-2, ...

    Raises UserError where one is not sealed.
    """
    return {
        f"targets-{number}" if number > 1 else "targets": open_sealed(path, "build-targets")
        for number, path in enumerate(settings.folders, start=1)
    }


def check_and_resolve(
    settings: TrainSettings, folders: Sequence[SealedFolder], base: ModelFiles
) -> Objective:
    """What is minimised on all of the folders.

    Raises UserError where one does not fit the model, the asked method or the other folders.
    """
    for folder in folders:
        check_fit(folder, base)
    objectives = [_objective(settings, folder) for folder in folders]
    for folder, objective in zip(folders, objectives, strict=True):
        refuse_to_mix(folders[0].path, _traits(objectives[0]), folder.path, _traits(objective))
    return replace(objectives[0], tokens_alone=any(each.tokens_alone for each in objectives))


def open_samples(
    settings: TrainSettings, folders: Sequence[SealedFolder]
) -> tuple[Samples, list[TargetStream]]:
    """The samples to train on, and the examples of each folder that are held out.

    Raises UserError where a folder has nothing to train on, or none has anything to evaluate on
    where that is asked for.
    """
    opened = [
        open_streams(folder, settings.eval_fraction, verify=settings.verify) for folder in folders
    ]
    train_streams, eval_streams = (list(streams) for streams in zip(*opened, strict=True))
    for folder, (train_stream, eval_stream) in zip(folders, opened, strict=True):
        _refuse_empty(settings, folder, len(train_stream), len(eval_stream))
    if settings.eval_fraction > 0 and not any(map(len, eval_streams)):
        total = sum(map(len, train_streams))
        words = ", ".join(str(folder.path) for folder in folders)
        raise UserError(
            f"--eval-fraction {settings.eval_fraction} holds out none of the {total} examples of "
            f"{words}: give more, or 0"
        )
    if len(folders) == 1:
        return train_streams[0], eval_streams
    return mix(train_streams, settings.mixture_weights), eval_streams


def _objective(settings: TrainSettings, folder: SealedFolder) -> Objective:
    return objective_of(folder.settings, settled_method(settings.method, folder))


def _traits(objective: Objective) -> dict[str, object]:
    return {
        "live method": live_method(objective.choice),
        "residual": objective.residual,
        "tail shape": objective.tail_shape,
    }


def _refuse_empty(settings: TrainSettings, folder: SealedFolder, kept: int, held_out: int) -> None:
    if kept + held_out == 0:
        raise UserError(f"{folder.path}: has no supervised token to train on")
    if kept == 0:
        raise UserError(
            f"--eval-fraction {settings.eval_fraction} holds out all of the {held_out} examples of "
            f"{folder.path}: give less"
        )
