"""What a student is on disk."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.trainer.models.adapters import Adapters
from qpipe.trainer.models.files import find_model
from qpipe.trainer.models.saving import save_model
from qpipe.trainer.models.student import Student, load_student
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...support.runs import Killed, Make


@pytest.fixture
def settings(settings: TrainSettings) -> TrainSettings:
    """A run that moves the weights far."""
    return replace(settings, learning_rate=1e-2)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(1, 9)[None]).logits


def test_an_adapter_by_itself(settings: TrainSettings, tmp_path: Path) -> None:
    """peft puts it on the base again: the model that a run without the option saves merged."""
    peft = pytest.importorskip("peft")
    kept = replace(settings, lora_rank=4, keep_adapter=True, eval_fraction=0.3)
    train(kept)
    names = {path.name for path in kept.out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} < names
    assert not {"model.safetensors", "config.json", "README.md"} & names
    config = json.loads((kept.out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path(settings.model).resolve())
    assert json.loads((kept.out / "qpipe.json").read_text())["files"].keys() > {"tokenizer.json"}
    AutoTokenizer.from_pretrained(kept.out)
    merged = replace(settings, lora_rank=4, eval_fraction=0.3, out=tmp_path / "merged")
    result = train(merged)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(kept.out)
    whole = AutoModelForCausalLM.from_pretrained(merged.out)
    torch.testing.assert_close(logits(adapted), logits(whole), rtol=1e-4, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(settings.model)
    assert (logits(adapted) - logits(base)).abs().max() > 0.01
    assert result.after is not None
    with pytest.raises(UserError, match=r"settings.keep_adapter is true there and false now"):
        train(replace(kept, keep_adapter=False))


def test_an_adapter_is_kept_only_where_there_is_one(settings: TrainSettings) -> None:
    with pytest.raises(UserError, match="--keep-adapter needs an adapter: give --lora-rank"):
        replace(settings, keep_adapter=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_leaves_the_student_as_it_is(
    make_model: Make, tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    """In the middle of a training: its float32 weights are rounded in the copy alone."""
    base = find_model(str(make_model(dtype, tie_word_embeddings=tied)))
    student = load_student(base, gradient_checkpointing=False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    save_model(student, base, tmp_path, is_main=True)
    torch.testing.assert_close(student.model.state_dict(), before, rtol=0, atol=0)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.dtype == dtype
    assert saved.config.tie_word_embeddings == tied
    rounded = {name: value.to(dtype) for name, value in before.items()}
    torch.testing.assert_close(saved.state_dict(), rounded, rtol=0, atol=0)
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in base.folder.iterdir()
    }


def test_adapters_are_merged_in_the_copy_alone(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = find_model(str(model))
    student = load_student(base, gradient_checkpointing=False, adapters=Adapters(2))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    save_model(student, base, tmp_path, is_main=True)
    torch.testing.assert_close(student.model.state_dict(), before, rtol=0, atol=0)
    expected = Student(student.model)
    expected.finish(torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(saved.state_dict(), expected.model.state_dict(), rtol=0, atol=0)


def test_a_run_killed_while_its_files_moved_is_saved_again(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer of several templates has a folder of them, which is there already then."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    folder = settings.out.with_name("model")
    shutil.copytree(settings.model, folder)
    tokenizer.save_pretrained(folder)
    named = replace(settings, model=str(folder))

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("qpipe.trainer.run.train.finish", killed)
        with pytest.raises(Killed):
            train(named)
    assert (named.out / "additional_chat_templates/tools.jinja").exists()
    train(named)
    files = json.loads((named.out / "qpipe.json").read_text())["files"]
    assert files["additional_chat_templates/tools.jinja"]["bytes"] == len("{{ tools }}")
    assert None not in files.values()
    (named.out / "additional_chat_templates/tools.jinja").unlink()
    with pytest.raises(UserError, match=r"tools.jinja: missing or damaged"):
        train(named)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_of_a_model_have_the_mode_of_the_umask(settings: TrainSettings, umask: int) -> None:
    before = os.umask(umask)
    try:
        train(settings)
    finally:
        os.umask(before)
    files = [path for path in settings.out.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_an_adapter_is_not_a_model(settings: TrainSettings) -> None:
    pytest.importorskip("peft")
    kept = replace(settings, lora_rank=4, keep_adapter=True)
    train(kept)
    with pytest.raises(UserError, match="is an adapter, not a model: merge it into its base first"):
        find_model(str(kept.out))
