"""The page and the picture of training runs."""

import base64
import builtins
import json
import re
import tracemalloc
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from msgspec import to_builtins
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import Identity
from qpipe.stages.report.training_page import charts, read_runs, smoothed, thinned, training_head
from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.examples import targeted
from qpipe.tests.support.folders import folder_of


def run_folder(folder: Path, events: list[dict[str, Any]], **settings: Any) -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    identity = to_builtins(Identity("train", settings, inputs={}, schema={}))
    record = {"identity": identity, "files": {}, "results": {}}
    (folder / "qpipe.json").write_text(json.dumps(record))
    return folder


def events(slope: float = 1.0, steps: int = 4) -> list[dict[str, Any]]:
    evaluation = {"event": "evaluation", "tokens": 50, "target_loss": 2.0, "nll": 1.5}
    evaluation |= {"kl_to_base": None, "mean_trust": 0.4}
    return [
        evaluation | {"step": 0},
        *(
            {"event": "step", "step": i, "loss": slope * i, "tokens": 10}
            | {"tokens_per_second": 100.0, "learning_rate": 1e-5, "seconds_waited_in_all": 1.0}
            for i in range(1, steps + 1)
        ),
        evaluation | {"step": steps, "target_loss": 1.0},
    ]


def test_the_losses_stand_together_and_every_number_of_an_evaluation_is_drawn(
    tmp_path: Path,
) -> None:
    folders = [run_folder(tmp_path / name, events(slope)) for name, slope in (("a", 1), ("b", 2))]
    found = charts(read_runs(folders))
    assert [chart.title for chart in found] == [
        "Loss",
        "Held-out NLL",
        "Supervised tokens a second",
        "Held-out mean trust",
        "Learning rate",
    ]
    assert found[0].curves == [
        (0, True, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        (1, True, [(1, 2), (2, 4), (3, 6), (4, 8)]),
        (0, False, [(0, 2.0), (4, 1.0)]),
        (1, False, [(0, 2.0), (4, 1.0)]),
    ]


def test_a_log_of_any_content_takes_little(tmp_path: Path) -> None:
    """A line of millions of small values is no event; a page has room for some curves."""
    folder = run_folder(tmp_path / "run", events())
    log = (folder / "log.jsonl").read_bytes()
    event = b'{"event": "step", "step": 1, "loss": 9.0, "x": ['
    (folder / "log.jsonl").write_bytes(event + b"[]," * 400_000 + b"1]}\n" + log)
    assert charts(read_runs([folder]))[0].curves[0][2] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    many = json.dumps({"event": "evaluation", "step": 1} | {str(each): 1 for each in range(999)})
    (folder / "log.jsonl").write_bytes(log + many.encode())
    with pytest.raises(UserError, match=r"log.jsonl: holds more than 1,000 kinds of values"):
        read_runs([folder])


def test_a_long_log_is_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines without values take nothing, and there is a limit on the values."""
    folder = run_folder(tmp_path / "run", events())
    log = (folder / "log.jsonl").read_bytes()
    (folder / "log.jsonl").write_bytes((b'"%s"\n' % (b"x" * (1 << 16))) * 256 + log)
    tracemalloc.start()
    (run,) = read_runs([folder])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert run.steps == 4
    assert peak < 1 << 22
    values = sum(map(len, run.curves.values()))
    for most, is_refused in ((values, False), (values - 1, True)):
        monkeypatch.setattr("qpipe.stages.report.training_page.MOST_VALUES", most)
        refused = pytest.raises(UserError, match=f"log.jsonl: holds more than {most} values")
        with refused if is_refused else nullcontext():
            read_runs([folder])


def test_long_curves_are_averaged_and_keep_their_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(1, 10_001)]
    thin = thinned(points, 1000)
    assert len(thin) == 1000
    assert thin[-1][0] == 10_000
    assert sum(v for _, v in thin) / 1000 == pytest.approx(sum(v for _, v in points) / 10_000)
    assert smoothed([(1, 1.0), (2, 4.0), (3, 1.0)]) == [(1, 2.5), (2, 2.0), (3, 2.5)]


def test_a_run_under_work_and_a_line_cut_short(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", [*events(), {"event": "step", "step": 5, "loss": 1e999}])
    (folder / "qpipe.json").unlink()
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    (run,) = read_runs([folder])
    assert not run.is_finished
    assert run.curves["step", "loss"][-1] == (4, 4)  # what is not finite is not drawn


def test_runs_of_one_name_are_told_apart_and_differing_settings_shown(tmp_path: Path) -> None:
    for name, seed in (("x", 1), ("y", 2)):
        (tmp_path / name).mkdir()
        run_folder(tmp_path / name / "run", events(), seed=seed, epochs=1.0)
    out = tmp_path / "r.html"
    qpipe("report", tmp_path / "x" / "run", tmp_path / "y" / "run", "--out", out)
    (content,) = re.findall(r'id="head">([A-Za-z0-9+/=]*)</script>', out.read_text())
    runs = json.loads(zlib.decompress(base64.b64decode(content)))["runs"]
    assert len({run["name"] for run in runs}) == 2
    assert [run["settings"] for run in runs] == [{"seed": "1"}, {"seed": "2"}]
    assert runs[0]["tokens"] == 40
    assert runs[0]["last"]["target_loss"] == 1.0


def test_a_picture_for_papers(tmp_path: Path) -> None:
    from PIL import Image

    png = tmp_path / "training.png"
    qpipe("report", run_folder(tmp_path / "a", events()), "--png", png)
    with Image.open(png) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 50


def test_without_matplotlib_the_way_to_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    folder = run_folder(tmp_path / "a", events())
    said = qpipe("report", folder, "--png", tmp_path / "r.png", fails=True)
    assert said == "Error: --png needs matplotlib: pip install 'qpipe[report]'"
    assert not (tmp_path / "r.png").exists()


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a", events())
    targets = folder_of(tmp_path / "t", [targeted("a", [0, 7], [1.0], [{7: 1.0}])])
    out = ("--out", tmp_path / "r.html")
    assert "cannot be on one page" in qpipe("report", run, targets, *out, fails=True)
    assert "cannot be on one page" in qpipe("report", targets, targets, *out, fails=True)
    assert "--scores" in qpipe("report", run, "--scores", targets, *out, fails=True)
    empty = run_folder(tmp_path / "b", [])
    assert "nothing is logged yet" in qpipe("report", empty, *out, fails=True)
    nowhere = tmp_path / "nowhere"
    for folders in ((nowhere,), (run, nowhere)):
        assert f"{nowhere}: no such folder" in qpipe("report", *folders, *out, fails=True)


def test_numbers_of_the_users_own_command_are_drawn_under_their_names(tmp_path: Path) -> None:
    own = [
        {
            "event": "eval_command",
            "step": step,
            "results": {"pass@1": step / 4, "nll": 3.0, "tokens": 70},
        }
        for step in (0, 4)
    ]
    failed = {"event": "eval_command", "step": 2, "error": "exit status 1"}
    folder = run_folder(tmp_path / "a", [*events(), *own, failed])
    found = {chart.title: chart.curves for chart in charts(read_runs([folder]))}
    assert found["pass@1"] == [(0, False, [(0, 0.0), (4, 1.0)])]
    assert found["nll"] == [(0, False, [(0, 3.0), (4, 3.0)])]
    assert found["Held-out NLL"] == [(0, False, [(0, 1.5), (4, 1.5)])]
    assert found["tokens"] == [(0, False, [(0, 70.0), (4, 70.0)])]
    head = zlib.decompress(base64.b64decode(training_head(read_runs([folder]))))
    last = json.loads(head)["runs"][0]["last"]
    assert (last["nll"], last["nll of --eval-command"], last["pass@1"]) == (1.5, 3.0, 1.0)
