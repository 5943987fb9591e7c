"""The records as a Markdown page. Nothing here runs a model.

S seeds, I items.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from statistics import mean, stdev

import numpy as np

from .forecast import runs_left
from .paired import difference_interval, mcnemar, rank_correlation
from .plan import (
    CONDITIONS,
    CORRUPTED_SHARE,
    DEFAULT,
    KEPT,
    KEPT_DATA,
    KEPT_START,
    KEPT_VARIANT,
    ONE_SEED_IS_ENOUGH,
    STARTS,
    TEACHER,
    UNTRAINED,
    VARIANTS,
    Data,
    ExamName,
    Kept,
    Size,
    Start,
    Variant,
)
from .records import Record, best_learning_rate, is_right
from .task import Problem, demonstrations

Parts = Mapping[str, list[Problem]]
Cells = tuple[str, ...]
_BySeed = dict[int, Record]
_Measured = dict[str, dict[int, float]]


def page(records: Iterable[Record], size: Size, parts: Parts) -> str:
    """The whole page; rows whose runs are not all there say how many seeds they have."""
    records = list(records)
    results = [
        section
        for start, data in size.conditions
        for section in (f"## {start}, {data}", _outcomes(records, parts, start, data))
    ]
    sections = [
        "# A small test of the paper's claim",
        "`make experiment` made this page; do not edit it.",
        *_unfinished(records, size),
        _set_up(size, parts),
        *results,
        "## Evidence for the defaults",
        _defaults(records, parts),
        "## Do the ceilings predict the outcome?",
        _predictions(records, parts),
        "## How much of a distribution is needed?",
        _amounts(records, parts),
        "## Learning rates",
        _learning_rates(records, parts, size),
    ]
    return "\n\n".join(sections) + "\n"


def _unfinished(records: list[Record], size: Size) -> list[str]:
    left, runs = runs_left(size, records)
    if not left:
        return []
    return [f"**Not finished: {left} of {runs} runs are missing.** Do not draw conclusions yet."]


def _set_up(size: Size, parts: Parts) -> str:
    right, wrong = (
        demonstrations(parts["seed0"][:10], share)[2]["messages"][1]["content"].replace("\n", " ⏎ ")
        for share in (0.0, CORRUPTED_SHARE)
    )
    return (
        f"SmolLM2-135M-Instruct learns worked sums of three numbers from {size.demonstrations} "
        f"demonstrations, each used once; all weights are trained. There are {size.seeds} seed(s), "
        f"each with its own demonstrations and order, and the same {size.test} test problems for "
        f"all. In corrupted data, {CORRUPTED_SHARE:.0%} of the demonstrations omit the carry from "
        f"the units. Clean: `{right}`; corrupted: `{wrong}`. Every problem has such a carry.\n\n"
        f"A cold start is the unmodified model, which does not know the format. A warm start is "
        f"the model tuned on {size.warm} other clean demonstrations. For both starts the teacher "
        f"is the model tuned on {size.teacher} other clean demonstrations. The learning rate of "
        f"each method and start was chosen by accuracy on {size.validation} validation problems, "
        "after training on clean demonstrations of the first seed. gift runs with beta=5: at its "
        "default of 20, its trust is above 0.99 for every token to which the start gives 1e-6, and "
        "in the search its NLL equalled that of sft to six digits.\n\n"
        "Accuracy is that of greedy answers, mean ± standard deviation over seeds. "
        "'To sft' is the difference to sft, with its 95 % bootstrap interval over problems and "
        "seeds; p is McNemar's exact p over all pairs of answers, not corrected for the number of "
        f"methods. NLL is measured on {size.held_out} clean demonstrations of test problems. 'NLL "
        f"unlike' and 'KL to start' measure forgetting, on {size.unlike} chats on other subjects "
        "whose answers are sampled from the untrained model; the KL is KL(start ‖ trained) over "
        "the whole vocabulary. The unit is nats a token.\n\n"
        "The last four columns are the ceiling, computed from the target folder alone, before any "
        "training: mean −log Q(y), the share of tokens whose target has y as its mode, the share "
        "of demonstrations that greedy decoding of Q reproduces, and KL(Q ‖ start); y is the "
        "demonstration's token, corrupted or not. The condition "
        f"{', '.join(ONE_SEED_IS_ENOUGH)} was run with one seed, to save an hour."
    )


def _outcomes(records: list[Record], parts: Parts, start: Start, data: Data) -> str:
    rows: list[Cells] = [
        (
            *("method", "rate", "accuracy", "to sft", "p", "NLL", "NLL unlike", "KL to start"),
            *("−log Q(y)", "mode is y", "written", "KL(Q ‖ start)"),
        )
    ]
    problems = parts["test"]
    sft = _by_seed(records, start, data, VARIANTS[0])
    for variant in (UNTRAINED, *VARIANTS, TEACHER):
        of_start, of_data = _place(variant, start, data)
        found = _by_seed(records, of_start, of_data, variant)
        if found:
            rows.append(_outcome(variant, found, sft, problems))
    return _table(rows)


def _place(variant: Variant, start: Start, data: Data) -> tuple[Start, Data]:
    """Where a variant's records are: the untrained model and the teacher have seen no data."""
    if variant == TEACHER:
        return "cold", "clean"
    return start, "clean" if variant == UNTRAINED else data


