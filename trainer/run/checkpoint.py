"""Checkpoints: the state from which a run resumes as if it had not stopped.

A checkpoint is a folder `checkpoints/step-00000120` with the trained weights, the optimizer, the
loss scaler, each process' random state and the progress. The position in the data is a number of
samples, so a run may resume with another number of processes. A checkpoint is written under a
temporary name by all processes together and renamed when complete; then older ones are removed.

It holds tensors as safetensors (`tensor_files`), sharded as the model is, and `progress.json` with
the hashes of these files. Nothing in it is a pickle, so reading one never runs code.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ...pipeline.errors import UserError, one_line
from ...pipeline.folders.manifest import Identity, parse_identity
from ...pipeline.folders.shard_run import refuse_other
from ...pipeline.storage.files import (
    TEMPORARY,
    refuse_irregular,
    sha256_of_file,
    sync_folder,
    write_bytes,
)
from ...pipeline.storage.json_files import Number, read_sealed, sealed_bytes
from ..data.steps import Cadence
from ..step.distributed import true_on_any_rank
from ..step.evaluate import Evaluation
from ..step.step import Stepper
from .folder import CHECKPOINTS
from .tensor_files import TensorReader, TensorWriter, file_name, own_tensors

_PROGRESS = "progress.json"
_OF_OLD = ".metadata"  # a pickle: qpipe 0.1 wrote checkpoints with torch's own storage


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run; the sums are over the steps so far."""

    step: int = 0
    samples: int = 0  # taken from the stream
    tokens: int = 0  # supervised ones
    seconds: float = 0.0
    before: Evaluation | None = None  # before the first step

    def after(self, samples: int, tokens: int, seconds: float) -> "Progress":
        """The progress one step later."""
        return Progress(
            self.step + 1, samples, self.tokens + tokens, self.seconds + seconds, self.before
        )


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """The content of `progress.json`; `numbers` are those of the optimizer and the loss scaler."""

    identity: dict[str, Any]
    progress: Progress
    numbers: dict[str, Number]
    sha256: dict[
        Annotated[str, msgspec.Meta(pattern=r"\Aprocess-\d+\.safetensors\Z")],
        Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")],
    ]


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run folder, the latest last."""
    return sorted((folder / CHECKPOINTS).glob("step-*"))


def latest_checkpoint(folder: Path, identity: Identity) -> Path | None:
    """The checkpoint that a run resumes from, if there is one.

    Raises UserError where it is damaged or belongs to another run.
    """
    found = checkpoints_in(folder)
    if not found:
        return None
    if (found[-1] / _OF_OLD).exists():
        raise UserError(
            f"{found[-1]}: holds pickles of an earlier qpipe, which can run code when they are "
            f"read: remove {found[-1].parent} to start over, or finish the run with that qpipe"
        )
    record = _read(found[-1])
    refuse_other(folder, identity, parse_identity(found[-1] / _PROGRESS, record.identity))
    return found[-1]


def _read(path: Path) -> _Record:
    """The record of a checkpoint. Raises UserError if it is damaged or missing."""
    if not (path / _PROGRESS).exists():
        raise UserError(f"{path}: damaged: it has no {_PROGRESS}: {_way_out(path)}")
    return read_sealed(path / _PROGRESS, _Record, "record of a checkpoint", _way_out(path))


def _way_out(path: Path) -> str:
    return f"remove {path}, and the same command resumes from the one before"


@dataclass(slots=True, eq=False)
class Checkpoints:
    """The checkpoints of a run, of which the last `keep` stay; every process calls it."""

    folder: Path  # of the run
    identity: Identity
    stepper: Stepper
    keep: int
    cadence: Cadence
    saved: int = 0  # the step of the latest

    def load(self) -> Progress:
        """Restore the state of the latest checkpoint, if there is one; returns its progress.

        Raises UserError where it is damaged, cannot be read, or does not fit in memory.
        """
        path = latest_checkpoint(self.folder, self.identity)
        progress = Progress() if path is None else _load(path, self.stepper)
        self.saved = progress.step
        return progress

    def save_if_due(self, progress: Progress) -> None:
        """Save after a step of the cadence."""
        if self.cadence.is_due(progress.step):
            self.save(progress)

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, unless this step has one.

        Raises UserError where it cannot be written; earlier checkpoints then stay.
        """
        if progress.step == self.saved:
            return
        path = self.folder / CHECKPOINTS / f"step-{progress.step:08d}"
        temporary = path.with_name(f".{path.name}.tmp")
        accelerator = self.stepper.accelerator
        if accelerator.is_main_process:
            for leftover in path.parent.glob(TEMPORARY):  # of a killed run
                _remove(leftover)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        error = self._try_to_write(temporary, progress)
        failed = true_on_any_rank(error is not None, accelerator)
        if accelerator.is_main_process:
            if failed:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                _commit(temporary, path)
                for old in checkpoints_in(self.folder)[: -self.keep]:
                    _remove(old)
        accelerator.wait_for_everyone()
        if failed:
            _raise_unwritten(path, error)
        self.saved = progress.step

    def _try_to_write(self, folder: Path, progress: Progress) -> BaseException | None:
        """Write this process' part of a checkpoint; returns the error if it cannot be written."""
        accelerator = self.stepper.accelerator
        try:
            state = _state(self.stepper)
            writer = TensorWriter(folder, accelerator.process_index, _random_state())
            with _without_warnings():
                save(_tensors(state), storage_writer=writer)
            if accelerator.is_main_process:
                record = {
                    "identity": self.identity,
                    "progress": asdict(progress),
                    "numbers": _numbers(state),
                    "sha256": writer.sha256,
                }
                write_bytes(folder / _PROGRESS, sealed_bytes(record))
        except (OSError, RuntimeError, ValueError, UserError, CheckpointException) as failure:
            return failure  # a full disk comes as any of these
        return None


