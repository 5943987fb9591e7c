"""What is refused before a model is loaded."""

from pathlib import Path

from ..pipeline.errors import UserError
from ..pipeline.folders.manifest import Manifest
from .models import ModelFiles

SFT = "sft"


def settled_method(asked: str | None, folder: Path, manifest: Manifest) -> str:
    """The method to train by: the folder's own, or sft, for which any folder will do."""
    own = manifest.settings["method"]
    method = asked or own
    if method not in (SFT, own):
        raise UserError(
            f"{folder}: holds {own} targets: build targets for {method} first, with "
            f"`qpipe build-targets --method {method}` (only --method {SFT} trains on any folder)"
        )
    return method


def check_fit(folder: Path, manifest: Manifest, base: ModelFiles) -> None:
    """Refuse targets made for another tokenizer or vocabulary."""
    for name, ours in (("tokenizer_hash", base.tokenizer_hash), ("vocab_size", base.vocab_size)):
        theirs = manifest.settings[name]
        if theirs != ours:
            raise UserError(
                f"{folder}: made with {name.replace('_', ' ')} {theirs}, model "
                f"{base.name} has {ours}: train the model that was scored, or score again with "
                f"--model {base.origin}"
            )
