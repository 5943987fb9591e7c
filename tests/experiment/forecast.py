"""What is left to do, and about how long it takes."""

from dataclasses import dataclass
from statistics import median

from .plan import (
    DEFAULT,
    KEPT,
    LANES,
    STARTS,
    VARIANTS,
    Size,
    conditions,
    reference_runs,
    search_runs,
)
from .records import Record, Records

# measured on one of two cores of an AMD EPYC without AVX-512, both at work on the experiment
SECONDS_A_DEMONSTRATION = 0.48  # to train on
SECONDS_A_PROBLEM = 0.22  # to answer
SECONDS_A_RUN = 25.0  # loading, hashing and saving; scores and targets; NLL and KL


@dataclass(frozen=True, slots=True)
class Kind:
    """Runs that take about as long as each other."""

    name: str
    runs: int
    seconds: float  # each, as expected
    done: list[Record]

    @property
    def left(self) -> int:
        """Runs that are not recorded."""
        return max(0, self.runs - len(self.done))

    @property
    def seconds_left(self) -> float:
        """At the pace of those that are, where there are some."""
        paces = [sum(record["seconds"].values()) for record in self.done]
        return self.left * (median(paces) if paces else self.seconds)


def runs_left(size: Size, records: list[Record]) -> tuple[int, int]:
    """Runs that are not recorded, and runs in all."""
    kinds = _kinds(size, records)
    return sum(kind.left for kind in kinds), sum(kind.runs for kind in kinds)


def forecast(size: Size, records: Records) -> str:
    """A line for each kind of run, and the hours that are left."""
    kinds = _kinds(size, list(records.by_key.values()))
    lines = [
        f"{kind.name:38} {kind.runs:4} runs, {kind.left:4} left, {kind.seconds_left / 60:4.0f} min"
        for kind in kinds
    ]
    hours = sum(kind.seconds_left for kind in kinds) / LANES / 3600
    return "\n".join([*lines, f"about {hours:.1f} hours on two free cores"])


def _kinds(size: Size, records: list[Record]) -> list[Kind]:
    training = SECONDS_A_RUN + size.demonstrations * SECONDS_A_DEMONSTRATION
    judging = size.test * SECONDS_A_PROBLEM
    searching = size.validation * SECONDS_A_PROBLEM
    searches = sum(len(search_runs(size, start, each)) for start in STARTS for each in VARIANTS)
    methods = sum(len(conditions(size, seed)) for seed in range(size.seeds)) * len(VARIANTS)
    trained_before = len(STARTS) * len(VARIANTS) if searches else 0  # the search's best ones
    tests = [record for record in records if record["exam"] == "test"]
    trained = [record for record in tests if record["learning_rate"] > 0]
    references = size.warm + size.teacher
    return [
        Kind(
            "the untrained models and the teacher",
            len(reference_runs()),
            references * SECONDS_A_DEMONSTRATION / len(reference_runs()) + judging,
            [record for record in tests if record["learning_rate"] == 0],
        ),
        Kind(
            "search for learning rates",
            searches,
            training + searching,
            [record for record in records if record["exam"] == "validation"],
        ),
        Kind(
            "tests of methods",
            methods,
            training * (1 - trained_before / methods) + judging,
            [record for record in trained if record["kept"] == DEFAULT.name],
        ),
        Kind(
            "tests of how much is kept",
            (len(KEPT) - 1) * size.seeds,
            training + judging,
            [record for record in trained if record["kept"] != DEFAULT.name],
        ),
    ]
