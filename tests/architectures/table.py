"""Examines every architecture and writes the table in docs/training.md.

    python -m qpipe.tests.architectures.table

takes some minutes; without arguments it examines all, with names only these, and then writes
nothing.
"""

import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils import logging

from .examination import Findings, examine
from .zoo import model_types

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BEGIN, END = "<!-- architectures: begin -->\n", "<!-- architectures: end -->\n"


def main(names: list[str]) -> None:
    """Examine these architectures, or all, and write the table if none fails."""
    logging.set_verbosity_error()
    found: list[Findings] = []
    failed: list[str] = []
    for name in names or model_types():
        try:
            with TemporaryDirectory() as folder:
                found.append(examine(name, Path(folder)))
            print(name, found[-1], flush=True)
        except Exception as error:  # each is reported
            failed.append(name)
            print(name, "FAILED", type(error).__name__, str(error)[:300], flush=True)
    print(len(found), "examined;", len(failed), "failed:", *failed)
    if not names and not failed:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + table(found) + "\n" + END + rest.partition(END)[2])


def table(found: list[Findings]) -> str:
    """A row for each combination of what is supported, with the names of the architectures."""
    from vllm import ModelRegistry

    in_vllm = ModelRegistry.get_supported_archs()
    groups: dict[tuple[bool, ...], list[str]] = defaultdict(list)
    for each in found:
        if each.refused is None:
            key = each.packed, each.fused, True, each.architecture in in_vllm
            groups[key].append(_short(each.architecture))
    lines = ["| packed | fused loss | LoRA | in vLLM | architectures |", "| --- " * 5 + "|"]
    for key in sorted(groups, reverse=True):
        marks = " | ".join("yes" if each else "no" for each in key)
        lines.append(f"| {marks} | {', '.join(sorted(set(groups[key]), key=str.lower))} |")
    refused = sorted({_short(each.architecture) for each in found if each.refused})
    lines.append(f"| refused | | | | {', '.join(refused)} (not causal) |")
    return "\n".join(lines) + "\n"


def _short(architecture: str) -> str:
    return architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")


if __name__ == "__main__":
    main(sys.argv[1:])
