"""The wheel and the sdist: what is in them, and that qpipe runs from the wheel alone."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import qpipe
from qpipe.pipeline.methods import METHODS
from qpipe.stages.cli import cli

ROOT = Path(__file__).parents[1]
FLOORS = "pipeline", "trainer", "stages"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, sys.argv[1])(sys.argv[2])
"""
IMPORT_ALL = """
import importlib, pkgutil, qpipe
names = [each.name for each in pkgutil.walk_packages(qpipe.__path__, "qpipe.")]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":  # only some modules for GPUs need it
            raise
print(qpipe.__file__, *names, sep="\\n")
"""


@dataclass(frozen=True)
class Built:
    """The two archives, and the names of the files in each, relative to the package."""

    wheel: Path
    sdist: Path

    def wheel_files(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return {name for name in archive.namelist() if ".dist-info/" not in name}

    def sdist_files(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {each.name.partition("/")[2] for each in archive.getmembers() if each.isfile()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist of the working tree, and the wheel built from that sdist, as `python -m build`."""
    folder = tmp_path_factory.mktemp("package")
    hidden = shutil.ignore_patterns(".*", "__pycache__", "build", "demo", "*.egg-info")
    shutil.copytree(ROOT, folder / "tree", ignore=hidden)
    sdist = _build("build_sdist", folder / "tree")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    return Built(_build("build_wheel", unpacked), sdist)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the wheel, and the dependencies of the present one.

    A .pth file adds those, but what the .pth files among them name is not added: so that qpipe's
    sources, which an editable install names in this way, cannot stand in for the wheel.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", home, "install", "--no-index", "--no-deps"]
    _run(*pip, built.wheel)
    return home / "bin"


def _build(hook: str, tree: Path) -> Path:
    out = tree.parent / hook
    out.mkdir()
    _run(sys.executable, "-c", BUILD, hook, out, folder=tree)
    [archive] = out.iterdir()
    return archive


def _run(*command: str | Path, folder: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def product_files() -> set[str]:
    """Every file of the package: its code, and the data that the code reads."""
    found = {
        str(path.relative_to(ROOT))
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return found | {"__init__.py"}


def test_the_wheel_holds_the_product_alone(built: Built) -> None:
    assert built.wheel_files() == {f"qpipe/{name}" for name in product_files()}


def test_the_sdist_holds_the_product_and_what_builds_it(built: Built) -> None:
    files = {name for name in built.sdist_files() if not name.startswith("qpipe.egg-info/")}
    building = {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "PKG-INFO", "setup.cfg"}
    assert files == product_files() | building


def test_both_carry_the_version(built: Built) -> None:
    assert built.wheel.name == f"qpipe-{qpipe.__version__}-py3-none-any.whl"
    assert built.sdist.name == f"qpipe-{qpipe.__version__}.tar.gz"


def test_the_changelog_begins_with_the_version() -> None:
    [newest, *_] = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest == qpipe.__version__


def test_the_commands_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    printed = _run(installed / "qpipe", "--help", folder=tmp_path)
    assert set(re.findall(r"^  (\S+) ", printed, re.MULTILINE)) >= set(cli.commands)
    printed = _run(installed / "qpipe", "methods", folder=tmp_path)
    assert set(re.findall(r"^(\S+) ", printed, re.MULTILINE)) >= set(METHODS)


def test_every_module_of_the_wheel_can_be_imported(installed: Path, tmp_path: Path) -> None:
    at, *names = _run(installed / "python", "-c", IMPORT_ALL, folder=tmp_path).split()
    assert Path(at).is_relative_to(installed.parent)
    modules = {name for name in product_files() if name.endswith(".py")} - {"__init__.py"}
    assert set(names) == {_module(name) for name in modules}


def _module(name: str) -> str:
    return "qpipe." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
