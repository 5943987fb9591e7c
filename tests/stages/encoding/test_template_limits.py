"""Templates as bombs of time and memory: refused or ended, in a child that may not take much."""

import json
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.format.records import Reject
from qpipe.stages.demonstrations.demonstration import UnusableError
from qpipe.stages.encoding.encoder import Encoded
from qpipe.stages.encoding.sandbox import environment, watch
from qpipe.stages.encoding.sandbox.environment import LimitError, compiled
from qpipe.stages.encoding.sandbox.watch import TooMuchError, watched
from qpipe.stages.score.in_context import Context

from . import families
from .chats import CHATML, TOKENIZER, chat, encoder

DOUBLED = "{% set s = 'x' %}" + "{% set s = s ~ s %}" * 60 + "{{ s[:1] }}"
ADDED = "{% set s = 'x' %}" + "{% set s = s + s %}" * 60 + "{{ s[:1] }}"
NESTED = "{% set a = ['x'] %}" + "{% set a = [a, a] %}" * 60
LOOPS = "{{% for i in range(9999) %}}{{% for j in range(99999) %}}{}{{% endfor %}}{{% endfor %}}"
HUGE = {
    "product of a text": "{{ ('x' * 10000000000)[:1] }}",
    "product of a list": "{{ ([1] * 10000000000)|length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set n = 9 %}" + "{% set n = n * n %}" * 40 + "{{ n }}",
    "doubled": DOUBLED,
    "added": ADDED,
    "written": NESTED + "{{ a }}",
    "as JSON": NESTED + "{{ a|tojson }}",
    "filter string": NESTED + "{{ a|string|length }}",
    "joined lists": NESTED + "{{ a|join|length }}",
    "tilde of lists": NESTED + "{{ (a ~ 'x')|length }}",
    "formatted list": NESTED + "{{ ('%s' % (a,))|length }}",
    "center": "{{ ('x'|center(10000000000))[:1] }}",
    "ljust": "{{ 'x'.ljust(10000000000)[:1] }}",
    "zfill": "{{ 'x'.zfill(10000000000)[:1] }}",
    "percent": "{{ ('%10000000000d' % 1)[:1] }}",
    "percent with a star": "{{ ('%*d' % (10000000000, 1))[:1] }}",
    "filter format": "{{ ('%10000000000d'|format(1))[:1] }}",
    "method format": "{{ '{:10000000000}'.format(1)[:1] }}",
    "format in a format": "{{ '{:{}}'.format(1, 10000000000)[:1] }}",
    "replace": "{% set s = 'x' * 100000 %}{{ s.replace('x', s)[:1] }}",
    "filter replace": "{% set s = 'x' * 100000 %}{{ (s|replace('x', s))[:1] }}",
    "join": "{% set s = 'x' * 100000 %}{{ s.join(s)[:1] }}",
    "translate": "{% set s = 'x' * 100000 %}{{ s.translate({120: s})[:1] }}",
    "indent": "{% set s = '\\n' * 100000 %}{{ (s|indent(s, blank=true))[:1] }}",
    "JSON's indent": "{{ ([1]|tojson(indent=10000000000))[:1] }}",
    "output": LOOPS.format("{{ 'x' * 9999 }}"),
    "macro": "{% macro m() %}" + LOOPS.format("xxxxxxxx") + "{% endmacro %}{{ m()[:1] }}",
    "time": LOOPS.format(""),
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}
RENDER = """
import json, resource, sys, time
from pathlib import Path
from qpipe.stages.encoding.sandbox import watch
from qpipe.stages.encoding.sandbox.environment import compiled
from qpipe.stages.encoding.sandbox.watch import watched

watch.MOST_SECONDS, watch.MOST_GROWTH = 1.0, 2**27

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

compiled("a").render()
most = 2**33  # what a defect may take
resource.setrlimit(resource.RLIMIT_AS, (most, most))
before, said = peak(), {}
for name, template in json.load(sys.stdin).items():
    start = time.process_time()
    try:
        text = watched(lambda: compiled(template).render(messages=[]))
        said[name] = f"rendered {len(text)}"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
    assert time.process_time() - start < 6, name
print(json.dumps(said))
print(peak() - before)
"""


def test_bombs_take_little_time_and_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RENDER],
        input=json.dumps(HUGE),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    said, megabytes = map(json.loads, done.stdout.splitlines())
    assert {name for name, each in said.items() if each.startswith("rendered")} == set()
    assert said["time"].startswith("TooMuchError: it takes more than 1 s")
    assert said["output"] == "LimitError: it writes more than 67,108,864 characters"
    assert said["macro"].startswith("TooMuchError")
    assert said["power"] == "LimitError: it asks for a huge number or text"
    assert megabytes < 500


