"""The house keeps its own rules: what is declared is there, and what is there is declared."""

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
FLOORS = ("pipeline", "trainer", "stages")
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PATCHES = {"setattr", "delattr", "object", "patch"}


def test_every_package_folder_is_declared() -> None:
    declared = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    folders = {
        ".".join(("qpipe", *init.parent.relative_to(ROOT).parts))
        for init in ROOT.rglob("__init__.py")
        if not {".venv", ".cache", "build"} & set(init.relative_to(ROOT).parts)
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
    from qpipe.pipeline.methods.words import table

    readme = (ROOT / "README.md").read_text()
    rows = [
        f"| `{row['name']}` | {row['trust']} | {row['residual']} | {row['scale']} |"
        for row in table()
    ]
    assert [row for row in rows if row not in readme] == []
    assert readme.count(f"{len(rows)} methods") == 2


def test_every_link_between_pages_has_a_target() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    broken = []
    for page in pages:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            target = (page.parent / path).resolve() if path else page
            if not target.is_file() or (anchor and anchor not in _anchors(target)):
                broken.append(f"{page.name}: {path}#{anchor}")
    assert broken == []


def test_every_row_of_the_security_page_names_tests_that_are_there() -> None:
    lines = (ROOT / "docs" / "security.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    named = [re.findall(r"`([\w/]+\.py)`", row.rpartition(" | ")[2]) for row in rows]
    assert len(rows) > 15
    assert [row for row, tests in zip(rows, named, strict=True) if not tests] == []
    assert [name for tests in named for name in tests if not (ROOT / "tests" / name).exists()] == []


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_a_folder_has_at_most_ten_files() -> None:
    """But for the commands, a file each."""
    rooms = {path.parent for path in FILES} - {ROOT / "stages" / "commands"}
    counts = {short(room): len([*room.glob("*.py")]) - 1 for room in rooms}
    assert {room: count for room, count in counts.items() if count > 10} == {}


def test_a_room_says_in_three_to_ten_lines_what_it_is_for() -> None:
    docs = {short(path): ast.get_docstring(tree(path)) for path in FILES if is_room(path)}
    assert [
        name for name, doc in docs.items() if not doc or not 3 <= doc.count("\n") + 1 <= 10
    ] == []


def is_room(path: Path) -> bool:
    return path.name == "__init__.py"


def test_no_file_is_longer_than_400_lines() -> None:
    lines = {short(path): path.read_text().count("\n") for path in FILES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_the_median_function_has_at_most_eight_lines() -> None:
    """Its decorators aside."""
    assert median(lines_of_functions()) <= 8


def lines_of_functions() -> Iterator[int]:
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield node.end_lineno - node.lineno + 1


def test_no_two_files_import_each_other() -> None:
    """Not even inside functions, nor by way of others."""
    imports = {module_of(path): set(imported(path)) for path in FILES}
    graph = {
        name: {other for other in others if other in imports} for name, others in imports.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def module_of(path: Path) -> str:
    parts = ("qpipe", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if is_room(path) else parts)


def imported(path: Path) -> Iterator[str]:
    """The modules from which a file imports, and those that it imports by name from a room."""
    package = ("qpipe", *path.parent.relative_to(ROOT).parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*above, *filter(None, [node.module])))
            for name in node.names:
                module = f"{source}.{name.name}"
                yield module if is_module(module) else source
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@cache
def modules() -> set[str]:
    return {module_of(path) for path in FILES}


def is_module(name: str) -> bool:
    return name in modules()


def test_tests_patch_no_private_name() -> None:
    """Of the product's: a rename would break tests that no reader connects with it."""
    private = {name for path in FILES for name in private_names(path)}
    found = [
        f"{short(path)}:{node.lineno}: {name}"
        for path in TESTS
        for node, name in patched(tree(path))
        if name.rpartition(".")[2] in private
    ]
    assert found == []


def private_names(path: Path) -> Iterator[str]:
    """The names with an underscore that a file defines or sets."""
    for node in ast.walk(tree(path)):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
            ):
                pass
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                pass
            case _:
                continue
        if name.startswith("_"):
            yield name


def patched(module: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """The calls that replace something, with its name; of other libraries' objects none."""
    foreign = {
        alias.asname or alias.name
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom)
        and not (node.module or "").startswith("qpipe")
        and not node.level
        for alias in node.names
    }
    for node in ast.walk(module):
        if (
            not isinstance(node, ast.Call)
            or getattr(node.func, "attr", getattr(node.func, "id", "")) not in PATCHES
        ):
            continue
        match node.args:
            case [ast.Name(id=name), *_] if name in foreign:
                continue
            case [ast.Constant(value=str(name)), *_] | [_, ast.Constant(value=str(name)), *_]:
                yield node, name
