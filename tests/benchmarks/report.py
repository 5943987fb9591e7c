"""How large and how quick the page of `qpipe report` is, in a real browser.

    python tests/benchmarks/report.py [DEMONSTRATIONS] [FOLDER]

A tiny model with random weights scores made-up demonstrations (5,000 where no number is given) of
some 150 supervised tokens, the stages build targets and the page; nothing is left out of any of
them. Distributions of random weights are flat, so no real folder packs worse. Then the page is
opened: time to the first paint and until it is usable, and the time between frames while it scrolls
as fast as a hand can, 200 pixels a frame, and from end to end in 240 frames, a leap of many
demonstrations each; beside it an empty page of that height and one of the same text and no more,
which say what the browser takes itself. It draws without a GPU, at most 60 frames a second.
"""

import html
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qpipe.stages.commands.tables import print_table
from qpipe.tests.conftest import make_tiny_model
from qpipe.tests.support.browser import browser, missing

_WORDS = ("the", "answer", "is", "a", "system", "of", "user", "words", "nobody", "é", "漢", "😀")
_FRAMES = """async () => {
  async function scrolled(from, stride) {
    const gaps = [];
    scrollTo(0, from);
    await new Promise((done) => setTimeout(done, 500));
    let last = performance.now();
    for (let i = 1; i <= 240; i++) {
      scrollTo(0, from + stride * i);
      await new Promise(requestAnimationFrame);
      const now = performance.now();
      gaps.push(now - last);
      last = now;
    }
    return gaps;
  }
  const whole = document.documentElement.scrollHeight;
  const by_hand = await scrolled(whole / 3, 200);
  const leaping = await scrolled(0, whole / 240);
  await new Promise((done) => setTimeout(done, 500));
  const seen = [...document.querySelectorAll(".demo")].filter((node) => {
    const box = node.getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
  });
  const drawn = seen.every((node) => node.querySelector("u"));
  return {by_hand, leaping, drawn, spans: document.querySelectorAll("u").length};
}"""
_PAINT = """() => performance.getEntriesByType("paint").map((each) => each.startTime)"""


def make_folders(folder: Path, demonstrations: int) -> tuple[Path, Path]:
    """Scores and targets of made-up demonstrations, by the real stages."""
    from qpipe.pipeline.methods import choose
    from qpipe.stages.build_targets.settings import BuildSettings
    from qpipe.stages.build_targets.stage import build_targets
    from qpipe.stages.score.from_demonstrations import score
    from qpipe.tests.support.settings import score_settings

    model = folder / "model"
    if not model.exists():
        make_tiny_model(model, vocab_size=320)
    drawn = random.Random(0)
    rows = folder / "chats.jsonl"
    with open(rows, "w") as file:
        for _ in range(demonstrations):
            question, answer = (" ".join(drawn.choices(_WORDS, k=k)) for k in (5, 40))
            file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")
    scores, targets = folder / "scores", folder / "targets"
    score(
        score_settings(
            model=str(model), demonstrations=(str(rows),), out=scores, engine="transformers"
        )
    )
    build_targets(BuildSettings(scores=scores, out=targets, choice=choose("gift")))
    return scores, targets


def opened(path: Path, texts: list[str]) -> dict[str, Any]:
    """What a browser says of the page, and of bare ones with the same texts."""
    with browser() as running:
        page = running.new_page(viewport={"width": 1120, "height": 900})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        start = time.perf_counter()
        page.goto(path.resolve().as_uri(), wait_until="commit")
        page.wait_for_selector("html[data-ready]")
        usable = time.perf_counter() - start
        page.wait_for_timeout(500)
        paint = max(page.evaluate(_PAINT)) / 1000
        found = page.evaluate(_FRAMES)
        height = page.evaluate("document.documentElement.scrollHeight")
        page.close()
        floor = {name: _by_hand(running, body) for name, body in _bare(texts, height).items()}
        return found | {"usable": usable, "paint": paint, "errors": errors, "floor": floor}


def _bare(texts: list[str], height: int) -> dict[str, str]:
    """Pages that do nothing, as high as the report."""
    style = f"height: {height / len(texts)}px; margin: 0; font: 14px/1.85 monospace"
    plain = "".join(f'<p style="{style}">{html.escape(text)}' for text in texts)
    return {"an empty page": f'<div style="height: {height}px">', "plain text": plain}


def _by_hand(running: Any, body: str) -> list[float]:
    page = running.new_page(viewport={"width": 1120, "height": 900})
    page.set_content(f"<!doctype html>{body}")
    gaps = page.evaluate(_FRAMES)["by_hand"]
    page.close()
    return gaps


def _spread(gaps: list[float]) -> str:
    gaps = sorted(gaps)
    median, high = gaps[len(gaps) // 2], gaps[-len(gaps) // 20]
    return f"median {median:.0f} ms, 95 % below {high:.0f} ms"


def main(demonstrations: int, folder: Path) -> None:
    """Make the folders and the page, open it, print a table."""
    from qpipe.stages.report.make import make_report
    from qpipe.stages.report.settings import ReportSettings

    scores, targets = make_folders(folder, demonstrations)
    out = folder / "report.html"
    options = {"scores": scores, "teacher": None, "model": str(folder / "model"), "seed": 0}
    options |= {"examples": demonstrations, "alternatives": 5, "max_megabytes": 25.0}
    start = time.perf_counter()
    make_report([targets], ReportSettings(targets, **options), out, None)
    made = time.perf_counter() - start
    rows = [
        ("demonstrations", f"{demonstrations:,}"),
        ("made in", f"{made:.1f} s"),
        ("file", f"{out.stat().st_size / 1e6:.1f} MB"),
    ]
    reason = missing()
    if reason:
        print_table([*rows, ("browser", reason)])
        return
    found = opened(out, (folder / "chats.jsonl").read_text().splitlines())
    rows += [
        ("first paint", f"{found['paint']:.2f} s"),
        ("usable after", f"{found['usable']:.2f} s"),
        ("a frame, 200 pixels", _spread(found["by_hand"])),
        *((f"{name}, the same", _spread(gaps)) for name, gaps in found["floor"].items()),
        ("a frame, end to end in 240", _spread(found["leaping"])),
        ("tokens drawn at the end", f"{found['spans']:,}"),
        ("all drawn in sight", str(found["drawn"])),
        ("errors", str(found["errors"] or "none")),
    ]
    print_table(rows)


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    if len(sys.argv) > 2:
        main(wanted, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(wanted, Path(temporary))