def test_a_loop_is_ended_and_what_comes_after_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in another thread than the main one, again and again."""
    monkeypatch.setattr(watch, "MOST_SECONDS", 0.1)
    ended: list[str] = []

    def work() -> None:
        for _ in range(3):
            try:
                watched(lambda: compiled(HUGE["time"]).render())
            except TooMuchError as error:
                ended.append(str(error))
            assert watched(lambda: compiled("{{ 1 + 1 }}").render()) == "2"

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    assert len(ended) == 9
    time.sleep(3 * watch.PERIOD)  # an exception that is left over would be raised here


def test_a_call_that_returns_as_it_is_ended_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "MOST_SECONDS", -1.0)
    monkeypatch.setattr(watch, "PERIOD", 0.0)
    for _ in range(300):
        with suppress(TooMuchError):
            watched(lambda: time.sleep(0.0001))
    for _ in range(1000):
        pass
    assert not watch._runs


def test_a_context_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a template of Jinja alone, in which a missing name is an error."""
    demonstration, context = chat("a?", "One."), Context("{{ hint|join('-') }}\n\n")
    assert context.before(demonstration, {"hint": "ab"}).messages[0]["content"] == "a-b\n"
    with pytest.raises(UnusableError, match="--context: 'hint' is undefined"):
        context.before(demonstration, {})
    for name in ("doubled", "as JSON", "power", "center", "recursion"):
        with pytest.raises(UnusableError, match=r"--context: (it (asks|writes)|maximum)"):
            Context(HUGE[name]).before(demonstration, {})
    monkeypatch.setattr(watch, "MOST_SECONDS", 0.1)
    slow = Context(HUGE["time"])
    with pytest.raises(TooMuchError) as ended:
        slow.before(demonstration, {})
    for _ in range(2):
        reject = slow.overruns.reject(demonstration, ended.value)
        assert reject.reason.startswith("--context cannot be used on this row: it takes more")
    with pytest.raises(UserError, match=r"--context cannot be used: it takes more .*line 7: give"):
        slow.overruns.reject(demonstration, ended.value)


TEMPLATES = [name for name, each in vars(families).items() if "{%" in str(each)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_renderings_are_those_of_transformers(name: str) -> None:
    messages = chat("a?", "One.", "b?", " Two\n").messages
    template = getattr(families, name)
    given = {"tools": None, "documents": None, "add_generation_prompt": True}
    ours = compiled(template).render(TOKENIZER.special_tokens_map, messages=messages, **given)
    theirs = TOKENIZER.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert ours == theirs


def test_operations_that_stay_small_are_left_alone() -> None:
    small = {
        "{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 7 * 6 }}{{ 7 % 4 }}{{ [1] * 2 }}": "ababab1024423[1, 1]",
        "{{ 'a' + x + x }}{{ x ~ 1 ~ none }}{{ [1] + [2] }}{{ 1 + x|length }}": "aééé1None[1, 2]2",
        "{{ '%5.2f|%s' % (1.5, x) }}{{ '%d'|format(1730000000) }}": " 1.50|é1730000000",
        "{{ '{:>4}{}'.format(1, x) }}{{ x.ljust(3) }}|{{ x|center(3) }}|": "   1éé  | é |",
        "{{ 1730000000|string }}{{ {'a': [1730000000]}|tojson }}": '1730000000{"a": [1730000000]}',
        "{{ 'a-b'.replace('-', x) }}{{ ['a', 'b']|join(x) }}": "aébaéb",
        "{% autoescape true %}{{ '<' ~ x }}{% endautoescape %}": "&lt;é",
    }
    for template, expected in small.items():
        assert compiled(template).render(x="é") == expected
    with pytest.raises(LimitError, match="huge"):
        compiled("{{ x + x }}").render(x="a" * (environment.MOST_TEXT // 2 + 1))


def test_a_row_on_which_a_template_takes_too_long_is_rejected_and_the_third_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "MOST_SECONDS", 0.1)
    slow = "{% if messages[0].content == 'slow' %}" + HUGE["time"] + "{% endif %}" + CHATML
    made = encoder(slow)
    good, bad = chat("a?", "One."), chat("slow", "Two.")
    for _ in range(2):
        found = made.encode(bad)
        assert isinstance(found, Reject)
        assert "the chat template cannot be used on this row: it takes more than" in found.reason
        assert isinstance(made.encode(good), Encoded)
    with pytest.raises(UserError, match=r"chat template cannot be used: it takes .* --template"):
        made.encode(bad)
