"""Installs packages from a folder into another, without a network.

    python tests/gpu/install.py SITE FOLDER [FOLDER ...]

FOLDER holds wheels, *.tar.xz that are unpacked into SITE, and *.xz of single files, whose name says
where in SITE they belong: `vllm__C.so.xz` is `vllm/_C.so` (the first `_` stands for a folder). A
link SITE/qpipe leads to this repository. Then `PYTHONPATH=SITE python -m qpipe.stages` runs. A
wheel that is too large to carry, vLLM's above all, can travel as such archives of its files.
"""

import compileall
import lzma
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PIP = ("install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir")


def main(site: Path, folders: list[Path]) -> None:
    """Install, and compile the modules, which the first import would do one by one."""
    begun = time.perf_counter()
    site.mkdir(parents=True, exist_ok=True)
    files = [path for folder in folders for path in sorted(folder.iterdir())]
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(unpack, path, site) for path in files if path.suffix == ".xz"]
        install_wheels([path for path in files if path.suffix == ".whl"], site)
        for job in jobs:
            job.result()
    print(f"installed into {site} in {time.perf_counter() - begun:.0f} s", flush=True)
    compileall.compile_dir(f"{site}", quiet=2, workers=0)
    print(f"compiled after {time.perf_counter() - begun:.0f} s", flush=True)
    link = site / "qpipe"
    if not link.exists():
        link.symlink_to(ROOT)


def install_wheels(wheels: list[Path], site: Path) -> None:
    """Install wheels with pip."""
    if wheels:
        words = [*_PIP, "--upgrade", "--target", f"{site}", *map(str, wheels)]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)


def unpack(path: Path, site: Path) -> None:
    """Unpack an archive, or a file into its folder."""
    if path.name.endswith(".tar.xz"):
        with tarfile.open(path) as archive:
            archive.extractall(site, filter="data")
        return
    folder, _, name = path.stem.partition("_")
    target = site / folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 2**22)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), [Path(each).resolve() for each in sys.argv[2:]])
