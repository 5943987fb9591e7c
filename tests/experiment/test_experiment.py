"""The pure parts of the experiment: the task, the plan, the statistics, the records, the page."""

import json
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.storage.json_files import write_json
from qpipe.tests.experiment.conduct import conduct
from qpipe.tests.experiment.forecast import forecast
from qpipe.tests.experiment.paired import difference_interval, mcnemar, rank_correlation
from qpipe.tests.experiment.plan import (
    CONDITIONS,
    DEFAULT,
    FULL,
    KEPT,
    QUICK,
    VARIANTS,
    Run,
    Size,
    final_runs,
    kept_run,
    reference_runs,
    search_runs,
)
from qpipe.tests.experiment.published import publish, take_over
from qpipe.tests.experiment.records import Records, best_learning_rate
from qpipe.tests.experiment.tables import page
from qpipe.tests.experiment.task import Problem, demonstrations, parts
from qpipe.tests.experiment.work import Work

SIZE = replace(QUICK, seeds=2, test=8, learning_rates=(1e-4, 3e-4), conditions=CONDITIONS)


def test_a_corrupted_answer_drops_the_carry_from_the_units() -> None:
    problem = Problem(78, 97, 98)
    assert problem.answer() == "78+97=175\n175+98=273\n#273"
    assert problem.answer(corrupted=True) == "78+97=165\n165+98=253\n#253"


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("78+97=175\n175+98=273\n#273", True),
        ("#273\n", True),
        ("273", False),
        ("#2731", False),
        ("#273\nand so on", False),
        ("78+97=175\n175+98=263\n#263", False),
        ("", False),
    ],
)
def test_the_verifier_wants_the_right_sum_in_the_format(text: str, is_right: bool) -> None:
    assert Problem(78, 97, 98).is_solved_by(text) == is_right


def test_every_problem_is_in_one_part_and_its_corrupted_answer_is_wrong() -> None:
    made = parts(0, test=300, seed0=300)
    every = [*made["test"], *made["seed0"]]
    assert len(set(every)) == 600
    assert all(problem.is_solved_by(problem.answer()) for problem in every)
    assert not any(problem.is_solved_by(problem.answer(corrupted=True)) for problem in every)


def test_the_share_of_demonstrations_is_corrupted_and_no_other() -> None:
    problems = parts(0, seed0=50)["seed0"]
    clean, corrupted = demonstrations(problems), demonstrations(problems, 0.4)
    differing = [a != b for a, b in zip(clean, corrupted, strict=True)]
    assert [sum(differing[start : start + 5]) for start in range(0, 50, 5)] == [2] * 10


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs() -> None:
    first = np.array([1, 1, 1, 1, 1, 0, 1, 0], bool)
    second = np.array([0, 0, 0, 0, 0, 1, 1, 0], bool)
    assert mcnemar(first, second) == (5, 1, 2 * (1 + 6) / 64)
    assert mcnemar(first, first) == (0, 0, 1.0)


def test_the_interval_holds_the_difference_and_shrinks_with_items() -> None:
    rng = np.random.default_rng(1)
    few, many = (rng.random((3, items)) < 0.5 for items in (50, 1000))
    low, high = difference_interval(few, np.zeros_like(few))
    assert low < few.mean() < high
    narrow_low, narrow_high = difference_interval(many, np.zeros_like(many))
    # of 1000 items: 2·1.96·sqrt(0.25/3/1000) = 0.036, and the seeds' share of it
    assert 0.036 < narrow_high - narrow_low < 0.08 < high - low


def test_rank_correlation_follows_order_and_shares_ties() -> None:
    values = np.array([3.0, 1.0, 2.0])
    assert rank_correlation(values, values**3) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3
    ties = rank_correlation(np.array([0.0, 1, 1, 2]), np.array([0.0, 1, 2, 3]))
    assert ties == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert isnan(rank_correlation(values, np.ones(3)))


def test_the_learning_rate_is_that_of_most_problems_solved_then_of_lowest_nll() -> None:
    problems = [Problem(78, 97, 98), Problem(15, 25, 35)]
    right, wrong = [each.answer() for each in problems], [each.answer(True) for each in problems]
    answers = [(1e-5, wrong, 0.1), (3e-5, right, 0.4), (1e-4, right, 0.3), (3e-4, right, 0.5)]
    searched = [
        {"learning_rate": rate, "answers": written, "nll": nll} for rate, written, nll in answers
    ]
    assert best_learning_rate(searched, problems) == 1e-4


def test_a_record_cut_short_is_forgotten_and_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = Records(path)
    records.add({"key": "first"})
    records.add({"key": "second"})
    path.write_bytes(path.read_bytes()[:-5])
    again = Records(path)
    assert list(again.by_key) == ["first"]
    again.mend()
    again.add({"key": "third"})
    assert list(Records(path).by_key) == ["first", "third"]


def test_runs_have_names_of_their_own_and_test_runs_share_the_searched_model() -> None:
    searched = search_runs(SIZE, "cold", VARIANTS[0])
    tested = final_runs(SIZE, "cold", VARIANTS[0], 0, SIZE.learning_rates[0])
    assert tested[0].model_name == searched[0].model_name
    runs = _every_run(SIZE)
    assert len({run.key for run in runs}) == len(runs)


def test_one_learning_rate_is_not_searched_for() -> None:
    assert len(search_runs(SIZE, "cold", VARIANTS[0])) == 2
    assert search_runs(QUICK, "cold", VARIANTS[0]) == []


