"""Checkpoints, damaged or forged: loaded as written, or refused; no code of theirs runs."""

import json
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from qpipe.pipeline.folders.manifest import Identity
from qpipe.pipeline.storage.json_files import sealed_bytes
from qpipe.trainer.run.checkpoint import Progress, damage_named, latest_checkpoint
from qpipe.trainer.run.tensor_files import TensorReader, file_name, own_tensors, write_tensors
from torch.distributed.checkpoint.state_dict_loader import load

from .inputs import Draw, damaged, fuzz, made_or_refused, spoilt

IDENTITY = Identity("train", {"method": "sft"}, {"targets": "0123"}, {})
STATE = {
    "model.w": torch.arange(12.0).reshape(4, 3),
    "optimizer.step": torch.tensor(7.0),
    "optimizer.moment": torch.arange(5).to(torch.bfloat16),
}


def written() -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        write_tensors(Path(file.name), STATE | {"process/cpu": torch.get_rng_state()})
        return Path(file.name).read_bytes()


WHOLE = written()
RECORD: dict[str, Any] = {
    "identity": {"stage": "train", "settings": {"method": "sft"}, "inputs": {"targets": "0123"},
                 "schema": {}, "format_version": IDENTITY.format_version},
    "progress": {"step": 2, "samples": 16, "tokens": 99, "seconds": 1.5, "before": None},
    "numbers": {"scaler.scale": 65536.0},
    "sha256": {file_name(0): "0" * 64},
}  # fmt: skip


class Trap:
    """A pickle that runs code when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code ran')",)


@st.composite
def tensor_files(draw: Draw) -> bytes:
    trap = st.just(pickle.dumps(Trap()))
    return draw(st.one_of(st.just(WHOLE), damaged(WHOLE), st.binary(), trap))


def loaded(path: Path) -> dict[str, torch.Tensor]:
    state = {name: torch.zeros_like(value) for name, value in STATE.items()}
    with damage_named(path), warnings.catch_warnings(action="ignore"):
        load(state, storage_reader=TensorReader([path]))
        own_tensors(path)
    return state


@fuzz(80, content=tensor_files())
def test_files_of_tensors(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file_name(0)
        path.write_bytes(content)
        found = made_or_refused(lambda: loaded(path))
    if content == WHOLE:
        assert found is not None
        assert all(torch.equal(found[name], value) for name, value in STATE.items())
    elif found is not None:  # its hash differs then: only a whole file is accepted
        assert all(found[name].shape == value.shape for name, value in STATE.items())


def written_record(record: dict[str, Any]) -> bytes:
    """A record with its seal; without one where it holds what qpipe does not write."""
    try:
        return sealed_bytes(record)
    except ValueError:  # NaN, or half a character
        return json.dumps(record).encode()


@fuzz(80, record=st.one_of(st.just(RECORD), spoilt(RECORD)), seals=st.booleans())
def test_records_of_progress(record: Any, seals: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoints" / "step-00000002"
        path.mkdir(parents=True)
        content = written_record(record if isinstance(record, dict) else {"": record})
        if not seals:
            content = content.replace(b'"seal": "', b'"seal": "0')
        (path / "progress.json").write_bytes(content)
        found = made_or_refused(lambda: latest_checkpoint(Path(folder), IDENTITY))
    if record == RECORD and seals:
        assert found == path
        assert Progress(**RECORD["progress"]).step == 2
    assert seals or found is None
