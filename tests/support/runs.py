"""What tests of training runs share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from qpipe.pipeline.format.records import TargetExample
from transformers import AutoModelForCausalLM

Make = Callable[..., Path]
Examples = Callable[..., list[TargetExample]]


def folder_settings(method: str, form: str, residual: str, **parameters: float) -> dict[str, Any]:
    own = {"method": method, "form": form, "parameters": parameters}
    return own | {"residual": residual, "tail_shape": "student"}


ANCHORED = folder_settings("sft+kl", "frozen-target", "base", lam=0.1)
LIVE = {
    "dft": folder_settings("dft", "live", "observed"),
    "iw-sft": folder_settings("iw-sft", "live", "base-observed", T=1.0),
    "psft": folder_settings("psft", "live", "base-observed", eps_hi=0.28),
    "target-sft": folder_settings("target-sft", "live", "teacher", eta=0.5),
}


def read_log(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(left: Path, right: Path, **tolerance: float) -> None:
    torch.testing.assert_close(weights(left), weights(right), **tolerance)
