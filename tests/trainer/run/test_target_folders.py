"""Several target folders in one run."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.mixing import write_mix
from qpipe.stages.commands.train import train as command
from qpipe.trainer.loss.objective import common_objective
from qpipe.trainer.models.files import find_model
from qpipe.trainer.run.target_folders import check_fit, open_folders
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step.step import Stepper, StepResult
from safetensors.torch import load_file

from ...support.runs import Examples, Make, killed_at


@pytest.fixture
def settings(settings: TrainSettings, make_targets: Make, make_examples: Examples) -> TrainSettings:
    """Folders of 12 and 4 examples, in steps of four."""
    folders = tuple(
        make_targets([replace(each, id=f"{name}-{each.id}") for each in examples], name)
        for name, examples in (("a=b", make_examples(12, 1)), ("c", make_examples(4, 2)))
    )
    return replace(settings, targets=folders, batch_size=4, learning_rate=1e-2)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ids of the examples of each step."""
    steps: list[list[str]] = []
    take = Stepper.step

    def step(self: Stepper, number: int, batches: Any, rate: float) -> StepResult:
        steps.append([example for batch in batches for example in batch.ids])
        return take(self, number, batches, rate)

    monkeypatch.setattr(Stepper, "step", step)
    return steps


def folder_of(ids: list[str]) -> Counter[str]:
    return Counter(each.split("-")[0] for each in ids)


def test_by_their_sizes_every_example_comes_once_an_epoch(
    settings: TrainSettings, seen: list[list[str]]
) -> None:
    result = train(settings)
    assert (result.steps, result.examples) == (4, 16)
    assert all(folder_of(step) == {"a=b": 3, "c": 1} for step in seen)
    assert set(Counter(each for step in seen for each in step).values()) == {1}
    record = json.loads((settings.out / "qpipe.json").read_text())
    for name, folder in zip(("targets", "targets-2"), settings.folders, strict=True):
        fingerprint = read_manifest(folder).fingerprint
        assert record["identity"]["inputs"][name] == fingerprint
        assert record["parents"][name]["fingerprint"] == fingerprint


def test_weights_are_shares_of_the_samples(settings: TrainSettings, seen: list[list[str]]) -> None:
    result = train(replace(settings, mixture_weights=(1, 3)))
    assert (result.steps, result.examples) == (4, 16)
    assert all(folder_of(step) == {"a=b": 1, "c": 3} for step in seen)


def test_a_mixture_is_resumed_exactly(settings: TrainSettings, tmp_path: Path) -> None:
    settings = replace(settings, mixture_weights=(2, 1), batch_size=3, save_every=2, epochs=2)
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    train(undisturbed)
    killed_at(settings, 6)
    with pytest.raises(UserError, match=r"mixture_weights is \[2, 1\] there and \[1, 2\] now"):
        train(replace(settings, mixture_weights=(1, 2)))
    train(replace(settings, mixture_weights=(4.0, 2.0)))  # the same shares
    ours, theirs = (load_file(run.out / "model.safetensors") for run in (settings, undisturbed))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_examples_of_every_folder_are_held_out(settings: TrainSettings) -> None:
    result = train(replace(settings, eval_fraction=0.4))
    assert result.after is not None
    alone = [
        train(replace(settings, targets=folder, eval_fraction=0.4, out=folder / "run")).after
        for folder in settings.folders
    ]
    assert [each.tokens > 0 for each in alone if each is not None] == [True, True]
    assert result.after.tokens == sum(each.tokens for each in alone if each is not None)


