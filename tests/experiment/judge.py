"""What a model folder is worth: greedy answers, the NLL of demonstrations, and what it forgot.

B rows of a batch, T tokens, V vocabulary, N supervised positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from .task import UNLIKE_PROMPTS, Problem, chat

TEMPLATE = Path(__file__).with_name("chat.jinja")
END = "<|im_end|>"
ANSWER_TOKENS = 32  # a right answer has at most 27
SAMPLE_TOKENS = 64
PROMPTS_AT_ONCE, ROWS_AT_ONCE = 400, 25


@dataclass(frozen=True, slots=True)
class Exam:
    """Problems to solve, demonstrations to predict, and chats on other subjects."""

    problems: Sequence[Problem]
    demonstrations: Sequence[dict[str, Any]] = ()
    unlike: Sequence[dict[str, Any]] = ()


def judge(folder: Path, base_folder: Path, exam: Exam) -> dict[str, Any]:
    """The model's answers, and means in nats a token: nll, unlike_nll, kl_to_base.

    kl_to_base is KL(base ‖ model) over the whole vocabulary, at each token of the unlike chats.
    """
    torch.set_grad_enabled(False)
    tokenizer, model = _load(folder)
    judged: dict[str, Any] = {}
    if exam.demonstrations:
        judged["nll"] = _nll(tokenizer, model, exam.demonstrations)
    if exam.unlike:
        judged["unlike_nll"] = _nll(tokenizer, model, exam.unlike)
        _, base = _load(base_folder)
        judged["kl_to_base"] = _divergence(tokenizer, model, base, exam.unlike)
    return judged | {"answers": _answers(tokenizer, model, exam.problems)}


def sample_unlike(folder: Path, count: int) -> list[dict[str, Any]]:
    """Chats on other subjects, the answers drawn from the model itself: the text it expects."""
    torch.manual_seed(0)
    tokenizer, model = _load(folder)
    rows = []
    for number, prompt in enumerate(UNLIKE_PROMPTS[:count]):
        asked = torch.tensor([_prompt_ids(tokenizer, prompt)])
        written = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            do_sample=True,
            top_k=0,
            max_new_tokens=SAMPLE_TOKENS,
            **_ends(tokenizer),
        )
        answer = tokenizer.decode(written[0, asked.shape[1] :], skip_special_tokens=True)
        rows.append(chat(prompt, answer, f"unlike-{number:02d}"))
    return rows


def _load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model.eval()


def _answers(tokenizer: Any, model: Any, problems: Sequence[Problem]) -> list[str]:
    """Greedy answers; problems of two-digit numbers all have prompts of one length."""
    answers: list[str] = []
    for chosen in _batches(problems, PROMPTS_AT_ONCE):
        asked = torch.tensor([_prompt_ids(tokenizer, each.question) for each in chosen])
        written = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            do_sample=False,
            max_new_tokens=ANSWER_TOKENS,
            **_ends(tokenizer),
        )
        answers += tokenizer.batch_decode(written[:, asked.shape[1] :], skip_special_tokens=True)
    return answers


def _nll(tokenizer: Any, model: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Mean −log p of the answers' tokens, their end included."""
    total, tokens = 0.0, 0
    for chosen in _batches(rows, ROWS_AT_ONCE):
        logits_NV, observed_N = _at_answers(tokenizer, model, chosen)
        total += float(cross_entropy(logits_NV, observed_N, reduction="sum"))
        tokens += len(observed_N)
    return total / tokens


def _divergence(tokenizer: Any, model: Any, base: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Mean KL(base ‖ model) at the answers' tokens."""
    total, tokens = 0.0, 0
    for row in rows:
        log_p_NV, log_b_NV = (
            _at_answers(tokenizer, each, [row])[0].log_softmax(1) for each in (model, base)
        )
        total += float(kl_div(log_p_NV, log_b_NV, reduction="sum", log_target=True))
        tokens += len(log_p_NV)
    return total / tokens


def _at_answers(
    tokenizer: Any, model: Any, rows: Sequence[dict[str, Any]]
) -> tuple[Tensor, Tensor]:
    """The logits that predict the answers' tokens, [N, V], and these tokens, [N]."""
    prompts = [_prompt_ids(tokenizer, row["messages"][0]["content"]) for row in rows]
    answers = [
        tokenizer(row["messages"][1]["content"] + END, add_special_tokens=False).input_ids
        for row in rows
    ]
    ids = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
    ids_BT = pad_sequence(ids, batch_first=True)
    length_B1 = torch.tensor([[len(each)] for each in ids])
    start_B1 = torch.tensor([[len(prompt)] for prompt in prompts])
    place_T = torch.arange(ids_BT.shape[1])
    is_there_BT = place_T < length_B1
    hidden_BTD = model.model(ids_BT, attention_mask=is_there_BT.long()).last_hidden_state
    is_answer_BT = is_there_BT & (place_T >= start_B1)
    predicting_BT = is_answer_BT.roll(-1, 1)  # nothing is an answer at place 0
    return model.lm_head(hidden_BTD[predicting_BT]), ids_BT[is_answer_BT]


def _prompt_ids(tokenizer: Any, question: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        chat_template=TEMPLATE.read_text(),
        add_generation_prompt=True,
        tokenize=False,
    )
    return tokenizer(text, add_special_tokens=False).input_ids


def _ends(tokenizer: Any) -> dict[str, int]:
    end = tokenizer.convert_tokens_to_ids(END)
    return {"eos_token_id": end, "pad_token_id": end}


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
