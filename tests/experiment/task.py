"""The task: worked sums of three numbers, right or with the carry dropped, and their verifier.

The answer format is one that a small model does not know beforehand but can learn from some hundred
demonstrations; whether it can add is another matter. Every problem has a carry from the units in at
least one of its two steps, so that each demonstration can be corrupted, and with less than half of
them corrupted the right way stays the more frequent one.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

UNLIKE_PROMPTS = (
    "Write three sentences about a lighthouse in winter.",
    "Explain to a child why the sky is blue.",
    "Give me a recipe for a simple vegetable soup.",
    "What should I look at when I buy a used bicycle?",
    "Write a polite email that asks for a day off.",
    "Describe the water cycle.",
    "Who was Marie Curie?",
    "Suggest a name for a small bakery and say why it fits.",
    "What is the difference between a list and a tuple in Python?",
    "Tell me about the history of paper.",
    "How do plants make their food?",
    "Write a short poem about rain on a tin roof.",
    "What are good habits for sleeping well?",
    "Summarise the story of a hare that loses a race.",
    "Why do some metals rust?",
    "Plan a quiet weekend in a small town by the sea.",
)


@dataclass(frozen=True, slots=True)
class Problem:
    """a + b + c, each of two digits."""

    a: int
    b: int
    c: int

    @property
    def has_carry(self) -> bool:
        """Whether units carry in a step of the right way."""
        return _carries(self.a, self.b) or _carries(self.a + self.b, self.c)

    @property
    def question(self) -> str:
        """What the user asks."""
        return f"{self.a}+{self.b}+{self.c}"

    def answer(self, corrupted: bool = False) -> str:
        """What the assistant writes; corrupted, no step carries from the units."""
        add = _add_without_carry if corrupted else int.__add__
        partial = add(self.a, self.b)
        total = add(partial, self.c)
        return f"{self.a}+{self.b}={partial}\n{partial}+{self.c}={total}\n#{total}"

    def is_solved_by(self, text: str) -> bool:
        """The verifier: the last line is the right sum in the format asked for."""
        lines = text.strip().splitlines()
        return bool(lines) and lines[-1] == f"#{self.a + self.b + self.c}"


def problems(seed: int) -> Iterator[Problem]:
    """Distinct problems in an order that the seed tells, without end for our purposes."""
    rng = random.Random(seed)
    seen: set[Problem] = set()
    while True:
        problem = Problem(*(rng.randint(11, 99) for _ in range(3)))
        if problem.has_carry and problem not in seen:
            seen.add(problem)
            yield problem


def parts(seed: int, **sizes: int) -> dict[str, list[Problem]]:
    """Problems for each part, none in two of them."""
    source = problems(seed)
    return {name: list(islice(source, size)) for name, size in sizes.items()}


def demonstrations(chosen: list[Problem], corrupted_share: float = 0.0) -> list[dict[str, Any]]:
    """Chat rows; of any stretch of them the share is corrupted, spread evenly."""
    return [
        chat(
            problem.question,
            problem.answer(corrupted=_is_due(number, corrupted_share)),
            f"sum-{number:04d}",
        )
        for number, problem in enumerate(chosen)
    ]


def chat(question: str, answer: str, row_id: str) -> dict[str, Any]:
    """A row of demonstrations."""
    return {
        "id": row_id,
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
    }


def _is_due(number: int, share: float) -> bool:
    return int((number + 1) * share + 1e-9) > int(number * share + 1e-9)


def _carries(first: int, second: int) -> bool:
    return first % 10 + second % 10 >= 10


def _add_without_carry(first: int, second: int) -> int:
    return first + second - (10 if _carries(first, second) else 0)
