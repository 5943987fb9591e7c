"""Steps of transformers' Trainer and of TRL's SFTTrainer: plain SFT on the same examples."""

import tempfile
import time
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from qpipe.pipeline.format.records import TargetExample
from qpipe.tests.benchmarks.train_step import padded_rows
from qpipe.trainer.models.attention.packed_attention import GROUPED
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from .measure import DEVICE, synchronize
from .work import PACK, Times, make_model

_FLASH = "varlen_of_torch"  # transformers looks for packages where a name has "flash"
STEPS = 9  # of which the first four warm up
_WARM_UP = 4


def trainer_steps(size: str, steps: list[list[TargetExample]], kind: str) -> Times:
    """The tokens and seconds of a trainer's steps: `padded`, `packed` (Trainer's), or `trl`.

    Trainer makes a pack of the examples of a batch, TRL one of up to as many tokens as ours have.
    Both hand the lengths on to flash attention, for which torch's own stands in.
    """
    AttentionInterface.register(_FLASH, _flash)
    examples = list(chain.from_iterable(steps))
    batch = round(len(examples) / len(steps))
    rows = Dataset.from_list([_row(each) for each in examples * 3])
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": STEPS,
        "per_device_train_batch_size": 1 if kind == "trl" else batch,
        "learning_rate": 1e-6,
        "weight_decay": 0.0,
        "bf16": DEVICE.type == "cuda",
        "use_cpu": DEVICE.type != "cuda",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    model = make_model(size)
    model.set_attn_implementation("sdpa" if kind == "padded" else _FLASH)
    given: dict[str, Any] = {"model": model, "train_dataset": rows}
    clock = _Clock()
    if kind == "trl":
        trainer = _trl(given, options)
    else:
        flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        given["data_collator"] = flat if kind == "packed" else padded_rows
        trainer = Trainer(**given, args=TrainingArguments(**options))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.data_collator = clock.counting(trainer.data_collator)
    trainer.train()
    # the loader collates ahead, so there may be more batches than steps
    yield from zip(clock.tokens[_WARM_UP:STEPS], clock.times[_WARM_UP:], strict=True)


def _trl(given: dict[str, Any], options: dict[str, Any]) -> Any:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    own: dict[str, Any] = {"packing": True, "packing_strategy": "bfd", "max_length": PACK}
    own |= {"use_liger_kernel": DEVICE.type == "cuda", "gradient_checkpointing": False}
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"
    )
    return SFTTrainer(**given, processing_class=tokenizer, args=SFTConfig(**options, **own))


class _Clock(TrainerCallback):
    """Takes the time of steps, and counts the tokens of batches."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.times.append(time.perf_counter() - self.start)

    def counting(self, collate: Any) -> Any:
        def counted(rows: list[dict[str, Any]]) -> Any:
            batch = collate(rows)
            ids = batch["input_ids"]
            self.tokens.append(int(batch.get("attention_mask", torch.ones_like(ids)).sum()))
            return batch

        return counted


def _row(example: TargetExample) -> dict[str, list[int]]:
    """Token ids, and the observed tokens as labels."""
    labels = torch.full((len(example.input_ids),), -100)
    ids = torch.from_numpy(example.input_ids).long()
    positions = torch.from_numpy(example.positions).long()
    labels[positions] = ids[positions]
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def _flash(
    module: torch.nn.Module,
    query_1HTd: Tensor,
    key_1HTd: Tensor,
    value_1HTd: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a pack, by the lengths that the trainers' collators give."""
    states = query_1HTd, key_1HTd, value_1HTd
    if query_1HTd.is_cuda:
        query, key, value = (each[0].transpose(0, 1).bfloat16() for each in states)
        ends, longest = cu_seq_lens_q, max_length_q
        found: Any = varlen_attn(
            *(query, key, value, ends, ends, longest, longest),
            scale=scaling,
            window_size=(-1, 0),
            **GROUPED,
        )
        return found[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(each.split(lengths, 2) for each in states), strict=True)
    outputs = [
        scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=True)
        for part in parts
    ]
    return torch.cat(outputs, 2).transpose(1, 2), None
