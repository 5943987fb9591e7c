"""The parts of a checkpoint: the class that holds them all, and those that a class leaves out.

The text model of a vision-language checkpoint can be loaded alone, and would then be saved alone.
So the class is the one that the checkpoint names: its language part is trained, the rest is frozen
and saved as it is.
"""

import re
from typing import Any

from ...pipeline.errors import UserError
from .files import ModelFiles
from .heads import decoder_of
from .size import tensor_names

# buffers that old versions of transformers stored, which hold nothing learned
_BUFFERS = re.compile(r"inv_freq$|(attn|attention)\.(masked_)?bias$")


def freeze_other_parts(model: Any) -> None:
    """Train the language part of a vision-language model alone: its decoder and its output head."""
    if not is_composite(model.config):
        return
    trained = {*decoder_of(model).parameters(), *model.get_output_embeddings().parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)


def is_composite(config: Any) -> bool:
    """Whether a configuration has that of a language model as a part."""
    return config.get_text_config() is not config


def lost_tensors(files: ModelFiles, model: Any, unexpected: set[str]) -> list[str]:
    """The names of the checkpoint's tensors that the loaded model leaves out.

    `unexpected` are those that loading reported; it is silent about those that a class ignores.
    Raises UserError where they are whole parts of a vision-language or encoder-decoder model.
    """
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    own = model.state_dict().keys()
    ignored = {
        name
        for name in tensor_names(files)
        if name not in own and any(re.search(pattern, name) for pattern in patterns)
    }
    lost = sorted(name for name in unexpected | ignored if not _BUFFERS.search(name))
    kind = _kind_of_whole(files.config)
    if lost and kind:
        raise UserError(
            f"model {files.name}: is {kind} checkpoint, of which {type(model).__name__} holds a "
            f"part: {len(lost)} tensors would be lost, {lost[0]} among them: give its language "
            "model in a folder of its own"
        )
    return lost


def _kind_of_whole(config: Any) -> str | None:
    if is_composite(config):
        return "a vision-language"
    return "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else None
