"""The pages in a real browser."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline.folders.provenance import tokenizer_hash
from qpipe.tests.support.browser import browser, missing
from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.examples import scored, targeted
from qpipe.tests.support.folders import folder_of

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

HOSTILE = '<script>window.hurt = 1</script><img src=x onerror="window.hurt = 2"> the answer\n'
MANY = 300


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A page of hostile text: targets with their base beside."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("user " * 300, HOSTILE + "漢")
    )
    ids, size = prompt + answer, len(answer)
    targets, scores = [], []
    for i in range(MANY):
        residual = [{token: 0.5, 270: 0.25} for token in answer]
        trust = [(i + place) % 11 / 10 for place in range(size)]
        name = f"<i>{i}" if i else "<b>first</b>"
        targets.append(targeted(name, ids, trust, residual))
        base = [{270: 0.75, token: 0.1} if token != 270 else {270: 0.75} for token in answer]
        scores.append(scored(name, ids, base))
    folder = tmp_path_factory.mktemp("report")
    own = tokenizer_hash(tokenizer)
    folder_of(folder / "targets", targets, tokenizer_hash=own, shards=3)
    folder_of(folder / "scores", scores, tokenizer_hash=own)
    words = ("--scores", folder / "scores", "--model", tiny_model, "--out", folder / "r.html")
    qpipe("report", folder / "targets", *words)
    return folder / "r.html"


class Opened:
    """A page that was opened, and what went wrong in it."""

    def __init__(self, running: Any, path: Path, **options: Any) -> None:
        self.problems: list[str] = []
        self.page = running.new_page(**options)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("request", self._requested)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def _requested(self, request: Any) -> None:
        if not request.url.startswith("file:"):
            self.problems.append(f"it asked for {request.url}")

    def to_demonstrations(self) -> None:
        self.page.evaluate("document.getElementById('demos').scrollIntoView()")
        self.page.wait_for_selector(".demo u")


def until(page: Any, holds: str) -> None:
    """Wait for it, from outside: the page lets nobody evaluate strings in it."""
    for _ in range(200):
        if page.evaluate(holds):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {holds}")


@pytest.fixture
def opened(running: Any, report: Path) -> Iterator[Opened]:
    found = Opened(running, report, viewport={"width": 1100, "height": 800})
    yield found
    found.page.close()
    assert found.problems == []


def test_it_renders_and_hostile_text_stays_text(opened: Opened) -> None:
    opened.to_demonstrations()
    page = opened.page
    assert page.locator(".plot svg").count() >= 10
    first = page.locator(".demo").first
    assert first.locator("h3").inner_text() == "<b>first</b>"
    assert "".join(first.locator("u").all_text_contents()) == HOSTILE + "漢"
    assert page.evaluate("window.hurt") is None
    assert page.locator("main script, main img").count() == 0


def test_the_switch_colours_by_another_measure(opened: Opened) -> None:
    opened.to_demonstrations()
    page = opened.page
    tokens = page.locator(".demo").first.locator("u")
    classes = [tokens.nth(i).get_attribute("class").split()[0] for i in range(11)]
    assert classes == ["c9", "c8", "c7", "c6", "c5", "c5", "c4", "c3", "c2", "c1", "c0"]
    page.check("input[name=colour][value=base]", force=True)
    assert tokens.nth(0).get_attribute("class").split()[0] == "c8"  # 1 − 0.1
    page.keyboard.press("4")
    assert page.locator("input[name=colour]:checked").get_attribute("value") == "gain"
    assert tokens.nth(10).get_attribute("class").split()[0] == "d8"
    assert "from −1 to +1" in page.locator(".ramp").get_attribute("aria-label")


def test_pointing_at_a_token_shows_its_alternatives(opened: Opened) -> None:
    opened.to_demonstrations()
    page = opened.page
    page.locator(".demo").first.locator("u").nth(0).hover()
    pop = page.locator("#pop")
    assert pop.is_visible()
    rows = [row.inner_text().split() for row in pop.locator("tbody tr").all()]
    assert rows == [["<", "50.0%", "10.0%"], ["tan", "25.2%", "75.1%"]]
    assert pop.locator("tr.seen").count() == 1
    assert "Trust γ\n0" in pop.inner_text()
    page.mouse.move(5, 5)
    assert pop.is_hidden()


def test_keys_go_through_demonstrations_and_tokens(opened: Opened) -> None:
    page = opened.page
    opened.to_demonstrations()
    page.keyboard.press("j")
    until(page, "document.activeElement.classList.contains('tokens')")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    pop = page.locator("#pop")
    assert pop.is_visible()
    assert page.locator("u.on").get_attribute("aria-describedby") == "pop"
    page.keyboard.press("Escape")
    assert pop.is_hidden()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"


def test_search_and_sort(opened: Opened) -> None:
    page = opened.page
    opened.to_demonstrations()
    page.fill("#search", "<i>29")
    until(page, "document.getElementById('count').textContent.startsWith('11 of 300')")
    page.fill("#search", "ONERROR=")
    until(page, "document.getElementById('count').textContent === '300 demonstrations'")
    page.fill("#search", "nobody wrote this")
    page.wait_for_selector(".empty")
    page.fill("#search", "")
    page.wait_for_selector(".demo u")
    ends = {}
    for end in ("highest", "lowest"):
        page.select_option("#sort", f"{end}-trust")
        page.wait_for_selector(".demo u")
        fact = page.locator(".demo").first.locator("header span").nth(1).inner_text()
        ends[end] = float(fact.removeprefix("Trust γ "))
    assert ends["highest"] > ends["lowest"]


def test_only_what_is_near_is_drawn(opened: Opened) -> None:
    page = opened.page
    opened.to_demonstrations()
    assert page.locator(".demo").count() == MANY
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    until(page, "document.querySelector('.demo:last-child u')")
    until(page, "!document.querySelector('.demo:first-child u')")
    assert page.locator(".demo:has(u)").count() < MANY / 3


def test_long_prompts_are_shortened_until_asked_for(opened: Opened) -> None:
    opened.to_demonstrations()
    body = opened.page.locator(".demo .tokens").first
    assert len(body.inner_text()) < 1000
    body.locator("button").click()
    assert len(body.inner_text()) > 1500


def test_light_and_dark(running: Any, report: Path) -> None:
    papers = {}
    for scheme in ("light", "dark"):
        found = Opened(running, report, color_scheme=scheme)
        paper = "getComputedStyle(document.body).backgroundColor"
        papers[scheme] = found.page.evaluate(paper)
        found.page.click("#theme")
        papers[f"not {scheme}"] = found.page.evaluate(paper)
        found.page.close()
        assert found.problems == []
    assert papers["light"] == papers["not dark"] != papers["dark"] == papers["not light"]


def test_on_a_phone_a_tap_opens_a_sheet_and_nothing_is_wider_than_the_screen(
    running: Any, report: Path
) -> None:
    size = {"width": 375, "height": 700}
    found = Opened(running, report, viewport=size, has_touch=True, is_mobile=True)
    found.to_demonstrations()
    page = found.page
    page.locator(".demo u").nth(3).tap()
    sheet = page.locator("#pop").bounding_box()
    assert (sheet["x"], sheet["width"]) == (0, 375)
    token = page.locator("u.on").bounding_box()
    assert token["y"] + token["height"] <= sheet["y"]
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.close()
    assert found.problems == []


def test_the_page_of_training_runs(running: Any, tmp_path: Path) -> None:
    folders = []
    for name in ("<u>one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            {"event": "step", "step": i, "loss": 2 / i, "tokens": 9, "tokens_per_second": 50.0}
            for i in range(1, 30)
        ]
        lines += [{"event": "evaluation", "step": i, "nll": 1.0, "x": 3} for i in (0, 29)]
        (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
        folders.append(folder)
    qpipe("report", *folders, "--out", tmp_path / "r.html")
    found = Opened(running, tmp_path / "r.html")
    page = found.page
    titles = page.locator(".plot figcaption span").all_inner_texts()
    assert titles == ["Loss", "Held-out NLL", "Supervised tokens a second", "Held-out x"]
    assert page.locator(".plot").first.locator("path").count() == 4
    page.get_by_role("button", name="two").click()
    assert page.locator(".plot").first.locator("path").count() == 2
    page.locator(".plot svg").first.hover()
    assert "<u>one" in page.locator(".plot small").first.inner_text()
    assert page.locator("tbody tr").count() == 2
    page.close()
    assert found.problems == []