def test_folders_that_do_not_go_together(
    settings: TrainSettings, make_targets: Make, make_examples: Examples
) -> None:
    first = settings.folders[0]
    dft = {"method": "dft", "form": "live", "parameters": {}, "residual": "observed"}
    for changes, words in (
        ({"tail_shape": "uniform"}, "its tail shape is uniform and there student"),
        ({"residual": "teacher"}, "its residual is teacher and there base"),
        (dft, "its live method is dft and there none"),
    ):
        other = make_targets(make_examples(3), f"other-{words[4:8]}", **changes)
        with pytest.raises(UserError, match=rf"^{other}: cannot be mixed with {first}: {words}"):
            train(replace(settings, targets=(first, other)))
    # frozen methods with the same residual and tail are one to the trainer
    gift = {"method": "gift", "parameters": {"beta": 5.0}}
    train(replace(settings, targets=(first, make_targets(make_examples(3), "gift", **gift))))


def test_folders_and_weights_that_are_refused(
    settings: TrainSettings, make_targets: Make, make_examples: Examples
) -> None:
    with pytest.raises(UserError, match=r"--mixture-weights: 1 given for 2 folders"):
        replace(settings, mixture_weights=(1,))
    with pytest.raises(UserError, match=r"weights 1, 0: give each folder a weight above 0"):
        replace(settings, mixture_weights=(1, 0))
    first, second = settings.folders
    empty = make_targets([], "empty")
    with pytest.raises(UserError, match=rf"^{empty}: has no supervised token"):
        train(replace(settings, targets=(first, empty)))
    alien = make_targets(make_examples(2), "alien", tokenizer_hash="f" * 64)
    with pytest.raises(UserError, match=rf"^{alien}: made with tokenizer hash f{{64}}"):
        train(replace(settings, targets=(first, alien)))
    with pytest.raises(UserError, match=rf"holds out none of the 16 examples of {first}, {second}"):
        train(replace(settings, eval_fraction=1e-6))
    assert not settings.out.exists()


def test_words_of_the_command_line() -> None:
    words = ["--targets", "a=1", "b", "--model", "m", "--out", "o", "--mixture-weights", "3,0.5"]
    options = command.make_context("train", words).params
    settings = TrainSettings(**options)
    assert settings.folders == (Path("a=1"), Path("b"))
    assert settings.mixture_weights == (3, 0.5)


def test_a_mixture_trains_as_its_parts_with_its_weights(
    settings: TrainSettings, tmp_path: Path, seen: list[list[str]]
) -> None:
    weights = (1.0, 3.0)
    write_mix(tmp_path / "mixed", list(zip(settings.folders, weights, strict=True)))

    train(replace(settings, targets=tmp_path / "mixed", out=tmp_path / "by-mix"))
    of_mix = seen.copy()
    seen.clear()
    train(replace(settings, mixture_weights=weights))

    assert of_mix == seen
    assert all(folder_of(step) == {"a=b": 1, "c": 3} for step in seen)


def test_a_mixture_has_weights_of_its_own(settings: TrainSettings, tmp_path: Path) -> None:
    write_mix(tmp_path / "mixed", [(folder, 1.0) for folder in settings.folders])
    with pytest.raises(UserError, match="mixed is a mixture with weights of its own"):
        train(replace(settings, targets=tmp_path / "mixed", mixture_weights=(1.0,)))


def test_the_weights_of_a_mixture_do_not_depend_on_which_folder_comes_first(
    settings: TrainSettings, make_targets: Make, make_examples: Examples
) -> None:
    """The first one's method names the run's; sft there does not mean sft for all."""
    one_hot = {"form": "frozen-weight", "residual": "-", "max_support": 0, "top_p": None}
    examples = make_examples(4, 3)
    folders = [
        make_targets(examples, "of-sft", method="sft", parameters={}, **one_hot),
        make_targets(examples, "of-dft", method="dft", parameters={}, **one_hot),
    ]
    base = find_model(settings.model)
    for method, targets, is_so in (
        (None, folders, False),
        ("sft", folders, True),
        ("sft", folders[::-1], True),
        ("sft", folders[:1], False),
        ("sft", folders[1:], True),
    ):
        opened = open_folders(targets, ())
        check_fit(opened, base)
        assert common_objective(opened.folders, method).tokens_alone == is_so
