"""Make `arithmetic.jsonl`: worked three-term sums as chat demonstrations.

    python data/make_arithmetic.py > data/arithmetic.jsonl

The output is the same at every run. The answers follow a format that a small model does not know
but can learn from a few hundred demonstrations.
"""

import json
import random

COUNT = 160


def demonstration(number: int, rng: random.Random) -> dict[str, object]:
    """One question with its worked answer."""
    a, b, c = (rng.randint(10, 99) for _ in range(3))
    first, second = rng.choice("+-"), rng.choice("+-")
    partial = a + b if first == "+" else a - b
    total = partial + c if second == "+" else partial - c
    question = f"What is {a} {first} {b} {second} {c}?"
    answer = (
        f"First, {a} {first} {b} = {partial}.\n"
        f"Then, {partial} {second} {c} = {total}.\n"
        f"Answer: {total}"
    )
    return {
        "id": f"arithmetic-{number:04d}",
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
    }


if __name__ == "__main__":
    rng = random.Random(20260611)
    for number in range(COUNT):
        print(json.dumps(demonstration(number, rng)))
