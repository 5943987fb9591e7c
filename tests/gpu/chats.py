"""Conversations to score, and their tokens."""

import json
from pathlib import Path

import numpy as np

ARITHMETIC = Path(__file__).parents[2] / "data" / "arithmetic.jsonl"
QUESTION_WORDS = 8  # more than the questions have, so that about 40 % of the tokens are supervised
SHARED_WORDS = 80  # of the shared beginning: about 60 % of a conversation


def make_chats(path: Path, count: int, shared: bool) -> Path:
    """Write conversations of arithmetic: with several turns, or short with a shared beginning."""
    rows = [json.loads(line)["messages"] for line in ARITHMETIC.read_text().splitlines()]
    words = sorted({word for row in rows for turn in row for word in turn["content"].split()})
    rng = np.random.default_rng(0)
    system = {"role": "system", "content": " ".join(rng.choice(words, SHARED_WORDS))}
    with path.open("w") as file:
        for _ in range(count):
            turns = 2 if shared else rng.integers(2, 9)
            messages = [system] if shared else []
            for row in rng.choice(len(rows), turns, replace=False):
                for message in rows[row]:
                    text = message["content"]
                    if message["role"] == "user":
                        text = f"{' '.join(rng.choice(words, QUESTION_WORDS))} {text}"
                    messages.append({"role": message["role"], "content": text})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
