"""The line on what a run uses of a model, with numbers counted by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.trainer.models.adapters import Adapters, with_adapters
from qpipe.trainer.models.attention.packing import can_pack
from qpipe.trainer.models.heads import HeadForm
from qpipe.trainer.models.student import Student, load_student
from qpipe.trainer.models.summary import summary, trained_weights
from qpipe.trainer.run.train import train
from qpipe.trainer.settings import TrainSettings
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

_SHAPE: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# of a layer of Llama: q, k, v, o, three of the MLP, two norms
_LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32


def test_a_run_says_what_it_uses_in_one_line(
    settings: TrainSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(settings, max_steps=1))
    dense, table = 2 * _LAYER + 32, 200 * 32
    assert capsys.readouterr().err.splitlines()[0] == (
        f"model {Path(settings.model).name}: trains {dense + 2 * table:,} of {dense + 2 * table:,} "
        f"weights ({dense:,} dense, {table:,} embeddings, {table:,} head); packed attention; fused "
        "loss"
    )


def test_adapters_are_counted_apart(model: Path) -> None:
    pytest.importorskip("peft")
    from qpipe.trainer.models.files import find_model

    student = load_student(find_model(str(model)), False, Adapters(4, targets=("q_proj",)))
    assert trained_weights(student.model) == {"adapters": 2 * 4 * (32 + 32)}
    said = summary(student, is_packed=False, wants_packing=False)
    total = 2 * _LAYER + 32 + 2 * 200 * 32 + 512
    assert said.startswith(f"trains 512 of {total:,} weights (512 adapters); attention sdpa, ")


def _mixture() -> Any:
    sizes: dict[str, Any] = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 16}
    config = Qwen2MoeConfig(**_SHAPE, **sizes, num_experts=4, tie_word_embeddings=True)
    return Qwen2MoeForCausalLM(config)


def test_experts_routers_and_tied_heads_are_told_apart() -> None:
    assert {
        kind: count for kind, count in trained_weights(_mixture()).items() if kind != "dense"
    } == {
        "experts": 2 * 4 * 3 * 32 * 24,
        "routers": 2 * 4 * 32,
        "embeddings": 200 * 32,  # the head's too
    }


def test_adapters_on_experts_are_adapters() -> None:
    pytest.importorskip("peft")
    assert set(trained_weights(with_adapters(_mixture(), Adapters(2)))) == {"adapters"}


def test_a_head_with_a_soft_cap_and_layers_that_cannot_be_packed() -> None:
    capped = Gemma2Config(**_SHAPE, final_logit_softcapping=3.0)
    student = Student(Gemma2ForCausalLM(capped))
    assert summary(student, can_pack(student.model), True).endswith(
        "; packed attention; fused loss with soft cap 3"
    )
    student.head_form = HeadForm(0.5)
    assert summary(student, True, True).endswith("; fused loss of scale 0.5")
    student.model.config.layer_types = ["chunked_attention", "full_attention"]
    assert "padded as it has layers of chunked_attention; " in summary(student, False, True)


def test_a_model_with_a_state_runs_the_plain_loss_where_its_head_is_unknown() -> None:
    config = MambaConfig(vocab_size=200, hidden_size=32, num_hidden_layers=1, state_size=4)
    model: Any = MambaForCausalLM(config)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    said = summary(Student(model), can_pack(model), True)
    assert "; attention eager, demonstrations padded as it has layers of linear_attention; " in said
    assert said.endswith(
        "; plain loss, which takes more memory and time, as its output head is not recognised"
    )
