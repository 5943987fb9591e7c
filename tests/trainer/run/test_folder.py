"""The folder of a run, and what no run is made of."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.trainer.models.files import find_model
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings

from ...support.runs import Examples, Killed, Make, assert_same_weights


def test_a_finished_run_is_not_repeated(settings: TrainSettings, tmp_path: Path) -> None:
    settings = replace(settings, eval_fraction=0.2)
    first = train(settings)
    before = {path: path.stat().st_mtime_ns for path in settings.out.iterdir()}
    # the same gradients and the same content elsewhere are the same run
    moved = settings.targets.rename(tmp_path / "moved")
    again = train(replace(settings, targets=moved, forward_tokens=24, epochs=1))
    assert again == replace(first, was_done=True)
    assert {path: path.stat().st_mtime_ns for path in settings.out.iterdir()} == before


def test_a_finished_run_that_lost_its_model_is_not_called_done(settings: TrainSettings) -> None:
    train(settings)
    (settings.out / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: missing or damaged"):
        train(settings)


def test_a_run_killed_at_its_very_end_is_finished(settings: TrainSettings) -> None:
    """Between the writing of the record and the removal of the plan."""
    train(settings)
    (settings.out / "plan.json").write_text("{}")
    assert train(settings).was_done
    assert not (settings.out / "plan.json").exists()


def test_another_run_in_the_folder_is_refused(settings: TrainSettings) -> None:
    train(settings)
    with pytest.raises(UserError, match=r"settings.learning_rate is 0.001 there and 0.002 now"):
        train(replace(settings, learning_rate=0.002))
    with pytest.raises(UserError, match=r'settings.method is "sft\+kl" there and "sft" now'):
        train(replace(settings, method="sft"))
    with pytest.raises(UserError, match=r"settings.batch_size is 8 there and 4 now"):
        train(replace(settings, batch_size=4))


def test_a_folder_with_something_else_is_refused(settings: TrainSettings) -> None:
    settings.out.mkdir()
    (settings.out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        train(settings)
    assert [path.name for path in settings.out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("stage", ["save_model", "finish", "Stepper"])
def test_a_run_interrupted_before_a_checkpoint_starts_over(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"qpipe.trainer.run.train.{stage}", killed)
        with pytest.raises(Killed):
            train(settings)
    assert not (settings.out / "qpipe.json").exists()
    half_saved = settings.out / ".model.tmp" / "left-by-the-killed-run.json"
    half_saved.parent.mkdir()
    half_saved.write_text("{")
    assert not train(settings).was_done
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    train(undisturbed)
    assert_same_weights(settings.out, undisturbed.out, rtol=0, atol=0)
    assert {path.name for path in settings.out.iterdir()} == {
        path.name for path in undisturbed.out.iterdir()
    }


# What is refused


def test_targets_of_another_tokenizer(
    settings: TrainSettings, make_targets: Make, make_examples: Examples
) -> None:
    folder = make_targets(make_examples(2), "other", tokenizer_hash="f" * 64)
    ours = find_model(settings.model).tokenizer_hash
    with pytest.raises(UserError, match=rf"tokenizer hash f{{64}}, model \S+ has {ours}: "):
        train(replace(settings, targets=folder))
    assert not settings.out.exists()


def test_targets_of_another_vocabulary(
    settings: TrainSettings, make_targets: Make, make_examples: Examples
) -> None:
    folder = make_targets(make_examples(2), "other", vocab_size=256)
    with pytest.raises(UserError, match=r"vocab size 256, model \S+ has 200: "):
        train(replace(settings, targets=folder))


def test_unsealed_targets(settings: TrainSettings) -> None:
    (settings.targets / "manifest.json").rename(settings.targets / "manifest.bak")
    with pytest.raises(UserError, match=r"not a qpipe folder, it has no manifest\.json"):
        train(settings)


def test_a_method_that_the_folder_does_not_hold(settings: TrainSettings) -> None:
    with pytest.raises(UserError, match=r"holds sft\+kl targets: .*build-targets --method gift"):
        train(replace(settings, method="gift"))


def test_nothing_to_train_on(
    settings: TrainSettings, make_targets: Make, make_examples: Examples
) -> None:
    with pytest.raises(UserError, match="has no supervised token to train on"):
        train(replace(settings, targets=make_targets([], "empty")))
    one = make_targets(make_examples(1), "one")
    with pytest.raises(UserError, match="holds out all of the 1 examples"):
        train(replace(settings, targets=one, eval_fraction=0.999))
    with pytest.raises(UserError, match="holds out none of the 1 examples"):
        train(replace(settings, targets=one, eval_fraction=0.001))
    assert not settings.out.exists()


def test_a_model_without_weights(settings: TrainSettings, make_model: Make) -> None:
    base = make_model()
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        train(replace(settings, model=str(base)))


def test_float16_needs_a_gpu(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--precision float16 needs a GPU"):
        train(replace(settings, precision="float16"))


def test_more_processes_than_gpus_are_refused(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 3 on this machine has no GPU, of which there"):
        train(settings)
    assert not settings.out.exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_a_quantised_model_is_refused(settings: TrainSettings, tmp_path: Path, method: str) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(settings.model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model quantised: (cannot be loaded|its weights)"):
        train(replace(settings, model=str(folder)))
