"""Runs that are stopped and go on, against runs that are not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.threads import THREAD_NAME
from qpipe.trainer.run import loop as run_module
from qpipe.trainer.run.checkpoint import checkpoints_in
from qpipe.trainer.run.folder import settings_in
from qpipe.trainer.run.tensor_files import TensorReader
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step.step import Stepper, StepResult

from ...support.runs import Make, killed_at, read_log, weights
from ...support.tiers import slow
from ...support.torchrun import train_in_two_processes


@pytest.fixture
def settings(settings: TrainSettings) -> TrainSettings:
    """Nine steps over two epochs of 17 examples."""
    return replace(
        settings,
        weight_decay=0.1,
        batch_size=4,
        epochs=2,
        save_every=2,
        eval_fraction=0.2,
        eval_every=3,
    )


def log(folder: Path) -> list[dict[str, Any]]:
    timings = ("tokens_per_second", "seconds_waited_in_all")
    return [{k: v for k, v in line.items() if k not in timings} for line in read_log(folder)]


def assert_same_run(one: Path, other: Path) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    assert log(one) == log(other)
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


@pytest.mark.parametrize(
    ("pack", "every"),
    [
        (True, 3),
        *slow((True, 2), (False, 1)),
    ],
)
def test_a_run_killed_at_any_step_ends_with_the_same_weights(
    settings: TrainSettings, tmp_path: Path, pack: bool, every: int
) -> None:
    settings = replace(settings, pack=pack)
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    result = train(undisturbed)
    assert result.steps > 5
    for step in range(1, result.steps + 1, every):
        out = tmp_path / f"killed-{step}"
        killed = replace(settings, out=out)
        killed_at(killed, step)
        saved = (step - 1) // 2 * 2
        assert [path.name for path in checkpoints_in(out)][-1:] == (
            [f"step-{saved:08d}"] if saved else []
        )
        again = train(killed)
        assert (again.steps, again.examples, again.tokens) == (
            result.steps,
            result.examples,
            result.tokens,
        )
        assert (again.before, again.after) == (result.before, result.after)
        assert_same_run(out, undisturbed.out)


def test_dropout_goes_on_where_it_was(
    settings: TrainSettings, make_model: Make, tmp_path: Path
) -> None:
    """The random state is part of a checkpoint, and a resumed model trains as before."""
    noisy = make_model(attention_dropout=0.2)
    settings = replace(settings, model=str(noisy), eval_fraction=0, eval_every=None)
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    train(undisturbed)
    killed_at(settings, 5)
    train(settings)
    assert_same_run(settings.out, undisturbed.out)
    still = replace(settings, out=tmp_path / "still", model=str(make_model()))
    train(still)
    assert log(still.out) != log(settings.out)


def test_a_run_killed_again_and_again_ends_with_the_same_weights(
    settings: TrainSettings, tmp_path: Path
) -> None:
    for step in (3, 4, 6, 7):
        killed_at(settings, step)
    train(settings)
    undisturbed = replace(settings, out=tmp_path / "undisturbed", save_every=None)
    train(undisturbed)
    assert_same_run(settings.out, undisturbed.out)


def test_a_resumed_run_takes_only_the_steps_that_are_left(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(settings, 5)
    taken = []
    take = Stepper.step

    def count(self: Stepper, number: int, *arguments: Any) -> StepResult:
        taken.append(number)
        return take(self, number, *arguments)

    monkeypatch.setattr(Stepper, "step", count)
    result = train(settings)
    assert taken == list(range(5, result.steps + 1))


def test_adapters_are_resumed_too(settings: TrainSettings, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = replace(settings, lora_rank=2)
    killed_at(settings, 5)
    files = list(checkpoints_in(settings.out)[-1].glob("*.safetensors"))
    parts = TensorReader(files).metadata.state_dict_metadata
    saved = [name for name in parts if name.startswith("model.")]
    assert saved
    assert all("lora_" in name for name in saved)  # the frozen weights are the base's
    train(settings)
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    train(undisturbed)
    assert_same_run(settings.out, undisturbed.out)


def test_the_last_checkpoints_are_kept(settings: TrainSettings) -> None:
    settings = replace(settings, save_every=1, keep_checkpoints=3)
    killed_at(settings, 6)
    assert [path.name for path in checkpoints_in(settings.out)] == [
        "step-00000003",
        "step-00000004",
        "step-00000005",
    ]
    assert not list((settings.out / "checkpoints").glob(".*"))


def test_never_resuming_starts_over(settings: TrainSettings, tmp_path: Path) -> None:
    killed_at(settings, 5)
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    train(undisturbed)
    fresh = replace(settings, resume="never")
    killed_at(fresh, 1)
    assert checkpoints_in(settings.out) == []
    train(fresh)
    assert_same_run(settings.out, undisturbed.out)


def test_a_checkpoint_of_another_run_is_refused(settings: TrainSettings) -> None:
    killed_at(settings, 3)
    with pytest.raises(UserError, match=r"settings.learning_rate is 0.001 there and 0.002 now"):
        train(replace(settings, learning_rate=0.002))
    assert settings_in(settings.out)["learning_rate"] == 0.001  # and the plan is still this run's
    kept = checkpoints_in(settings.out)
    with pytest.raises(UserError, match=r"settings.learning_rate is 0.001 there and 0.002 now"):
        train(replace(settings, learning_rate=0.002, resume="never"))
    assert checkpoints_in(settings.out) == kept
    train(settings)


def test_a_run_that_cannot_start_anew_keeps_what_it_would_go_on_from(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(settings, 3)
    kept = checkpoints_in(settings.out)
    assert kept

    def load(*_: Any) -> Any:
        raise UserError("model tiny: cannot be loaded")

    with monkeypatch.context() as patch:
        patch.setattr("qpipe.trainer.run.train.load_student", load)
        with pytest.raises(UserError, match="cannot be loaded"):
            train(replace(settings, resume="never"))
    assert checkpoints_in(settings.out) == kept


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "the device is out of memory: free some"),
        (OSError(5, "Input/output error"), r"cannot be read: \[Errno 5\].*: fix that, then run"),
    ],
)
def test_trouble_with_the_machine_is_not_called_damage(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, trouble: Exception, words: str
) -> None:
    """Or a user would remove good checkpoints, one after the other."""
    killed_at(settings, 5)

    def load(*_: Any, **__: Any) -> Any:
        raise trouble

    with monkeypatch.context() as patch:
        patch.setattr("qpipe.trainer.run.checkpoint.load", load)
        with pytest.raises(UserError, match=f"step-00000004: {words}") as caught:
            train(settings)
    assert "remove" not in str(caught.value)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from qpipe.trainer.run import checkpoint

    save = checkpoint.save

    def full_disk(*arguments: Any, **options: Any) -> Any:
        file = options["storage_writer"].path
        if "00000004" in str(file):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full_disk)
        with pytest.raises(UserError, match=r"step-00000004: cannot be written: .*No space left"):
            train(settings)
    names = [path.name for path in (settings.out / "checkpoints").iterdir()]
    assert names == ["step-00000002"]
    train(settings)
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    train(undisturbed)
    assert_same_run(settings.out, undisturbed.out)


def test_packing_and_any_cut_train_the_same_model(settings: TrainSettings, tmp_path: Path) -> None:
    train(settings)
    for name, change in {
        "padded": {"pack": False},
        "one by one": {"forward_tokens": 1},
        "padded in pieces": {"pack": False, "forward_tokens": 20},
        "packed in pieces": {"forward_tokens": 20},
    }.items():
        other = replace(settings, out=tmp_path / name, **change)
        train(other)
        torch.testing.assert_close(weights(other.out), weights(settings.out), rtol=1e-4, atol=1e-5)


def test_a_model_that_mixes_packed_examples_is_padded(
    settings: TrainSettings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    padded = replace(settings, out=tmp_path / "padded", pack=False)
    train(padded)
    monkeypatch.setattr("qpipe.trainer.run.train.can_pack", lambda _: False)
    train(settings)
    lines = capsys.readouterr().err.splitlines()
    by_option, by_need = (line for line in lines if line.startswith("model "))
    assert "; attention sdpa, demonstrations padded by --no-pack; " in by_option
    assert "padded as packed demonstrations would not stay apart in it; " in by_need
    assert_same_run(settings.out, padded.out)


def test_a_step_of_tokens_resumes_at_the_same_places(
    settings: TrainSettings, tmp_path: Path
) -> None:
    settings = replace(settings, step_tokens=40)
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    train(undisturbed)
    killed_at(settings, 5)
    train(settings)
    assert_same_run(settings.out, undisturbed.out)


@pytest.mark.slow
def test_one_process_then_two_then_one_see_every_sample_once(
    settings: TrainSettings, tmp_path: Path
) -> None:
    settings = replace(settings, save_every=1)
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    result = train(undisturbed)

    killed_at(settings, 3)
    train_in_two_processes((settings, 6))
    assert checkpoints_in(settings.out)[-1].name == "step-00000005"

    again = train(settings)
    assert (again.examples, again.tokens) == (result.examples, result.tokens)
    tokens = [line["tokens"] for line in log(settings.out) if line["event"] == "step"]
    assert tokens == [line["tokens"] for line in log(undisturbed.out) if line["event"] == "step"]
    torch.testing.assert_close(
        weights(settings.out), weights(undisturbed.out), rtol=1e-3, atol=1e-5
    )


def test_steps_are_read_ahead_and_the_thread_ends(settings: TrainSettings) -> None:
    import threading

    assert run_module.STEPS_AHEAD >= 1
    train(settings)
    assert not any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate())
