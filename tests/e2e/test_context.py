"""A teacher under a prompt of its own, against the model's own distributions behind that prompt."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from qpipe.pipeline import read_scores, read_targets
from qpipe.stages.score.from_folder import stage_at
from qpipe.tests.support.commands import qpipe
from qpipe.tests.support.settings import score_settings

from ..conftest import CHATML, make_tiny_model

VOCAB_SIZE = 320
HINT = "Hint: {{ hint }}."
SCORE = ("score", "--engine", "transformers")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, demonstrations with hints, and their scores under it, without and with the hints."""
    root = tmp_path_factory.mktemp("context")
    make_tiny_model(root / "base", vocab_size=VOCAB_SIZE)
    (root / "chats.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(5)))
    qpipe(*SCORE, "--model", root / "base", "--demonstrations", root / "chats.jsonl",
          "--shard-size", 2, "--top-k", VOCAB_SIZE, "--out", root / "scores")  # fmt: skip
    qpipe(*in_context(root, HINT), "--top-k", VOCAB_SIZE, "--out", root / "hinted")
    return root


def row(number: int) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"Say {number}."},
        {"role": "assistant", "content": f"It is {number}.", "weight": 0.5 if number else 1},
    ]
    if number == 4:  # the first token, of weight 0, is not supervised
        messages[1] |= {"spans": [[0, 2, 0.0]]}
    if number == 3:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    return {"id": f"d{number}", "messages": messages, "hint": f"the {number}"}


def in_context(root: Path, context: str) -> tuple[object, ...]:
    return (*SCORE, "--model", root / "base", "--at", root / "scores", "--demonstrations",
            root / "chats.jsonl", "--context", context)  # fmt: skip


