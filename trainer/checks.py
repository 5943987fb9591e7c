"""What is refused before a model is loaded."""

from pathlib import Path

from ..pipeline.errors import UserError
from ..pipeline.folders.manifest import Manifest
from .models.files import ModelFiles


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
