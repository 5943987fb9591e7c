"""Checkpoints and models that were damaged or written by somebody else: refused, no code runs."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.stages.folders.verify import verify_run
from qpipe.trainer.run.checkpoint import checkpoints_in
from qpipe.trainer.run.tensor_files import TensorReader, write_tensors
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from ...support.commands import qpipe
from ...support.runs import killed_at


@pytest.fixture
def settings(settings: TrainSettings) -> TrainSettings:
    return replace(settings, batch_size=4, epochs=2, save_every=2)


class Trap:
    """Its pickle makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_checkpoint_holds_no_pickle(settings: TrainSettings) -> None:
    killed_at(settings, 3)
    (checkpoint,) = checkpoints_in(settings.out)
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {"progress.json", "process-0.safetensors"}
    json.loads((checkpoint / "progress.json").read_text())
    assert load_file(checkpoint / "process-0.safetensors").keys() > {"process/cpu"}


def test_the_pickles_of_an_old_checkpoint_are_refused_unread(
    settings: TrainSettings, tmp_path: Path
) -> None:
    killed_at(settings, 3)
    (checkpoint,) = checkpoints_in(settings.out)
    mark = tmp_path / "code-ran"
    for name in (".metadata", "random-0.pt"):
        (checkpoint / name).write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(UserError, match=r"step-00000002: holds pickles of an earlier qpipe.* rem"):
        train(settings)
    assert not mark.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert mark.exists()  # the trap works


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


HARMS: list[tuple[str, float | Callable[[Path], None]]] = [
    *(("process-0.safetensors", place) for place in (0, 0.01, 0.3, 0.6, 1)),
    ("process-0.safetensors", cut),
    ("process-0.safetensors", Path.unlink),
    ("progress.json", 0.5),
    ("progress.json", cut),
    ("progress.json", Path.unlink),
]


def test_a_changed_checkpoint_is_refused(settings: TrainSettings, tmp_path: Path) -> None:
    killed_at(settings, 5)
    last = checkpoints_in(settings.out)[-1]
    whole = shutil.copytree(last, tmp_path / "whole")
    for name, harm in HARMS:
        harm(last / name) if callable(harm) else flip(last / name, harm)
        with pytest.raises(UserError, match=r"-00000004.*: remove \S+-00000004, and the same com"):
            train(settings)
        shutil.rmtree(last)
        shutil.copytree(whole, last)
    shutil.rmtree(last)
    train(settings)


def test_an_edited_progress_is_refused(settings: TrainSettings) -> None:
    killed_at(settings, 3)
    progress = checkpoints_in(settings.out)[-1] / "progress.json"
    text = progress.read_text()
    assert '"samples": 8' in text
    progress.write_text(text.replace('"samples": 8', '"samples": 4'))
    with pytest.raises(UserError, match="its seal does not match its content"):
        train(settings)


def test_a_pipe_in_place_of_a_checkpoint_is_refused(settings: TrainSettings) -> None:
    killed_at(settings, 3)
    path = checkpoints_in(settings.out)[-1] / "process-0.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"process-0\.safetensors: cannot be read: not a file"):
        train(settings)


def test_every_byte_of_a_finished_model_is_verified(settings: TrainSettings) -> None:
    train(settings)
    assert qpipe("verify", settings.out).endswith(
        "every file of the model is as qpipe.json states\n"
    )
    model = settings.out / "model.safetensors"
    whole = model.read_bytes()
    for place in (0.0, 0.2, 0.7, 1.0):
        flip(model, place)
        assert list(verify_run(settings.out)) == [f"{model}: its hash is not that in qpipe.json"]
        assert "1 problem(s)" in qpipe("verify", settings.out, fails=True)
        model.write_bytes(whole)
    model.write_bytes(whole[:-1])
    (settings.out / "config.json").unlink()
    assert [each.split(": ")[1].split()[0] for each in verify_run(settings.out)] == [
        "missing",
        "has",
    ]


def test_an_edited_record_is_refused(settings: TrainSettings) -> None:
    train(settings)
    record = settings.out / "qpipe.json"
    record.write_text(record.read_text().replace('"epochs": 2', '"epochs": 3'))
    with pytest.raises(UserError, match=r"qpipe\.json: damaged or changed, its seal"):
        list(verify_run(settings.out))


def test_a_model_of_the_first_version_is_verified_by_its_sizes(settings: TrainSettings) -> None:
    train(settings)
    path = settings.out / "qpipe.json"
    record = json.loads(path.read_text())
    del record["seal"]
    record["files"] = {name: file["bytes"] for name, file in record["files"].items()}
    path.write_text(json.dumps(record))
    assert train(settings).was_done
    assert list(verify_run(settings.out)) == []


def test_parts_of_several_files_are_put_together(tmp_path: Path) -> None:
    """As after a run of two processes, one of which holds the last rows of a sharded tensor."""
    whole = torch.arange(15.0).reshape(5, 3).bfloat16()
    scalar = torch.tensor(7, dtype=torch.int64)
    paths = [tmp_path / "process-0.safetensors", tmp_path / "process-1.safetensors"]
    write_tensors(paths[0], {"w": whole[:2], "step": scalar, "none": torch.empty(0, 3)})
    write_tensors(paths[1], {"w@2.0": whole[2:]})
    state = {
        "w": torch.zeros(5, 3, dtype=torch.bfloat16),
        "step": torch.zeros((), dtype=torch.int64),
        "none": torch.empty(0, 3),
    }
    load(state, storage_reader=TensorReader(paths))
    assert torch.equal(state["w"], whole)
    assert state["step"] == 7
    assert torch.equal(load_file(paths[1])["w@2.0"], whole[2:])  # what the library reads
    with pytest.raises(CheckpointException, match="Size mismatch"):
        load(state, storage_reader=TensorReader(paths[:1]))


def test_a_header_of_any_number_of_tensors_is_refused_unread(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes two kilobytes of memory; what is written is what can be read."""
    killed_at(settings, 3)
    (checkpoint,) = checkpoints_in(settings.out)
    (path,) = checkpoint.glob("*.safetensors")
    size = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr("qpipe.trainer.run.tensor_files.MOST_HEADER", size - 1)
    wanted = rf"step-00000002: damaged: its header has {size:,} bytes, more than {size - 1:,}: rem"
    with pytest.raises(UserError, match=wanted):
        train(settings)
    shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="step-00000002: cannot be written: its header has"):
        train(settings)
    monkeypatch.setattr("qpipe.trainer.run.tensor_files.MOST_HEADER", size)
    assert train(settings).steps == 9
