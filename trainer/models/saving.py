"""Saves a student: as a model folder for transformers and vLLM, or as an adapter folder for peft.

The weights are first gathered on the CPU of the main process: the student on its devices stays as
it is, sharded or not, so it can be saved during training.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ...pipeline.errors import UserError, one_line
from .files import ModelFiles
from .heads import causal_model
from .student import Student

_ASIDE = ".model.tmp"
# of a vision-language model's images and videos
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def saved_dtype(base: ModelFiles) -> torch.dtype:
    """The type of the base's weights, in which the student's are saved."""
    return base.config.dtype or torch.float32


def save_model(student: Student, base: ModelFiles, folder: Path, is_main: bool) -> None:
    """Save the model, adapters merged, and the base's tokenizer to a folder.

    Every process calls it. transformers and vLLM load the folder.
    """
    dtype = saved_dtype(base)
    # adapters are merged in float32
    weights = _whole_weights(student, torch.float32 if student.has_adapter else dtype)
    if is_main:
        model = _cpu_copy(student.model, weights)
        if student.has_adapter:
            model = model.merge_and_unload()
        _save(model.to(dtype), base, folder)


def save_adapter(student: Student, base: ModelFiles, folder: Path, is_main: bool) -> None:
    """Save the adapter alone, in float32, and the base's tokenizer to a folder that peft loads."""
    weights = _whole_weights(student, torch.float32, trained_only=True)
    if not is_main:
        return
    config = student.model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.origin, base.revision
    with _aside(folder, last="adapter_config.json") as aside:
        student.model.save_pretrained(aside, state_dict=weights, save_embedding_layers=False)
        (aside / "README.md").unlink()  # a template without content
        base.tokenizer.save_pretrained(aside)


def _whole_weights(
    student: Student, dtype: torch.dtype, trained_only: bool = False
) -> dict[str, Tensor]:
    """A copy of the weights on the CPU of the main process; nothing on the others."""
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only
    )
    weights: dict[str, Any] = get_model_state_dict(student.model, options=options)
    return {name: value.to("cpu", dtype, copy=True) for name, value in weights.items()}


def _cpu_copy(model: Any, weights: dict[str, Tensor]) -> Any:
    """The same model with other weights and without its buffers: it can only be saved."""
    causal = causal_model(model)
    with torch.device("meta"):
        copy = type(causal)(deepcopy(causal.config))
        if causal is not model:
            from peft import get_peft_model

            copy = get_peft_model(copy, deepcopy(model.peft_config["default"]))
    copy.load_state_dict(weights, assign=True)
    causal_model(copy).tie_weights()
    return copy


def _save(model: Any, base: ModelFiles, folder: Path) -> None:
    """Written aside first; `config.json`, without which a model cannot be loaded, comes last."""
    from transformers import GenerationConfig

    generation = base.folder / "generation_config.json"
    if generation.exists():
        # the base's file is copied: saving one refuses settings that loading one accepts
        model.generation_config = GenerationConfig()
    with _aside(folder, last="config.json") as aside:
        model.save_pretrained(aside)
        base.tokenizer.save_pretrained(aside)
        for copied in (generation, *(base.folder / name for name in _PROCESSORS)):
            if copied.exists():
                shutil.copyfile(copied, aside / copied.name)


@contextmanager
def _aside(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder, whose files are synced and moved to `folder` at the end, `last` as last.

    If the block raises, nothing is moved. Raises UserError where the files cannot be written.
    """
    aside = folder / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        paths = sorted(aside.iterdir(), key=lambda path: path.name == last)
        mode = aside.stat().st_mode & 0o666  # as the umask has it; safetensors writes 0600
        for path in filter(Path.is_file, aside.rglob("*")):
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{folder}: the model cannot be written: {one_line(error)}: make room, then run the "
            "same command again"
        ) from error
    for path in paths:
        if path.is_dir():  # left by a run that was killed here; it would block the move
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    aside.rmdir()