def _outcome(variant: Variant, found: _BySeed, sft: _BySeed, problems: list[Problem]) -> Cells:
    records = list(found.values())
    is_trained = variant not in (UNTRAINED, TEACHER)
    return (
        f"{variant.name} {' '.join(variant.params)}".strip(),
        f"{records[0]['learning_rate']:g}" if is_trained else "",
        _spread([_accuracy(record, problems) for record in records]),
        *(_compared(found, sft, problems) if is_trained and found != sft else ("", "")),
        *(_spread([r[name] for r in records]) for name in ("nll", "unlike_nll", "kl_to_base")),
        *(_promise(records) if is_trained else ("",) * 4),
    )


def _promise(records: list[Record]) -> Cells:
    """The ceiling's cells."""
    means = {
        name: mean(record["ceiling"][name] for record in records)
        for name in ("nll", "learnable", "reproducible", "divergence")
    }
    return (
        f"{means['nll']:.3f}",
        f"{means['learnable']:.1%}",
        f"{means['reproducible']:.0%}",
        f"{means['divergence']:.3f}",
    )


def _compared(found: _BySeed, other: _BySeed, problems: list[Problem]) -> Cells:
    """The difference of accuracies with its interval, and McNemar's p."""
    both = sorted(found.keys() & other.keys())
    if not both:
        return "", ""
    first_SI, second_SI = (
        np.array([is_right(of[seed], problems) for seed in both]) for of in (found, other)
    )
    low, high = difference_interval(first_SI, second_SI)
    p = mcnemar(first_SI, second_SI)[2]
    difference = first_SI.mean() - second_SI.mean()
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]", "<0.001" if p < 0.001 else f"{p:.3f}"


def _defaults(records: list[Record], parts: Parts) -> str:
    """Accuracies of methods that a user chooses between, side by side."""
    of = {variant.name: variant for variant in VARIANTS}
    rows: list[Cells] = [("condition", *(f"{first} − {second}" for first, second in _CHOICES))]
    for start, data in CONDITIONS:
        found = {name: _by_seed(records, start, data, variant) for name, variant in of.items()}
        cells = (_compared(found[a], found[b], parts["test"]) for a, b in _CHOICES)
        rows.append((f"{start}, {data}", *(f"{told}, p {p}" if p else "" for told, p in cells)))
    return (
        "Each cell gives a difference of accuracy, as above: of the default to sft, of target-sft "
        "in its default form to kd, and of default forms to other forms.\n\n" + _table(rows)
    )


_CHOICES = (
    ("sft+kl", "sft"),
    ("target-sft frozen", "kd"),
    ("target-sft frozen", "target-sft live"),
    ("dft frozen-target", "dft live"),
    ("dft frozen-target", "dft frozen-weight"),
    ("asft frozen-target", "asft live"),
)


def _predictions(records: list[Record], parts: Parts) -> str:
    """Rank correlations over the methods between what targets promise and what came."""
    rows: list[Cells] = [("condition", *(f"{first} with {second}" for first, second in _PAIRS))]
    for start, data in CONDITIONS:
        found = [_by_seed(records, start, data, variant) for variant in VARIANTS]
        means = [_means(list(each.values()), parts["test"]) for each in found if each]
        if means:
            columns = {name: np.array([each[name] for each in means]) for name in means[0]}
            cells = (rank_correlation(columns[a], columns[b]) for a, b in _PAIRS)
            told = ("–" if isnan(value) else f"{value:+.2f}" for value in cells)
            rows.append((f"{start}, {data}", *told))
    return (
        "The table shows Spearman's rank correlation over the methods of a condition, of means "
        "over the seeds; – stands for equal values. The ceiling needs no training run.\n\n"
        + _table(rows)
    )


_PAIRS = (
    ("−log Q(y)", "accuracy"),
    ("mode is y", "accuracy"),
    ("written", "accuracy"),
    ("−log Q(y)", "NLL"),
    ("KL(Q ‖ start)", "KL to start"),
)


