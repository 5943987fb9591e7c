"""The house keeps its own rules: what is declared is there, and what is there is declared."""

import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
QPIPE = Path(sys.executable).with_name("qpipe")


def test_every_package_folder_is_declared() -> None:
    declared = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    folders = {
        ".".join(("qpipe", *init.parent.relative_to(ROOT).parts))
        for init in ROOT.rglob("__init__.py")
        if not {".venv", "build"} & set(init.relative_to(ROOT).parts)
    }
    assert declared == folders


def test_the_root_holds_no_stray_module() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]


def test_help_imports_no_library_but_click() -> None:
    """Keeps `qpipe --help` under 0.2 s, of which Python and click take most."""
    code = (
        "import sys; from pathlib import Path; from qpipe.stages.cli import cli\n"
        "for name in ('', *cli.commands):\n"
        "    cli.main([*name.split(), '--help'], standalone_mode=False)\n"
        "files = [getattr(each, '__file__', None) for each in sys.modules.values()]\n"
        "below = [Path(file).relative_to(sys.argv[1]).parts[0] for file in files"
        " if file and Path(file).is_relative_to(sys.argv[1])]\n"
        "print(*set(below), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, sysconfig.get_path("purelib")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    installing = {"_distutils_hack", "qpipe"}
    assert {
        name
        for name in done.stderr.split()
        if name not in installing and not name.startswith("__editable__")
    } == {"click"}


def test_readme_table_has_every_method_with_its_formulas() -> None:
    from qpipe.pipeline.methods.table import table

    readme = (ROOT / "README.md").read_text()
    rows = [
        f"| `{row['name']}` | {row['trust']} | {row['residual']} | {row['scale']} |"
        for row in table()
    ]
    assert [row for row in rows if row not in readme] == []


def test_every_link_between_pages_has_a_target() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    broken = []
    for page in pages:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            target = (page.parent / path).resolve() if path else page
            if not target.is_file() or (anchor and anchor not in _anchors(target)):
                broken.append(f"{page.name}: {path}#{anchor}")
    assert broken == []


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
