"""The target folders of a run: opened, checked against the model, and read as samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...pipeline.errors import UserError
from ...pipeline.folders.mixing import is_mix, read_mix
from ...pipeline.folders.sealed import SealedFolder, open_sealed
from ..data.mixture import mix
from ..data.steps import Samples
from ..data.stream import TargetStream, open_streams
from ..models.files import ModelFiles


@dataclass(frozen=True, slots=True)
class TargetFolders:
    """The target folders of a run, one or several, and the weights to mix them with.

    Without weights they are mixed in proportion to their sizes.
    """

    folders: list[SealedFolder]
    weights: tuple[float, ...]

    @property
    def named(self) -> dict[str, SealedFolder]:
        """The folders by their names among the inputs of the run: targets, targets-2, …"""
        return {f"targets-{n}" if n > 1 else "targets": each for n, each in enumerate(self, 1)}

    def __iter__(self) -> Iterator[SealedFolder]:
        return iter(self.folders)


def open_folders(paths: Sequence[Path], weights: tuple[float, ...]) -> TargetFolders:
    """The target folders at these paths; the parts of a mixture, with its weights, in its place.

    Raises UserError where a folder is not sealed, and for weights beside a mixture.
    """
    first, *others = paths
    if others or not is_mix(first):
        return TargetFolders([open_sealed(path, "build-targets") for path in paths], weights)
    if weights:
        raise UserError(
            f"--mixture-weights: {first} is a mixture with weights of its own: leave them out, or "
            "give the folders themselves"
        )
    parts = read_mix(first)
    return TargetFolders([part.folder for part in parts], tuple(part.weight for part in parts))


def check_fit(targets: TargetFolders, base: ModelFiles) -> None:
    """Raises UserError for targets made for another tokenizer or vocabulary."""
    ours = {"tokenizer_hash": base.tokenizer_hash, "vocab_size": base.vocab_size}
    for folder in targets:
        for name, value in ours.items():
            if folder.settings[name] != value:
                raise UserError(
                    f"{folder.path}: made with {name.replace('_', ' ')} {folder.settings[name]}, "
                    f"model {base.name} has {value}: train the model that was scored, or score "
                    f"again with --model {base.origin}"
                )


def open_samples(
    targets: TargetFolders, eval_fraction: float, verify: bool
) -> tuple[Samples, list[TargetStream]]:
    """The samples to train on, and the examples of each folder that are held out.

    Raises UserError where a folder has no example to train on, or an evaluation is asked for and no
    folder has an example for it.
    """
    train_streams, eval_streams = [], []
    for folder in targets:
        train_stream, eval_stream = open_streams(folder, eval_fraction, verify=verify)
        if not len(train_stream):
            raise UserError(
                f"--eval-fraction {eval_fraction} holds out all of the {len(eval_stream)} examples "
                f"of {folder.path}: give less"
                if len(eval_stream)
                else f"{folder.path}: has no supervised token to train on"
            )
        train_streams.append(train_stream)
        eval_streams.append(eval_stream)
    if eval_fraction > 0 and not any(map(len, eval_streams)):
        raise UserError(
            f"--eval-fraction {eval_fraction} holds out none of the "
            f"{sum(map(len, train_streams))} examples of "
            f"{', '.join(str(folder.path) for folder in targets)}: give more, or 0"
        )
    if len(train_streams) == 1:
        return train_streams[0], eval_streams
    return mix(train_streams, targets.weights), eval_streams
