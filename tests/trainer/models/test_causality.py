"""Models that look ahead are refused, for scoring and for training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.errors import UserError
from qpipe.trainer.models.causality import check_causal
from qpipe.trainer.models.files import ModelFiles, load_scoring_model
from qpipe.trainer.models.student import load_student
from transformers import (
    AutoConfig,
    BertConfig,
    BertLMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    ProphetNetConfig,
    ProphetNetForCausalLM,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def bert(**given: Any) -> Any:
    torch.manual_seed(1)
    return BertLMHeadModel(BertConfig(**SHAPE, **given))


def mixtral(**given: Any) -> Any:
    return MixtralForCausalLM(MixtralConfig(**SHAPE, **given))


def test_bert_is_refused(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    tokenizer: Any = None
    files = ModelFiles("mine", None, tmp_path, AutoConfig.from_pretrained(tmp_path), tokenizer)
    message = "model mine: is not a causal language model: in its BertLMHeadModel later tokens"
    with pytest.raises(UserError, match=message):
        load_scoring_model(files, torch.float32)
    with pytest.raises(UserError, match=message):
        load_student(files, gradient_checkpointing=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: bert(is_decoder=True),
        lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=2)),
    ],
    ids=["BERT as a decoder", "experts"],
)
def test_causal_models_pass_in_any_precision(make: Callable[[], Any], dtype: torch.dtype) -> None:
    model = make().to(dtype).train()
    check_causal("mine", model)
    assert model.training


def test_a_model_whose_logits_depend_on_the_length_of_the_batch_is_refused() -> None:
    config = ProphetNetConfig(
        vocab_size=200, hidden_size=32, decoder_ffn_dim=48, num_decoder_layers=2, init_std=0.2
    )
    torch.manual_seed(1)
    model: Any = ProphetNetForCausalLM(config)
    with pytest.raises(UserError, match="ForCausalLM has other logits in a longer or padded"):
        check_causal("mine", model)


def test_a_model_that_needs_more_than_token_ids_is_refused() -> None:
    """Stated here by a configuration whose shapes contradict each other."""
    model = mixtral(num_key_value_heads=8)
    with pytest.raises(UserError, match="a MixtralForCausalLM that does not run on token ids"):
        check_causal("mine", model)
