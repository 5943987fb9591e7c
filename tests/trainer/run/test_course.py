"""Parameters of a live method that change over a run."""

from dataclasses import replace
from pathlib import Path

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.tests.support.commands import run_qpipe
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step.step import Stepper

from ...support.runs import (
    ANCHORED,
    LIVE,
    Examples,
    Make,
    assert_same_weights,
    folder_settings,
    killed_at,
    weights,
)


@pytest.fixture
def live(
    settings: TrainSettings, make_targets: Make, make_live_examples: Examples
) -> TrainSettings:
    """Five steps of target-sft, from an eta of 0.5."""
    folder = make_targets(make_live_examples(40, "teacher"), "live", **LIVE["target-sft"])
    return replace(settings, targets=folder, batch_size=8, epochs=1, eval_fraction=0.0)


def etas_of(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The eta of each step of a run."""
    seen: list[float] = []
    take = Stepper.step

    def noted(self: Stepper, *arguments: object) -> object:
        seen.append(self.objective.choice.parameters["eta"])
        return take(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", noted)
        train(settings)
    return seen


def test_a_parameter_moves_linearly_from_the_folders_to_the_given_one(
    live: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert etas_of(live, monkeypatch) == [0.5] * 5
    moved = replace(live, out=live.out.with_name("moved"), param_end=("η=1",))
    assert etas_of(moved, monkeypatch) == pytest.approx([0.5, 0.625, 0.75, 0.875, 1.0])
    one = replace(live, out=live.out.with_name("one"), param_end=("eta=0",), max_steps=1)
    assert etas_of(one, monkeypatch) == [0.5]
    left, right = weights(live.out), weights(moved.out)
    assert any((left[name] != right[name]).any() for name in left)


def test_an_end_like_the_start_changes_nothing(live: TrainSettings) -> None:
    train(live)
    same = replace(live, out=live.out.with_name("same"), param_end=("eta=0.5",))
    train(same)
    assert_same_weights(live.out, same.out, rtol=0, atol=0)


def test_a_run_that_is_resumed_goes_on_where_it_was(live: TrainSettings) -> None:
    whole = replace(live, param_end=("eta=1",), save_every=1)
    train(whole)
    torn = replace(whole, out=live.out.with_name("torn"))
    killed_at(torn, 3)
    with pytest.raises(UserError, match="param_end"):
        train(replace(torn, param_end=("eta=0",)))
    train(torn)
    assert_same_weights(whole.out, torn.out, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("target-sft", ("eta=2",), "target-sft: eta=2 is out of range: give 0 to 1"),
        ("target-sft", ("beta=1",), "target-sft has no parameter 'beta'"),
        ("target-sft", ("eta=1", "η=1"), "--param-end eta=1 η=1: η is given twice"),
        ("target-sft", ("eta",), "target-sft: eta= is not a number"),
        (
            "sft+kl",
            ("lam=1",),
            "--param-end lam=1: the targets of sft+kl (frozen-target) are fixed",
        ),
        ("gem", ("h=linear",), "--param-end h=linear: give numbers"),
    ],
)
def test_what_cannot_change_is_refused(
    settings: TrainSettings,
    make_targets: Make,
    make_live_examples: Examples,
    method: str,
    given: tuple[str, ...],
    message: str,
) -> None:
    gem = folder_settings("gem", "live", "observed", beta=0.7) | {}
    gem["parameters"]["h"] = "linear"
    own = {"sft+kl": ANCHORED, "gem": gem}.get(method) or LIVE[method]
    folder = make_targets(make_live_examples(8, own["residual"]), method, **own)
    with pytest.raises(UserError) as refused:
        train(replace(settings, targets=folder, param_end=given))
    assert str(refused.value).startswith(message)
    assert not settings.out.exists()


def test_the_option_arrives(tmp_path: Path) -> None:
    words = ("--targets", tmp_path / "none", "--model", "m", "--out", tmp_path / "run")
    done = run_qpipe("train", *words, "--param-end", "eta=1", "alpha=0")
    assert done.status == 2
    assert "none: no such folder" in done.err
