"""The page of a folder as a file: what is in it, and what it holds apart."""

import base64
import hashlib
import json
import re
import tomllib
import zlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from qpipe.stages.report.page import asset
from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.examples import scored, targeted
from qpipe.tests.support.folders import folder_of

IDS = [0, 7, 8]
HOSTILE = "</script><script>window.hurt = 1</script><!--"


def rows(count: int) -> list[Any]:
    return [
        targeted(f"demo-{i}{HOSTILE}", IDS, [i / count, 1.0], [{7: 0.5, 9: 0.5}, {8: 1.0}])
        for i in range(count)
    ]


def blob(page: str, name: str) -> bytes:
    (content,) = re.findall(rf'id="{name}">([A-Za-z0-9+/=]*)</script>', page)
    return zlib.decompress(base64.b64decode(content))


def head(page: str) -> dict[str, Any]:
    return json.loads(blob(page, "head"))


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "targets", rows(40), shards=3)


def test_the_page_holds_all_and_loads_nothing(targets: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    qpipe("report", targets, "--out", out)
    page = out.read_text()
    found = head(page)
    assert found["examples"]["ids"][3] == f"demo-3{HOSTILE}"
    assert found["summary"]["measures"]["trust"]["mean"] == pytest.approx(0.74375)
    assert len(re.findall('id="chunk-', page)) == 3
    assert "hurt" not in page  # text of the data stands in it packed alone
    assert not re.search(r"""(src|href)=|url\(|@import|fetch\(|XMLHttp""", page)
    assert "innerHTML" not in page
    assert "insertAdjacentHTML" not in page


def test_the_policy_names_the_pages_own_style_and_script(targets: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    qpipe("report", targets, "--out", out)
    page = out.read_text()
    (policy,) = re.findall(r'Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_a_title_is_escaped(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "<b>&", rows(1))
    qpipe("report", folder, "--out", tmp_path / "r.html")
    assert "<h1>&lt;b&gt;&amp;</h1>" in (tmp_path / "r.html").read_text()


def test_a_sample_is_drawn_and_the_summary_stays_whole(targets: Path, tmp_path: Path) -> None:
    pages = []
    for seed in (0, 0, 1):
        printed = qpipe(
            "report", targets, "--out", tmp_path / "r.html", "--examples", 10, "--seed", seed
        )
        assert "10 of 40 demonstrations are shown, drawn at random." in printed
        pages.append(head((tmp_path / "r.html").read_text()))
    numbers = [page["examples"]["numbers"] for page in pages]
    assert numbers[0] == numbers[1] != numbers[2]
    assert numbers[0] == sorted(numbers[0])
    assert pages[0]["summary"]["examples"] == 40


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    import numpy as np

    drawn = np.random.default_rng(0)
    many = []
    for i in range(400):
        ids = [0, *drawn.integers(0, 320, 60).tolist()]
        supports = [dict.fromkeys([t, *drawn.integers(0, 320, 5).tolist()], 0.15) for t in ids[1:]]
        many.append(targeted(f"demo-{i}", ids, drawn.random(60).tolist(), supports))
    folder = folder_of(tmp_path / "targets", many)
    out = tmp_path / "r.html"
    printed = qpipe("report", folder, "--out", out, "--max-megabytes", 0.2)
    found = head(out.read_text())
    shown = len(found["examples"]["ids"])
    assert 40 < shown < 390
    assert f"{shown} of them fit in 0.2 MB" in printed
    assert out.stat().st_size < 0.2e6 + 60_000  # the page's own script and style come to it
    assert found["summary"]["examples"] == 400


def test_the_base_stands_beside(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "t", [targeted("a", IDS, [0.5, 1.0], [{7: 1.0}, {8: 1.0}])])
    scores = folder_of(tmp_path / "s", [scored("a", IDS, [{9: 0.75, 7: 0.25}, {8: 1.0}])])
    qpipe("report", folder, "--scores", scores, "--out", tmp_path / "r.html")
    found = head((tmp_path / "r.html").read_text())
    assert found["roles"] == ["target", "base"]
    assert {"base", "gain", "kl", "base-rank"} <= set(found["colours"])
    assert found["examples"]["means"]["gain"] == [0.375]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "give --out"),
        (["--out", "/nowhere/r.html"], "'--out': /nowhere is not a folder"),
        (["--out", ""], "'--out': '' is not a file name"),
        (["--out", "."], "'--out': .*'.' is a directory"),
        (["--out", "r.html", "--png", "/nowhere/r.png"], "'--png': /nowhere is not a folder"),
        (["--out", "r.html", "--png", "r.png"], "--png r.png: requires training runs"),
        (["--out", "r.html", "--scores", "nowhere"], "nowhere: no such folder"),
        (["--out", "r.html", "--max-megabytes", "0.05"], "0.05"),
    ],
)
def test_what_cannot_be_made_is_said_and_leaves_nothing(
    targets: Path, words: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(error, qpipe("report", targets, *words, fails=True))
    assert not (tmp_path / "r.html").exists()


def test_the_pages_files_come_with_the_package() -> None:
    root = Path(__file__).parents[3]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = declared["package-data"]["qpipe.stages.report"]
    files = [each.name for each in (root / "stages" / "report").iterdir() if each.is_file()]
    beside = [name for name in files if not name.endswith(".py")]
    assert {"page.html", "page.css", "page.js", "folder.js", "training.js"} <= set(beside)
    for name in beside:
        assert any(fnmatch(name, pattern) for pattern in patterns)
        assert asset(name)
