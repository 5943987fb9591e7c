"""LoRA: which layers get an adapter, its scale, and adapters that are trained further."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.trainer.models.adapters import Adapters, with_adapters
from qpipe.trainer.models.files import find_model
from qpipe.trainer.models.student import load_student
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from safetensors.torch import load_file, save_file

from ...support.runs import weights

pytest.importorskip("peft")


def _changed(base: Path, trained: Path) -> set[str]:
    before, after = weights(base), weights(trained)
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_targets_are_the_last_words_of_names(settings: TrainSettings, model: Path) -> None:
    train(replace(settings, lora_rank=2, lora_targets=("q_proj", "up_proj")))
    assert _changed(model, settings.out) == {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    }


def test_layers_that_share_a_weight_get_no_adapter(model: Path) -> None:
    """Merging would add the adapters of both to the one weight."""
    from transformers import AutoModelForCausalLM

    whole: Any = AutoModelForCausalLM.from_pretrained(model)
    first, second = (layer.self_attn for layer in whole.model.layers)
    second.q_proj.weight = first.q_proj.weight
    names = {name for name, _ in with_adapters(whole, Adapters(2)).named_parameters()}
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    assert adapted == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_unknown_targets_are_refused(model: Path) -> None:
    adapters = Adapters(2, targets=("q_proj", "query"))
    with pytest.raises(UserError, match=r"--lora-targets query: no .* some of down_proj, g"):
        load_student(find_model(str(model)), False, adapters)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (6.0, 1.5)])
def test_a_weight_moves_by_alpha_over_rank_times_the_product(
    model: Path, alpha: float | None, scale: float
) -> None:
    student = load_student(find_model(str(model)), False, Adapters(4, alpha, ("q_proj",)))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    layer: Any = student.model.get_submodule(name)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    expected = layer.base_layer.weight.double() + scale * b @ a
    student.finish(torch.float32)
    found = student.model.get_submodule("model.layers.0.self_attn.q_proj").weight
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def adapter(settings: TrainSettings) -> TrainSettings:
    """A run that ended with an adapter of rank 2 in a folder of its own, after half an epoch."""
    kept = replace(settings, out=settings.out.with_name("adapter"), lora_rank=2, keep_adapter=True)
    kept = replace(kept, lora_alpha=6.0, lora_targets=("q_proj",), max_steps=1)
    train(kept)
    return kept


def test_an_adapter_is_trained_further(
    adapter: TrainSettings, settings: TrainSettings, model: Path
) -> None:
    """The loss begins where the first run ended, and the base stays as it is."""
    start = replace(settings, eval_fraction=0.5, eval_every=1)
    merged = replace(start, out=settings.out.with_name("further"), lora_rank=2)
    result = train(replace(merged, model=str(adapter.out)))
    assert _changed(model, merged.out) == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    }

    from peft import AutoPeftModelForCausalLM

    whole: Any = AutoPeftModelForCausalLM.from_pretrained(adapter.out)
    by_hand = settings.out.with_name("by-hand")
    whole.merge_and_unload().save_pretrained(by_hand)
    find_model(str(model)).tokenizer.save_pretrained(by_hand)
    other = replace(start, model=str(by_hand), out=settings.out.with_name("other"), max_steps=1)
    before = train(other).before
    assert before is not None
    assert result.before is not None
    assert result.before.target_loss == pytest.approx(before.target_loss, rel=1e-6)


def test_an_adapter_that_is_trained_further_can_stay_apart(
    adapter: TrainSettings, settings: TrainSettings, model: Path
) -> None:
    further = replace(settings, model=str(adapter.out), lora_rank=2, keep_adapter=True)
    train(further)
    folders = adapter.out, further.out
    configs = [json.loads((each / "adapter_config.json").read_text()) for each in folders]
    assert configs[0] == configs[1]
    assert configs[1]["base_model_name_or_path"] == str(model.resolve())
    before, after = (load_file(each / "adapter_model.safetensors") for each in folders)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    inputs = json.loads((further.out / "qpipe.json").read_text())["identity"]["inputs"]
    assert inputs["model"] == find_model(str(model)).weights_hash()
    assert len(inputs["adapter"]) == 64


def test_options_that_contradict_a_stored_adapter_are_refused(
    adapter: TrainSettings, settings: TrainSettings
) -> None:
    message = "is an adapter of rank 2 and alpha 6: give --lora-rank 2 alone to train it further"
    cases: list[dict[str, Any]] = [{}, {"lora_rank": 4}]
    cases += [{"lora_rank": 2, "lora_alpha": 5.0}, {"lora_rank": 2, "lora_targets": ("q_proj",)}]
    for given in cases:
        with pytest.raises(UserError, match=message):
            train(replace(settings, model=str(adapter.out), **given))
    assert not settings.out.exists()


def test_damaged_and_foreign_adapters_are_refused(
    adapter: TrainSettings, settings: TrainSettings
) -> None:
    further = replace(settings, model=str(adapter.out), lora_rank=2)
    path, file = (adapter.out / f"adapter_{name}" for name in ("config.json", "model.safetensors"))
    config, tensors = json.loads(path.read_text()), load_file(file)
    path.write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(UserError, match=r"not a LoRA adapter alone .*modules_to_save.*: merge it"):
        train(further)
    path.write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(UserError, match="the base of this adapter: model /gone: no such folder"):
        train(further)
    path.write_text(json.dumps(config))
    save_file(dict(list(tensors.items())[1:]), file)
    with pytest.raises(UserError, match=r"does not fit its base: base_model.* is in one of them"):
        train(further)
    file.unlink()
    with pytest.raises(UserError, match="an adapter without adapter_model"):
        train(further)