def behind_hint(model: Path, number: int) -> tuple[list[int], NDArray[np.float64]]:
    """The tokens of a chat with its hint, written out here, and log p before each, [T, V]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    system = ("Be brief.\n\n" if number == 3 else "") + f"Hint: the {number}."
    text = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nSay {number}.<|im_end|>\n"
        f"<|im_start|>assistant\nIt is {number}.<|im_end|>\n"
    )
    input_ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(torch.tensor([input_ids])).logits[0]
    return input_ids, logits.double().log_softmax(-1).roll(1, 0).numpy()


def test_the_teacher_is_the_model_behind_its_prompt(root: Path) -> None:
    plain = {example.id: example for example in read_scores(root / "scores")}
    hinted = {example.id: example for example in read_scores(root / "hinted")}
    assert list(plain) == list(hinted) == [f"d{number}" for number in range(5)]
    for number in range(5):
        own, theirs = hinted[f"d{number}"], plain[f"d{number}"]
        input_ids, log_probs = behind_hint(root / "base", number)
        assert own.input_ids.tolist() == input_ids
        assert own.observed_ids.tolist() == theirs.observed_ids.tolist()
        assert own.token_weights.tolist() == theirs.token_weights.tolist()
        assert len(own.input_ids) > len(theirs.input_ids)
        wanted = log_probs[own.positions, own.observed_ids]
        np.testing.assert_allclose(own.observed_log_probs, wanted, atol=1e-4)


def test_a_student_without_the_prompt_gets_the_target_of_a_teacher_with_it(root: Path) -> None:
    out = root / "targets"
    qpipe("build-targets", "--scores", root / "scores", "--teacher", root / "hinted", "--top-p", 1,
          "--max-support", VOCAB_SIZE, "--precision", "float32", "--out", out)  # fmt: skip
    plain = {example.id: example for example in read_scores(root / "scores")}
    for number, example in enumerate(read_targets(out)):
        assert example.input_ids.tolist() == plain[example.id].input_ids.tolist()
        _, log_probs = behind_hint(root / "base", number)
        rows = log_probs[-len(example.positions) - 1 : -1]  # the end of line is not supervised
        ends = np.cumsum(example.counts)
        for n, (start, end) in enumerate(zip(ends - example.counts, ends, strict=True)):
            wanted = np.exp(rows[n][example.support_ids[start:end]])
            np.testing.assert_allclose(example.support_probs[start:end], wanted, atol=2e-6)
        assert set(example.weights.tolist()) == {0.5 if number else 1.0}


def test_a_row_that_lacks_the_field_is_rejected_and_the_others_can_be_used(root: Path) -> None:
    context = "{% if id == 'd1' %}{{ absent }}{% endif %}Think."
    qpipe(*in_context(root, context), "--out", root / "partly")
    (reject,) = (root / "partly" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["line"] == 2
    assert json.loads(reject)["reason"] == "--context: 'absent' is undefined"
    build = ("build-targets", "--teacher", root / "partly", "--out", root / "none")
    line = qpipe(*build, "--scores", root / "scores", fails=True)
    assert "lacks 1 of the 5 examples" in line
    assert "`qpipe subset --ids`" in line
    (root / "ids").write_text("".join(f"d{number}\n" for number in (0, 2, 3, 4)))
    qpipe("subset", root / "scores", "--ids", root / "ids", "--out", root / "four")
    qpipe(*build, "--scores", root / "four")
    assert [example.id for example in read_targets(root / "none")] == ["d0", "d2", "d3", "d4"]


def test_an_answer_that_the_context_changes_is_rejected_with_its_first_difference(
    root: Path,
) -> None:
    """A template that writes another answer where there is a system message."""
    louder = CHATML.replace(
        "message['content']",
        "(message['content'] | upper if messages[0]['role'] == 'system' else message['content'])",
    )
    assert louder != CHATML
    (root / "louder.jinja").write_text(louder)
    line = qpipe(*in_context(root, "Think."), "--template", root / "louder.jinja", "--out",
                 root / "louder", fails=True)  # fmt: skip
    scored = next(iter(read_scores(root / "scores")))
    from transformers import AutoTokenizer

    upper = AutoTokenizer.from_pretrained(root / "base")("IT IS 0.")["input_ids"]
    pairs = enumerate(zip(upper, scored.observed_ids, strict=False))
    place = next(i for i, (ours, theirs) in pairs if ours != theirs)
    assert (
        f"line 1: behind the context supervised token {place} is {upper[place]}, not "
        f"{scored.observed_ids[place]}"
    ) in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "{{ hint"), "--context: not a Jinja template"),
        (("--context", "@absent.txt"), "--context @absent.txt: cannot be read"),
        (("--context", "Think.", "--shard-size", 4), "excludes --context"),
    ],
)
def test_what_a_context_refuses(root: Path, words: tuple[object, ...], message: str) -> None:
    line = qpipe(*in_context(root, "Think.")[:-2], *words, "--out", root / "refused", fails=True)
    assert message in line
    assert not (root / "refused").exists()


def test_a_context_needs_the_folder_and_its_demonstrations(root: Path) -> None:
    out = ("--context", "Think.", "--out", root / "refused")
    for words in (("--at", root / "scores"), ("--demonstrations", root / "chats.jsonl")):
        line = qpipe(*SCORE, "--model", root / "base", *words, *out, fails=True)
        assert "--context goes with --at and --demonstrations" in line
    (root / "other.jsonl").write_text(json.dumps(row(7)) + "\n")
    line = qpipe(*SCORE, "--model", root / "base", "--at", root / "scores", "--demonstrations",
                 root / "other.jsonl", *out, fails=True)  # fmt: skip
    assert "its example d0 is not among the demonstrations" in line


def test_a_worker_reads_the_same_examples(root: Path) -> None:
    (root / "hint.jinja").write_text(HINT)
    given = score_settings(
        model=str(root / "base"),
        out=root / "unused",
        demonstrations=(str(root / "chats.jsonl"),),
        at=root / "scores",
        context=f"@{root / 'hint.jinja'}",
        engine="transformers",
    )
    stage = stage_at(given)
    for each in (stage, pickle.loads(pickle.dumps(stage))):
        shard = each.read(1)
        assert shard is not None
        wanted = [behind_hint(root / "base", number)[0] for number in (2, 3)]
        assert [example.input_ids.tolist() for example in shard.examples] == wanted
    assert stage.job.identity.settings["context"] == HINT
