"""Two processes train as one."""

from dataclasses import replace
from pathlib import Path

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings

from ...support.runs import LIVE, Examples, Make, assert_same_weights, read_log
from ...support.torchrun import train_in_two_processes


def test_two_processes_train_as_one(
    settings: TrainSettings, make_targets: Make, make_examples: Examples, tmp_path: Path
) -> None:
    folder = make_targets(make_examples(13), "few")
    assert_two_processes_train_as_one(replace(settings, targets=folder), tmp_path)


@pytest.mark.slow
def test_two_processes_train_as_one_on_a_live_target(
    settings: TrainSettings, make_targets: Make, make_live_examples: Examples, tmp_path: Path
) -> None:
    """The bound, too, is that of all processes."""
    folder = make_targets(make_live_examples(13, "teacher"), "few", **LIVE["target-sft"])
    assert_two_processes_train_as_one(replace(settings, targets=folder), tmp_path)
    assert all(line["error_bound"] > 0 for line in read_log(settings.out, "step"))


def test_processes_without_a_launcher_are_refused(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        UserError, match=r"WORLD_SIZE is 4 .* but LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"
    ):
        train(settings)


def assert_two_processes_train_as_one(settings: TrainSettings, tmp_path: Path) -> None:
    """Nine examples to train on in steps of eight: the second process has none for the last."""
    settings = replace(settings, eval_fraction=0.3)
    two = replace(settings, out=tmp_path / "two")
    train_in_two_processes((replace(two, forward_tokens=30), None))
    result = train(settings)
    assert (result.steps, result.examples) == (2, 9)
    for event in ("step", "evaluation"):
        for ours, theirs in zip(
            read_log(settings.out, event), read_log(two.out, event), strict=True
        ):
            for name in ours.keys() - {"event", "tokens_per_second", "seconds_waited_in_all"}:
                if ours[name] is None:
                    assert theirs[name] is None
                else:
                    assert theirs[name] == pytest.approx(ours[name], rel=1e-5)
    # Adam divides each gradient by its size: where it is nearly 0, its rounding is seen
    assert_same_weights(two.out, settings.out, rtol=0, atol=1e-4)
    # the same examples a step: the same run, which is done
    assert train(two).was_done
