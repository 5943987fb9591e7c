"""A small comparison: a model that is its own teacher behind a hint, against sft+kl.

    python data/self_distillation.py MODEL FOLDER

The hint is the demonstration's own answer, which `qpipe score --context` puts in front of the
teacher's prompt. Each method trains on the first 80 demonstrations of arithmetic.jsonl with three
seeds. The table has the share of 50 other sums that the trained models solve, and their loss and
entropy on held-out demonstrations. A second run only does what is missing.
"""

import json
import random
import sys
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from qpipe.stages.commands.tables import print_table
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import DATA, run
from make_arithmetic import demonstration

SEEDS = (0, 1, 2)
ROWS, PROBLEMS = 80, 50
ANSWER_TOKENS = 40
HINT = "A worked solution, to be written in your own words: {{ messages[-1].content }}"
METHODS = {"sft+kl": (), "kd": ("hinted",)}
TRAINING = ("--eval-fraction", 0.2, "--learning-rate", 1e-4, "--batch-size", 8)
FLOAT32 = ("--precision", "float32")  # far faster on processors without bfloat16


def compare(model: Path, folder: Path) -> None:
    """Score with and without the hint, train each method with each seed, and print the table."""
    folder.mkdir(exist_ok=True)
    rows, scores, hinted = folder / DATA.name, folder / "scores", folder / "hinted"
    rows.write_text("".join(islice(DATA.open(), ROWS)))
    score = ("score", "--model", model, "--demonstrations", rows, "--dtype", "float32")
    run(*score, "--out", scores)
    run(*score, "--at", scores, "--out", hinted, "--context", HINT)
    for method, teachers in METHODS.items():
        teacher = [word for name in teachers for word in ("--teacher", folder / name)]
        targets = folder / method
        run("build-targets", "--scores", scores, *teacher, "--out", targets, "--method", method)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for seed in SEEDS:
        for method, results in found.items():
            out = folder / f"{method}-{seed}"
            train = ("train", "--targets", folder / method, "--model", model, *TRAINING)
            run(*train, *FLOAT32, "--seed", seed, "--out", out)
            results.append(results_of(out))
            print(method, seed, results[-1], flush=True)
    print(f"\nMeans and standard deviations over {len(SEEDS)} seeds")
    names = {"accuracy": "accuracy", "nll": "loss (NLL)", "entropy": "entropy"}
    cells = [
        (method, *(spread([each[name] for each in results]) for name in names))
        for method, results in found.items()
    ]
    print_table([("", *names.values()), *cells])


def results_of(run_folder: Path) -> dict[str, Any]:
    """The accuracy of a trained model, kept beside its folder, and the losses after training."""
    kept = run_folder.with_suffix(".accuracy")
    if not kept.exists():
        kept.write_text(json.dumps(accuracy(run_folder)))
    losses = json.loads((run_folder / "qpipe.json").read_text())["results"]["after"]
    return {"accuracy": json.loads(kept.read_text()), **losses}


def accuracy(model_folder: Path) -> float:
    """The share of new problems whose greedy answer ends in the right line."""
    rng = random.Random(7)
    seen = {json.loads(line)["messages"][0]["content"] for line in DATA.open()}
    chats: list[Any] = [demonstration(number, rng)["messages"] for number in range(2 * PROBLEMS)]
    chats = [chat for chat in chats if chat[0]["content"] not in seen][:PROBLEMS]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    prompts = [
        tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
        for chat in chats
    ]
    asked = torch.tensor(prompts)  # all of one length, as each digit is a token
    written = model.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        pad_token_id=tokenizer.eos_token_id,
    )
    answers = tokenizer.batch_decode(written[:, asked.shape[1] :], skip_special_tokens=True)
    right = [
        answer.strip().splitlines()[-1:] == chat[1]["content"].splitlines()[-1:]
        for answer, chat in zip(answers, chats, strict=True)
    ]
    return mean(right)


def spread(values: list[float]) -> str:
    """The mean and the standard deviation."""
    return f"{mean(values):z.3f} ± {stdev(values):.3f}"


if __name__ == "__main__":
    compare(Path(sys.argv[1]), Path(sys.argv[2]))