def test_the_forecast_ends_when_every_run_is_recorded(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    # eleven methods; one of the four conditions is tried with the first seed alone
    assert "77 runs,   77 left" in forecast(SIZE, records)
    for run in _every_run(SIZE):
        records.add({**run.described(), "seconds": {"train": 1.0}})
    assert forecast(SIZE, records).endswith("about 0.0 hours on two free cores")


def test_the_forecast_counts_what_two_exams_share_once(tmp_path: Path) -> None:
    """166 trainings at 101.8 s, 125 exams at 88 s and 66 at 22 s, 680 demonstrations at 0.48 s."""
    said = forecast(FULL, Records(tmp_path / "records.jsonl"))
    assert said.endswith("about 4.1 hours on two free cores")


def test_the_page_tells_who_is_right_and_what_agrees() -> None:
    problems = _parts(SIZE)
    records = [_record(run, problems) for run in _every_run(SIZE)]
    lines = page(records, SIZE, problems).splitlines()
    assert not any("Not finished" in line for line in lines)
    kd = next(line for line in lines if line.startswith("| kd "))
    # solves all of 8 and sft none, in both seeds: 16 discordant pairs
    assert "| 1.000 ± 0.000 | +1.000 [+1.000, +1.000] | <0.001 |" in kd
    sft = next(line for line in lines if line.startswith("| sft |"))
    assert "| 0.000 ± 0.000 |  |  |" in sft  # nothing to compare it with
    amounts = [line for line in lines if line.startswith("| top ")]
    assert [line.split("|")[-2].strip() for line in amounts] == ["yes", "no"]


def test_the_page_is_made_of_whatever_is_there() -> None:
    problems = _parts(SIZE)
    assert "| sft |" not in page([], SIZE, problems)
    assert "**Not finished: 132 of 132 runs" in page([], SIZE, problems)
    run, _ = search_runs(SIZE, "cold", VARIANTS[0])
    assert "| cold | sft | **0.00" in page([_record(run, problems)], SIZE, problems)


def test_published_runs_go_on_in_another_work_folder(tmp_path: Path) -> None:
    run, other = search_runs(SIZE, "cold", VARIANTS[0])
    work = _work(tmp_path / "one", SIZE)
    write_json(work.unlike, [{"id": "unlike-00"}])
    records = Records(work.records)
    records.add(_record(run, _parts(SIZE)))
    path = tmp_path / "runs.jsonl.zst"
    publish(path, work, records)

    there = _work(tmp_path / "other", SIZE)
    take_over(path, there)
    assert there.unlike.read_bytes() == work.unlike.read_bytes()
    taken = Records(there.records)
    assert taken.by_key == records.by_key
    taken.add(_record(other, _parts(SIZE)))
    take_over(path, there)  # it has runs by now, which stay
    assert other in Records(there.records)


def test_published_runs_of_other_sizes_are_refused(tmp_path: Path) -> None:
    work = _work(tmp_path / "one", SIZE)
    write_json(work.unlike, [])
    publish(tmp_path / "runs.jsonl.zst", work, Records(work.records))
    there = _work(tmp_path / "other", replace(SIZE, test=9))
    with pytest.raises(UserError, match="another experiment: leave --published out"):
        take_over(tmp_path / "runs.jsonl.zst", there)
    assert not there.records.exists()


def test_two_lanes_do_every_run_once_and_leave_no_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = _work(tmp_path, SIZE)
    write_json(work.unlike, [])
    sat: list[str] = []

    def sit(work: Work, records: Records, run: Run) -> None:
        if run in records:
            return
        sat.append(run.key)
        if run.is_trained:
            (work.root / f"models/{run.start}/{run.model_name}").mkdir(parents=True, exist_ok=True)
        records.add(_record(run, work.parts))

    monkeypatch.setattr("qpipe.tests.experiment.conduct.sit", sit)
    conduct(work, Records(work.records))
    assert sorted(sat) == sorted(run.key for run in _every_run(SIZE))
    assert not [*tmp_path.glob("models/*/*")]


def _work(root: Path, size: Size) -> Work:
    work = Work(root, Path("SmolLM2-135M-Instruct"), size)
    work.open()
    return work


def _every_run(size: Size) -> list[Run]:
    rate = size.learning_rates[0]
    searched = [
        r for start in ("cold", "warm") for v in VARIANTS for r in search_runs(size, start, v)
    ]
    tested = [
        run
        for seed in range(size.seeds)
        for start in ("cold", "warm")
        for variant in VARIANTS
        for run in final_runs(size, start, variant, seed, rate)
    ]
    kept = [
        kept_run(kept, seed, rate) for kept in KEPT for seed in range(size.seeds) if kept != DEFAULT
    ]
    return [*reference_runs(), *searched, *tested, *kept]


def _parts(size: Size) -> dict[str, list[Problem]]:
    return parts(0, test=size.test, validation=size.validation, seed0=10, seed1=10)


def _record(run: Run, problems: dict[str, list[Problem]]) -> dict[str, Any]:
    """kd solves everything, all others nothing; the NLL of what keeps least is off by much."""
    is_kd = run.variant.name == "kd"
    nll = 1.0 + 0.1 * run.seed + (0.5 if run.kept == KEPT[-1] else 0.01)
    record = {
        **run.described(),
        "answers": [each.answer(corrupted=not is_kd) for each in problems[run.exam]],
        "nll": nll,
        "unlike_nll": 2.0,
        "kl_to_base": 0.1 + 0.01 * run.seed,
        "ceiling": dict.fromkeys(("nll", "learnable", "reproducible", "divergence"), 0.5),
        "bytes_per_token": 10.0,
    }
    return json.loads(json.dumps(record))
