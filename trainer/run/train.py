"""The training run, from its settings to a saved model: set-up, `loop`, and the record."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import Identity
from ...pipeline.folders.provenance import package_versions
from ...pipeline.folders.shard_run import open_folder
from ...pipeline.signals import notes_termination
from ...pipeline.storage.locks import locked
from ..data.batch import Collator
from ..data.shares import shares_of
from ..data.steps import Cadence, HeldOut, Samples, StepLoader
from ..data.stream import TargetStream
from ..loss.course import Course, course_of
from ..loss.objective import common_objective
from ..models.adapters import Adapters, StoredAdapter, stored_adapter
from ..models.attention.packing import can_pack
from ..models.compiling import NOT_COMPILED, compile_layers
from ..models.files import MERGE, ModelFiles, find_model
from ..models.saving import save_adapter, save_model
from ..models.student import Student, load_student
from ..models.summary import summary
from ..settings import TrainSettings
from ..step.distributed import precision_of, reshard, start_accelerator
from ..step.step import NOT_FINITE, Stepper
from .checkpoint import Checkpoints, latest_checkpoint
from .evaluator import Evaluator
from .folder import finish, finished_run, remove_checkpoints, run_identity
from .loop import Run, TrainResult, result_from
from .target_folders import TargetFolders, check_fit, open_folders, open_samples


def train(settings: TrainSettings) -> TrainResult:
    """Fine-tune a model on a target folder; returns at once if that was done before.

    On SIGTERM it writes a checkpoint and raises Terminated, or finishes if the last step is taken.

    Raises UserError where the targets do not fit the model, the output folder holds something else,
    or the loss is not finite.
    """
    targets = open_folders(settings.folders, settings.mixture_weights)
    stored = stored_adapter(settings.model)
    adapters, base = _adapters(settings, stored), _find_base(settings, stored)
    check_fit(targets, base)
    objective = common_objective(targets.folders, settings.method)
    course = course_of(objective, settings.param_end)
    accelerator = start_accelerator(
        settings.precision, waits_long=settings.eval_command is not None
    )
    is_main = accelerator.is_main_process
    identity = run_identity(
        settings,
        {name: folder.manifest.fingerprint for name, folder in targets.named.items()}
        | {"model": base.weights_hash()}
        | ({"adapter": stored.hash()} if stored else {}),
        method=objective.choice.method.name,
        mixture_weights=list(shares_of(targets.weights)) or None,  # 6,2 is 3,1
        precision=precision_of(accelerator),
        **({"tokens_alone": True} if objective.tokens_alone else {}),
        **({"param_end": dict(course.ends)} if course.ends else {}),
        **({"lora_alpha": settings.lora_alpha} if settings.lora_alpha else {}),
        **({"lora_targets": sorted(settings.lora_targets)} if settings.lora_targets else {}),
    )
    record = finished_run(settings.out, identity)
    if record is not None:
        return result_from(settings.out, record["results"])
    samples, eval_streams = open_samples(targets, settings.eval_fraction, settings.verify)
    with locked(settings.out) if is_main else nullcontext():
        with accelerator.main_process_first():
            _make_ready(settings.out, identity, is_main)
        set_seed(settings.seed)  # new adapters are the same everywhere
        student = load_student(base, settings.gradient_checkpointing, adapters)
        set_seed(settings.seed, device_specific=True)  # dropout is not
        collate = Collator(settings.pack and can_pack(student.model), objective.tokens_alone)
        if is_main:
            _say_what_is_used(base, student, collate.packed, settings.pack)
        if settings.compile:
            compile_layers(student.model)
        elif is_main and accelerator.device.type == "cuda":
            print(NOT_COMPILED, file=sys.stderr)
        stepper = Stepper(accelerator, student, settings, objective)
        run = _run(settings, identity, base, stepper, samples, eval_streams, collate, course)
        if settings.resume == "never" and is_main:
            remove_checkpoints(settings.out)
        accelerator.wait_for_everyone()
        with notes_termination() as has_come:
            result = run.train(has_come)
            _check_head(base, student)
            save = save_adapter if settings.keep_adapter else save_model
            save(student, base, settings.out, is_main)
            if is_main:
                finish(settings.out, _record(run, targets, identity, result))
            accelerator.wait_for_everyone()
    return result


def _find_base(settings: TrainSettings, stored: StoredAdapter | None) -> ModelFiles:
    """The model, or that of the adapter which is trained further."""
    if stored is None:
        return find_model(settings.model, settings.revision)
    try:
        return find_model(stored.base, stored.revision)
    except UserError as error:
        raise UserError(f"model {settings.model}: the base of this adapter: {error}") from error


def _adapters(settings: TrainSettings, stored: StoredAdapter | None) -> Adapters | None:
    """The adapters to train. Raises UserError for options that a stored one contradicts."""
    rank, alpha, targets = settings.lora_rank, settings.lora_alpha, settings.lora_targets
    if stored is None:
        return None if rank is None else Adapters(rank, alpha, targets)
    if rank != stored.rank or alpha not in (None, stored.alpha) or targets:
        raise UserError(
            f"model {settings.model}: is an adapter of rank {stored.rank} and alpha "
            f"{stored.alpha:g}: give --lora-rank {stored.rank} alone to train it further; to train "
            f"something else, {MERGE}"
        )
    return Adapters(stored.rank, alpha, targets, stored.folder)


def _make_ready(out: Path, identity: Identity, is_main: bool) -> None:
    """Open the output folder. Raises UserError if it holds another run or something else."""
    latest_checkpoint(out, identity)
    open_folder(out, identity)
    if is_main:
        (out / NOT_FINITE).unlink(missing_ok=True)


def _say_what_is_used(
    base: ModelFiles, student: Student, is_packed: bool, wants_packing: bool
) -> None:
    """Print what the run uses of the model, and what will be lost of it."""
    print(f"model {base.name}: {summary(student, is_packed, wants_packing)}", file=sys.stderr)
    if student.lost_tensors:
        print(
            f"model {base.name}: {len(student.lost_tensors)} tensors of the checkpoint are not "
            f"part of the model that transformers loads, and will not be saved: "
            f"{student.lost_tensors[0]} among them",
            file=sys.stderr,
        )


def _check_head(base: ModelFiles, student: Student) -> None:
    """Raises UserError where the loss was not that of the model's own logits."""
    fits = student.keeps_head_form()
    reshard(student)
    if not fits:
        raise UserError(
            f"model {base.name}: its logits after training are not those of the output head that "
            f"the fused loss used ({student.head_form}), and it is not saved: train it by "
            "qpipe.trainer.integrations, which take the model's own logits"
        )


