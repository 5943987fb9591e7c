"""What is refused before a model is loaded."""

from ..pipeline.errors import UserError
from ..pipeline.manifest import Manifest
from .models import ModelFiles
from .settings import TrainSettings
from .stream import TargetStream

SFT = "sft"


def settled_method(settings: TrainSettings, manifest: Manifest) -> str:
    """The method to train by: the folder's own, or sft, for which any folder will do."""
    own = manifest.settings["method"]
    method = settings.method or own
    if method not in (SFT, own):
        raise UserError(
            f"{settings.targets}: holds {own} targets: build targets for {method} first, with "
            f"`qpipe build-targets --method {method}` (only --method {SFT} trains on any folder)"
        )
    return method


def check_fit(settings: TrainSettings, manifest: Manifest, base: ModelFiles) -> None:
    """Refuse targets made for another tokenizer or vocabulary."""
    for name, ours in (("tokenizer_hash", base.tokenizer_hash), ("vocab_size", base.vocab_size)):
        theirs = manifest.settings[name]
        if theirs != ours:
            raise UserError(
                f"{settings.targets}: made with {name.replace('_', ' ')} {theirs}, model "
                f"{base.name} has {ours}: train the model that was scored, or score again with "
                f"--model {settings.model}"
            )


def check_streams(
    settings: TrainSettings, train_stream: TargetStream, eval_stream: TargetStream
) -> None:
    """Refuse a folder that leaves nothing to train on, or nothing to evaluate on where asked to."""
    total = len(train_stream) + len(eval_stream)
    if total == 0:
        raise UserError(f"{settings.targets}: has no supervised token to train on")
    if len(train_stream) == 0:
        raise UserError(
            f"--eval-fraction {settings.eval_fraction} holds out all of the {total} examples of "
            f"{settings.targets}: give less"
        )
    if len(eval_stream) == 0 and settings.eval_fraction > 0:
        raise UserError(
            f"--eval-fraction {settings.eval_fraction} holds out none of the {total} examples of "
            f"{settings.targets}: give more, or 0"
        )