def _means(records: list[Record], problems: list[Problem]) -> dict[str, float]:
    """A method's outcome and its ceiling, by the names of the columns."""
    return {
        "accuracy": mean(_accuracy(record, problems) for record in records),
        "NLL": mean(record["nll"] for record in records),
        "KL to start": mean(record["kl_to_base"] for record in records),
        "−log Q(y)": mean(record["ceiling"]["nll"] for record in records),
        "mode is y": mean(record["ceiling"]["learnable"] for record in records),
        "written": mean(record["ceiling"]["reproducible"] for record in records),
        "KL(Q ‖ start)": mean(record["ceiling"]["divergence"] for record in records),
    }


def _amounts(records: list[Record], parts: Parts) -> str:
    """What training on less of each distribution changes, seed by seed."""
    rows: list[Cells] = [
        (
            *("kept", "bytes a token", "accuracy", "NLL", "KL to start"),
            *("accuracy − dense", "NLL − dense", "KL − dense", "agrees"),
        )
    ]
    problems = parts["test"]
    by_kept = [_by_seed(records, KEPT_START, KEPT_DATA, KEPT_VARIANT, kept) for kept in KEPT]
    dense = _measured(by_kept[0], problems)
    for kept, found in zip(KEPT, by_kept, strict=True):
        if found:
            rows.append(_amount(kept, found, _measured(found, problems), dense))
    return (
        f"The method is {KEPT_VARIANT.name} ({KEPT_START}, {KEPT_DATA}), whose target is exactly "
        "the stored distribution. 'Everything' is the teacher's whole vocabulary in float32. "
        "Differences are between runs of the same seed. A row agrees if no mean difference is "
        "larger than the standard deviation of the dense runs over the seeds.\n\n" + _table(rows)
    )


def _amount(kept: Kept, found: _BySeed, measured: _Measured, dense: _Measured) -> Cells:
    size = mean(record["bytes_per_token"] for record in found.values())
    values = [list(measured[name].values()) for name in _MEASURES]
    cells = [kept.name, f"{size:,.0f}", *map(_spread, values)]
    differences = {
        name: [measured[name][seed] - dense[name][seed] for seed in found if seed in dense[name]]
        for name in _MEASURES
    }
    if kept == KEPT[0] or not all(differences.values()):
        return (*cells, "", "", "", "")
    agrees = all(
        len(dense[name]) > 1 and abs(mean(differences[name])) <= stdev(dense[name].values())
        for name in _MEASURES
    )
    return (*cells, *(_signed(differences[name]) for name in _MEASURES), "yes" if agrees else "no")


_MEASURES = ("accuracy", "nll", "kl_to_base")


def _measured(found: _BySeed, problems: list[Problem]) -> _Measured:
    """Each measure by seed."""
    return {
        "accuracy": {seed: _accuracy(record, problems) for seed, record in found.items()},
        "nll": {seed: record["nll"] for seed, record in found.items()},
        "kl_to_base": {seed: record["kl_to_base"] for seed, record in found.items()},
    }


def _learning_rates(records: list[Record], parts: Parts, size: Size) -> str:
    """The search: accuracy on the validation problems and NLL by learning rate."""
    problems = parts["validation"]
    rows: list[Cells] = [("start", "method", *(f"{rate:g}" for rate in size.learning_rates))]
    for start in STARTS:
        for variant in VARIANTS:
            searched = [r for r in records if _is_of(r, "validation", start, "clean", variant)]
            if searched:
                best = best_learning_rate(searched, problems)
                cells = {r["learning_rate"]: _searched(r, problems, best) for r in searched}
                rates = (cells.get(rate, "") for rate in size.learning_rates)
                rows.append((start, variant.name, *rates))
    return (
        "Each cell gives the accuracy on the validation problems (and the NLL of their "
        "demonstrations). The rate with the best accuracy is chosen, and the lowest NLL decides "
        "between equal ones. If the chosen rate is the first or the last that was tried, a better "
        "one may lie outside the range.\n\n" + _table(rows)
    )


def _searched(record: Record, problems: list[Problem], best: float) -> str:
    cell = f"{_accuracy(record, problems):.2f} ({record['nll']:.3f})"
    return f"**{cell}**" if record["learning_rate"] == best else cell


def _by_seed(
    records: list[Record], start: Start, data: Data, variant: Variant, kept: Kept = DEFAULT
) -> _BySeed:
    """The test records of a method in a condition, by seed."""
    return {
        record["seed"]: record
        for record in records
        if _is_of(record, "test", start, data, variant) and record["kept"] == kept.name
    }


def _is_of(record: Record, exam: ExamName, start: Start, data: Data, variant: Variant) -> bool:
    told = tuple(record[name] for name in ("exam", "start", "data", "variant"))
    return told == (exam, start, data, variant.name)


def _accuracy(record: Record, problems: list[Problem]) -> float:
    return float(is_right(record, problems).mean())


def _spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, the latter where there are several."""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def _signed(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):+.3f}{spread}"


def _table(rows: Sequence[Cells]) -> str:
    """Rows of cells as Markdown, the first one being the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