def _run(
    settings: TrainSettings,
    identity: Identity,
    base: ModelFiles,
    stepper: Stepper,
    samples: Samples,
    eval_streams: Sequence[TargetStream],
    collate: Collator,
    course: Course,
) -> Run:
    """Create the run from its parts."""
    accelerator, out = stepper.accelerator, settings.out
    ranks = accelerator.process_index, accelerator.num_processes
    cut = settings.batch_size, settings.step_tokens, settings.forward_tokens
    loader = StepLoader(samples, settings.seed, *cut, collate, *ranks)
    size = loader.size(settings.epochs, settings.max_steps)
    held_out = HeldOut(eval_streams, settings.forward_tokens, collate, *ranks)
    evaluation, saving = (
        Cadence(every, size.steps) for every in (settings.eval_every, settings.save_every)
    )
    evaluator = Evaluator(stepper, base, held_out, out, settings.eval_command, evaluation)
    checkpoints = Checkpoints(out, identity, stepper, settings.keep_checkpoints, saving)
    return Run(settings, size, stepper, loader, evaluator, checkpoints, course)


def _record(
    run: Run, targets: TargetFolders, identity: Identity, result: TrainResult
) -> dict[str, Any]:
    """The content of `qpipe.json`: the settings, what made the model, and the results."""
    accelerator, objective = run.stepper.accelerator, run.stepper.objective
    used = asdict(run.settings) | {
        "targets": [folder.path for folder in targets],
        "mixture_weights": targets.weights,
        "method": objective.choice.method.name,
        "pack": run.loader.collate.packed,
    }
    return {
        "identity": identity,
        "fingerprint": identity.fingerprint,
        "settings": json.loads(json.dumps(used, default=str)),
        "parents": {
            name: folder.manifest.as_parent | {"fingerprint": folder.manifest.fingerprint}
            for name, folder in targets.named.items()
        },
        "provenance": {
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
            "versions": package_versions("qpipe", "torch", "transformers", "accelerate"),
        },
        "results": asdict(result),
    }
