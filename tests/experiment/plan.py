"""What the experiment consists of, as data: sizes, methods, conditions, and the list of runs.

A run trains one model by one method and judges it in one exam. Learning rates are chosen for each
method and start in validation exams, on clean demonstrations of the first seed; test exams follow.
"""

from dataclasses import dataclass
from typing import Any, Literal

Start = Literal["cold", "warm"]
Data = Literal["clean", "corrupted"]
ExamName = Literal["validation", "test"]

LANES = 2  # runs side by side
CORRUPTED_SHARE = 0.4
STARTS: tuple[Start, ...] = ("cold", "warm")
CONDITIONS: tuple[tuple[Start, Data], ...] = (
    ("cold", "clean"),
    ("cold", "corrupted"),
    ("warm", "clean"),
    ("warm", "corrupted"),
)
ONE_SEED_IS_ENOUGH: tuple[Start, Data] = ("warm", "clean")  # of the four the least to be learnt


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything: numbers of demonstrations, problems, seeds."""

    demonstrations: int  # that a run trains on, once
    warm: int  # that the warm start has seen
    teacher: int  # that the teacher has seen
    validation: int
    test: int
    held_out: int  # demonstrations that NLL is taken of
    unlike: int  # chats on other subjects
    seeds: int
    learning_rates: tuple[float, ...]  # that are tried
    conditions: tuple[tuple[Start, Data], ...] = CONDITIONS


FULL = Size(160, 80, 600, 100, 400, 50, 10, 3, (3e-5, 1e-4, 3e-4))
QUICK = Size(8, 8, 16, 4, 8, 4, 1, 1, (1e-4,), (("cold", "clean"), ("warm", "corrupted")))


@dataclass(frozen=True, slots=True)
class Variant:
    """A method in one of its forms, as a row of the tables."""

    name: str
    method: str
    form: str
    params: tuple[str, ...] = ()
    has_teacher: bool = False


VARIANTS = (
    Variant("sft", "sft", "frozen-target"),
    Variant("sft+kl", "sft+kl", "frozen-target", ("lam=0.1",)),
    Variant("gift", "gift", "frozen-target", ("beta=5",)),
    Variant("dft live", "dft", "live"),
    Variant("dft frozen-target", "dft", "frozen-target"),
    Variant("dft frozen-weight", "dft", "frozen-weight"),
    Variant("asft live", "asft", "live"),
    Variant("asft frozen-target", "asft", "frozen-target"),
    Variant("kd", "kd", "frozen-target", has_teacher=True),
    Variant("target-sft live", "target-sft", "live", has_teacher=True),
    Variant("target-sft frozen", "target-sft", "frozen-target", has_teacher=True),
)


@dataclass(frozen=True, slots=True)
class Kept:
    """How much of each distribution is scored and stored."""

    name: str
    top_k: int = 64
    top_p: float = 0.99
    max_support: int = 64
    precision: str = "uint8"


DEFAULT = Kept("99 %, at most 64")
DENSE = Kept("everything", top_k=49152, top_p=1.0, max_support=49152, precision="float32")
KEPT = (
    DENSE,
    DEFAULT,
    Kept("80 %", top_p=0.8),
    Kept("top 2", top_p=1.0, max_support=2),
    Kept("top 1", top_p=1.0, max_support=1),
)
KEPT_VARIANT = next(v for v in VARIANTS if v.name == "kd")  # nothing but the stored distribution
KEPT_START: Start = "warm"
KEPT_DATA: Data = "corrupted"


@dataclass(frozen=True, slots=True)
class Run:
    """One model to train, and the exam that it sits."""

    exam: ExamName
    start: Start
    data: Data
    variant: Variant
    seed: int
    learning_rate: float
    kept: Kept = DEFAULT

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to train."""
        return self.learning_rate > 0

    @property
    def targets_name(self) -> str:
        """What names its targets."""
        kept = "" if self.kept == DEFAULT else f"-{self.kept.name}"
        return f"{self.start}-{self.data}-{self.variant.name}{kept}-seed{self.seed}".replace(
            " ", "-"
        )

    @property
    def model_name(self) -> str:
        """What names its model; runs that differ in their exam alone share it."""
        return f"{self.targets_name}-lr{self.learning_rate:g}"

    @property
    def key(self) -> str:
        """What names the run."""
        return f"{self.exam} {self.model_name}"

    def described(self) -> dict[str, Any]:
        """What its record says of it."""
        return {
            "key": self.key,
            "exam": self.exam,
            "start": self.start,
            "data": self.data,
            "variant": self.variant.name,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "kept": self.kept.name,
        }


UNTRAINED = Variant("untrained", "", "")
TEACHER = Variant("the teacher", "", "")


def reference_runs() -> list[Run]:
    """The teacher, which takes longest to make, and the models that everything starts from."""
    untrained = [Run("test", start, "clean", UNTRAINED, 0, 0.0) for start in STARTS]
    return [Run("test", "cold", "clean", TEACHER, 0, 0.0), *untrained]


def search_runs(size: Size, start: Start, variant: Variant) -> list[Run]:
    """The runs that a method's learning rate is chosen by; none where there is no choice."""
    if len(size.learning_rates) == 1:
        return []
    return [
        Run("validation", start, "clean", variant, 0, learning_rate)
        for learning_rate in size.learning_rates
    ]


def final_runs(
    size: Size, start: Start, variant: Variant, seed: int, learning_rate: float
) -> list[Run]:
    """A method's runs of one seed that count."""
    return [
        Run("test", start, data, variant, seed, learning_rate)
        for of_start, data in conditions(size, seed)
        if of_start == start
    ]


def conditions(size: Size, seed: int) -> list[tuple[Start, Data]]:
    """The conditions that a seed is tried in."""
    return [each for each in size.conditions if seed == 0 or each != ONE_SEED_IS_ENOUGH]


def kept_run(kept: Kept, seed: int, learning_rate: float) -> Run:
    """The run of a seed that keeps so much; with the default it is one of `final_runs`."""
    return Run("test", KEPT_START, KEPT_DATA, KEPT_VARIANT, seed, learning_rate, kept)
