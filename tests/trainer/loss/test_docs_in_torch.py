"""The reader and the loss of docs/folders.md, which need nothing of this package."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qpipe.pipeline import read_targets
from qpipe.trainer.loss import sparse_cross_entropy
from torch.nn.utils.rnn import pad_sequence

PAGE = Path(__file__).parents[3] / "docs" / "folders.md"


@pytest.fixture(scope="module")
def code() -> dict[str, Any]:
    """What the code of the page defines; its last lines, the loop, are run by a test."""
    section = PAGE.read_text().partition("### In plain torch")[2]
    text = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    definitions, loop = text.split("\n\n\nfor row in")
    assert "qpipe" not in text
    names: dict[str, Any] = {"loop": f"for row in{loop}"}
    exec(definitions, names)
    return names


def test_the_reader_reads_what_this_package_does(code: dict[str, Any], targets: Path) -> None:
    rows = list(code["read"](targets))
    examples = list(read_targets(targets))
    assert len(rows) == len(examples) == 30
    for row, example in zip(rows, examples, strict=True):
        for name in ("input_ids", "positions", "counts", "trust", "weights"):
            np.testing.assert_array_equal(row[name].numpy(), getattr(example, name))
        assert row["ids"].tolist() == example.support_ids.tolist()
        np.testing.assert_allclose(row["probs"], example.support_probs, rtol=1e-4)
        np.testing.assert_allclose(row["tail"], example.tail_mass, rtol=1e-4)


def test_the_loss_is_this_packages(code: dict[str, Any], targets: Path) -> None:
    for number, row in enumerate(code["read"](targets)):
        make = torch.Generator().manual_seed(number)
        leaves = [4 * torch.randn(len(row["positions"]), 320, generator=make) for _ in range(2)]
        leaves[1] = leaves[0].clone()
        plain, fused = (each.requires_grad_() for each in leaves)
        loss = code["sparse_cross_entropy"](plain, row)
        loss.backward()
        padded = {
            name: pad_sequence(row[name].split(row["counts"].tolist()), True, fill)
            for name, fill in (("ids", -1), ("probs", 0))
        }
        wanted = sparse_cross_entropy(
            fused,
            torch.eye(320),
            row["input_ids"][row["positions"]].long(),
            padded["ids"],
            padded["probs"],
            row["tail"],
            row["trust"],
            row["weights"],
        )
        wanted.backward()
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain.grad, fused.grad, rtol=1e-4, atol=1e-6)


def test_the_loop_runs(code: dict[str, Any], targets: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    names = code | {"model": model, "read": lambda _: list(code["read"](targets))[:3]}
    exec(code["loop"], names)
    assert 0 < names["loss"].item() < 20
