"""The training run, from its settings to a saved model."""

import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from ..pipeline.errors import UserError
from ..pipeline.manifest import Identity, Manifest, read_manifest
from ..pipeline.provenance import package_versions
from ..pipeline.runner import open_folder
from ..pipeline.storage import locked
from .checkpoint import remove_checkpoints
from .checks import check_fit, check_streams, settled_method
from .heads import keeps_apart
from .models import find_model
from .run import Run, TrainResult, result_from
from .run_folder import finish, finished_run, run_identity
from .settings import TrainSettings
from .step import NOT_FINITE, precision_of, start_accelerator
from .stream import open_streams
from .student import load_student, save_student, saved_dtype


def train(settings: TrainSettings) -> TrainResult:
    """Fine-tune a model on a target folder; returns at once where that was done before.

    Raises UserError where the targets do not fit the model, the output folder holds something else,
    or the loss stops being finite.
    """
    manifest = read_manifest(settings.targets, "build-targets")
    settings = replace(settings, method=settled_method(settings, manifest))
    base = find_model(settings.model, settings.revision)
    check_fit(settings, manifest, base)
    accelerator = start_accelerator(settings.precision)
    identity = run_identity(
        settings,
        inputs={"targets": manifest.fingerprint, "model": base.weights_hash()},
        precision=precision_of(accelerator),
    )
    record = finished_run(settings.out, identity)
    if record is not None:
        return result_from(record["results"])
    train_stream, eval_stream = open_streams(
        settings.targets, manifest, settings.eval_fraction, verify=settings.verify
    )
    check_streams(settings, train_stream, eval_stream)
    with locked(settings.out) if accelerator.is_main_process else nullcontext():
        with accelerator.main_process_first():
            _make_ready(settings, identity, accelerator.is_main_process)
        set_seed(settings.seed, device_specific=True)
        student = load_student(base, settings.gradient_checkpointing, settings.lora_rank)
        if settings.pack and not keeps_apart(student.model):
            raise UserError(
                f"--pack: model {base.name} mixes demonstrations that stand end to end: leave it "
                "out"
            )
        if student.head_form is None and accelerator.is_main_process:
            print(
                f"model {base.name}: the fused loss does not know its output head: the plain one "
                "runs, which takes more memory and time",
                file=sys.stderr,
            )
        run = Run(settings, identity, accelerator, student, train_stream, eval_stream)
        result = run.train(saved_dtype(base))
        if accelerator.is_main_process:
            save_student(student, base, settings.out)
            remove_checkpoints(settings.out)
            finish(settings.out, _record(settings, manifest, identity, accelerator, result))
        accelerator.wait_for_everyone()
    return result


def _make_ready(settings: TrainSettings, identity: Identity, is_main: bool) -> None:
    """Open the output folder, and forget what an earlier try left that is of no use now."""
    open_folder(settings.out, identity)
    if not is_main:
        return
    (settings.out / NOT_FINITE).unlink(missing_ok=True)
    if settings.resume == "never":
        remove_checkpoints(settings.out)


def _record(
    settings: TrainSettings,
    manifest: Manifest,
    identity: Identity,
    accelerator: Accelerator,
    result: TrainResult,
) -> dict[str, Any]:
    """What `qpipe.json` says: what was asked, what made the model, and how it went."""
    targets = {"identity": asdict(manifest.identity), "parents": manifest.parents}
    return {
        "identity": asdict(identity),
        "fingerprint": identity.fingerprint,
        "settings": asdict(settings) | {"targets": str(settings.targets), "out": str(settings.out)},
        "parents": {"targets": targets | {"fingerprint": manifest.fingerprint}},
        "provenance": {
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
            "versions": package_versions("qpipe", "torch", "transformers", "accelerate"),
        },
        "results": asdict(result),
    }