def _raise_unwritten(path: Path, error: BaseException | None) -> None:
    cause = _cause(error) if error else None
    if isinstance(cause, KeyboardInterrupt):  # Ctrl-C, which torch wraps as a failure
        raise cause
    reason = one_line(cause) if cause else "another process failed"
    raise UserError(
        f"{path}: cannot be written: {reason}: make room, then run the same command again"
    )


def _load(path: Path, stepper: Stepper) -> Progress:
    """Load a checkpoint into the model and the optimizer; returns its progress."""
    accelerator = stepper.accelerator
    record = _read(path)
    with damage_named(path):
        state = _state(stepper)
        _load_tensors(path, record.sha256, _tensors(state), accelerator)
        state = _with_numbers(state, record.numbers)
        set_state_dict(
            *_model_and_optimizer(stepper),
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_OPTIONS,
        )
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        _restore_random_state(path / file_name(accelerator.process_index))
    return record.progress


def _load_tensors(
    path: Path, sha256: Mapping[str, str], tensors: dict[str, Any], accelerator: Any
) -> None:
    """Load the tensors; meanwhile threads compare the hashes, each process those of some files."""
    names = sorted(sha256)
    mine = names[accelerator.process_index :: accelerator.num_processes]
    for name in names:
        refuse_irregular(path / name)
    with ThreadPoolExecutor() as pool:
        hashed = [pool.submit(sha256_of_file, path / name) for name in mine]
        with _without_warnings():
            load(tensors, storage_reader=TensorReader([path / name for name in names]))
        found = {name: each.result() for name, each in zip(mine, hashed, strict=True)}
    wrong = [name for name in mine if found[name] != sha256[name]]
    if true_on_any_rank(bool(wrong), accelerator):
        raise ValueError(f"{wrong[0] if wrong else 'a file'} has another hash than {_PROGRESS}")


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn the errors of a checkpoint that cannot be loaded into UserErrors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{path}: the device is out of memory: free some, then run the same command again"
        ) from error
    except _UNREADABLE as error:
        cause = _cause(error)
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise UserError(
                f"{path}: cannot be read: {one_line(cause)}: fix that, then run the same command "
                "again"
            ) from error
        raise UserError(f"{path}: damaged: {one_line(cause)}: {_way_out(path)}") from error


_UNREADABLE = (
    *(OSError, RuntimeError, KeyError, TypeError, ValueError),
    *(SafetensorError, CheckpointException),
)

# frozen weights are the base model's
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def _model_and_optimizer(stepper: Stepper) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model and the optimizer without accelerate's wrappers."""
    optimizer: Any = stepper.optimizer
    model = stepper.accelerator.unwrap_model(stepper.model)
    return model, getattr(optimizer, "optimizer", optimizer)


def _state(stepper: Stepper) -> dict[str, Any]:
    weights, moments = get_state_dict(*_model_and_optimizer(stepper), options=_OPTIONS)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    if stepper.accelerator.scaler is not None:
        state["scaler"] = stepper.accelerator.scaler.state_dict()
    return state


def _leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested dicts, named by their keys joined by dots."""
    if not isinstance(state, dict):
        yield name, state
        return
    for key, inner in state.items():
        yield from _leaves(inner, f"{name}.{key}" if name else key)


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in _leaves(state) if isinstance(leaf, torch.Tensor)}


def _numbers(state: dict[str, Any]) -> dict[str, float]:
    return {name: leaf for name, leaf in _leaves(state) if type(leaf) in (int, float)}


def _with_numbers(state: Any, numbers: Mapping[str, Any], name: str = "") -> Any:
    """A state with the numbers of a checkpoint. Raises KeyError if one is missing."""
    if isinstance(state, dict):
        return {
            key: _with_numbers(inner, numbers, f"{name}.{key}" if name else key)
            for key, inner in state.items()
        }
    return type(state)(numbers[name]) if type(state) in (int, float) else state


def _without_warnings() -> warnings.catch_warnings:
    """Hides the library's warning that a single process saves alone."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _cause(error: BaseException) -> BaseException:
    """The first cause of an error, without the library's wrapping: the system's error, if any."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    chain = [error]
    while (before := chain[-1].__context__) is not None:
        chain.append(before)
    return next((each for each in chain if isinstance(each, OSError)), error)


def _remove(folder: Path) -> None:
    """Remove a folder. Raises UserError that names it; the system names only a file in it."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be removed: {error.strerror}: see to its permissions, then run the "
            "same command again"
        ) from error


def _commit(temporary: Path, path: Path) -> None:
    """Rename a checkpoint to its final name; its files are synced already."""
    sync_folder(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    sync_folder(path.parent)


def _random_state() -> dict[str, torch.Tensor]:
    """The random state of this process, which dropout uses."""
    state = {"cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        state["device"] = torch.get_device_module().get_rng_state()
    return state


def _restore_random_state(path: Path) -> None:
    """Restore the random state; without a file, in a run of more processes, it stays as it is."""
    if not path.exists():
        return
    state = own_tensors(path)
    torch.set_rng_state(state["cpu"])
    if "device" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["device"])
