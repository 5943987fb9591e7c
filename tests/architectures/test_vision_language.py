"""Vision-language checkpoints: the language part is trained, the other parts are kept."""

import json
import re
from pathlib import Path

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.trainer.data.batch import packed_batch, padded_batch
from qpipe.trainer.models.attention.packing import can_pack
from qpipe.trainer.models.files import ModelFiles, find_model
from qpipe.trainer.models.saving import save_model
from qpipe.trainer.models.student import load_student
from safetensors.torch import load_file

from .reference import largest_error, make_examples, own_gradients, reference_gradients
from .vision import CONFIGS, tiny_vision_language_model
from .zoo import VOCAB_SIZE, in_folder

IN_SHORT = {"qwen3_5", "gemma3"}
_OF_VISION = re.compile("vision|visual|projector")
PACKED = {"qwen2_5_vl", "qwen3_vl", "llava", "mistral3", "gemma3"}


@pytest.mark.parametrize(
    "name",
    [each if each in IN_SHORT else pytest.param(each, marks=pytest.mark.slow) for each in CONFIGS],
)
def test_the_language_part_is_trained_and_every_tensor_is_kept(name: str, tmp_path: Path) -> None:
    whole = tiny_vision_language_model(name).eval()
    base = in_folder(whole, tmp_path / "base")
    (base.folder / "preprocessor_config.json").write_text('{"size": 16}')
    student = load_student(base, gradient_checkpointing=False).eval()
    examples = make_examples(VOCAB_SIZE)
    _, expected = reference_gradients(whole, examples)
    assert largest_error(own_gradients(student, padded_batch(examples))[1], expected) < 1e-5
    assert can_pack(student.model) == (name in PACKED)
    if name in PACKED:
        assert largest_error(own_gradients(student, packed_batch(examples))[1], expected) < 1e-5

    _move_trained_weights(student.model)
    save_model(student, base, tmp_path / "saved", is_main=True)
    before, after = (_tensors(tmp_path / each) for each in ("base", "saved"))
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if not _OF_VISION.search(key)}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == [type(whole).__name__]
    assert (tmp_path / "saved" / "preprocessor_config.json").read_text() == '{"size": 16}'


def _move_trained_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.25)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _as_text_model(base: ModelFiles, architecture: str) -> ModelFiles:
    """The same folder, named as that of its text model."""
    path = base.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]}))
    return find_model(str(base.folder))


def test_a_text_model_that_leaves_the_vision_tower_out_is_not_trained(tmp_path: Path) -> None:
    """transformers loads the text model of Qwen3.5 from it without a word."""
    base = in_folder(tiny_vision_language_model("qwen3_5"), tmp_path)
    vision = sum("visual" in name for name in _tensors(tmp_path))
    with pytest.raises(
        UserError,
        match=rf"is a vision-language checkpoint, of which Qwen3_5ForCausalLM holds a part: "
        rf"{vision} tensors would be lost, model.visual.*: give its language model",
    ):
        load_student(_as_text_model(base, "Qwen3_5ForCausalLM"), gradient_checkpointing=False)
