"""Which weights decay, and optimizers from elsewhere."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.trainer.run.checkpoint import checkpoints_in
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from qpipe.trainer.step.optimizer import make_optimizer, parameter_groups
from transformers import Qwen2Config, Qwen2ForCausalLM

from ...support.runs import killed_at, read_log, weights


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_alone_decay(tied: bool) -> None:
    """Qwen2 has biases, norms, embeddings, and a head of its own or theirs."""
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )
    decaying, others = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    layer = "model.layers.0."
    linear = [f"self_attn.{name}_proj" for name in "qkvo"]
    linear += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    matrices = {f"{layer}{name}.weight" for name in linear}
    assert {name_of[p] for p in decaying["params"]} == matrices | (
        {"lm_head.weight"} - {tied and "lm_head.weight"}
    )
    biases = {f"{layer}self_attn.{name}_proj.bias" for name in "qkv"}
    norms = {f"{layer}{name}_layernorm.weight" for name in ("input", "post_attention")}
    assert {name_of[p] for p in others["params"]} == biases | norms | {
        "model.norm.weight",
        "model.embed_tokens.weight",
    }


def test_frozen_weights_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[0].requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [group["params"] for group in groups] == [[model[1].weight], [model[1].bias]]


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("name", ["adamw-8bit", "adamw-paged-8bit"])
def test_an_optimizer_whose_library_is_missing(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"--optimizer {name} needs .*: pip install 'qpipe\[8bit\]"
    ):
        make_optimizer(name, torch.nn.Linear(2, 2), 1e-3, 0.0)  # pyright: ignore[reportArgumentType]


def test_eight_bit_moments_come_close_and_are_resumed(
    settings: TrainSettings, tmp_path: Path
) -> None:
    """Wherever bitsandbytes is installed; it runs on the CPU too."""
    pytest.importorskip("bitsandbytes")
    settings = replace(settings, optimizer="adamw-8bit", batch_size=4, save_every=2)
    undisturbed = replace(settings, out=tmp_path / "undisturbed")
    train(undisturbed)
    assert_resumes_as(settings, undisturbed)
    plain = replace(settings, out=tmp_path / "plain", optimizer="adamw")
    train(plain)
    ours, theirs = weights(undisturbed.out), weights(plain.out)
    base = weights(Path(settings.model))
    moved = sum(float((theirs[name] - base[name]).abs().sum()) for name in base)
    apart = sum(float((theirs[name] - ours[name]).abs().sum()) for name in base)
    assert 0 < apart < 0.2 * moved


def assert_resumes_as(settings: TrainSettings, undisturbed: TrainSettings) -> None:
    killed_at(settings, 4)
    assert checkpoints_in(settings.out)[-1].name == "step-00000002"
    train(settings)
    torch.testing.assert_close(weights(settings.out), weights(undisturbed.out), rtol=0, atol=0)
    assert [line["step"] for line in read_log(settings.out)] == [1, 2, 3, 4, 5]
