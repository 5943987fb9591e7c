"""Targets against those worked out over the whole vocabulary."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline import read_targets
from qpipe.pipeline.methods import choose
from qpipe.pipeline.methods.definition import Choice

from .made import (
    SFT_KL,
    VOCAB,
    Floats,
    Made,
    flat_weights,
    proportional,
    supports_of,
)


@dataclass(frozen=True)
class Known:
    """Everything about a position, known in full."""

    base: Floats  # [V]
    teacher: Floats  # [V]
    observed: int
    weight: float  # that came with the demonstration

    @property
    def base_y(self) -> float:
        return float(self.base[self.observed])

    @property
    def teacher_y(self) -> float:
        return float(self.teacher[self.observed])

    @property
    def one_hot(self) -> Floats:
        return np.eye(len(self.base))[self.observed]


Worked = tuple[float, float, Floats]  # trust, weight and residual
ANSWERS: dict[str, tuple[Choice, Callable[[Known], Worked]]] = {
    "sft": (choose("sft"), lambda k: (1, 1, k.one_hot)),
    "dft frozen-target": (choose("dft"), lambda k: (k.base_y, 1, k.base)),
    "dft frozen-weight": (choose("dft", "frozen-weight"), lambda k: (1, k.base_y, k.one_hot)),
    "dft live": (choose("dft", "live"), lambda k: (1, 1, k.one_hot)),
    "beyond-log": (choose("beyond-log", given={"alpha": 3}), lambda k: (k.base_y**3, 1, k.base)),
    "profit": (
        choose("profit", "frozen-weight", {"tau": 0.02}),
        lambda k: (1, k.base_y >= 0.02, k.one_hot),
    ),
    "eaft": (
        choose("eaft", given={"a": 0.5}),
        lambda k: ((top_20_entropy(k.base) / 3) ** 0.5, 1, k.base),
    ),
    "label-smoothing": (
        choose("label-smoothing", given={"lam": 0.25}),
        lambda k: (0.75, 1, np.full(VOCAB, 1 / VOCAB)),
    ),
    "sft+kl": (choose("sft+kl", given={"lam": 0.25}), lambda k: (0.8, 1.25, k.base)),
    "asft": (
        choose("asft", given={"lam": 0.2}),
        lambda k: (k.base_y / (k.base_y + 0.2), k.base_y + 0.2, k.base),
    ),
    "asft live": (choose("asft", "live"), lambda k: (1, 1, k.base)),
    "iw-sft": (choose("iw-sft"), lambda k: (1, 1, k.base)),
    "psft": (choose("psft"), lambda k: (1, 1, k.base)),
    "kd": (choose("kd"), lambda k: (0, 1, k.teacher)),
    "kd-hybrid": (choose("kd-hybrid", given={"lam": 0.3}), lambda k: (0.7, 1, k.teacher)),
    "target-sft": (
        choose("target-sft", given={"eta": 0.3}),
        lambda k: (k.base_y, 1, proportional(k.base**0.7 * k.teacher**0.3)),
    ),
    "target-sft live": (choose("target-sft", "live"), lambda k: (1, 1, k.teacher)),
    "gift": (
        choose("gift", given={"beta": 2}),
        lambda k: (1 - 1 / (1 + k.base_y * (math.e**2 - 1)), 1, k.base),
    ),
    "flow": (choose("flow", given={"tau": 2}), lambda k: (1, math.sqrt(k.base_y), k.one_hot)),
    "flow frozen-target": (
        choose("flow", "frozen-target", {"tau": 2}),
        lambda k: (math.sqrt(k.base_y), 1, k.base),
    ),
    "stm": (choose("stm", given={"tau": 0.02}), lambda k: (1, k.base_y >= 0.02, k.one_hot)),
    "token-cleaning": (
        choose("token-cleaning", given={"threshold": 0.1}),
        lambda k: (1, math.log(k.teacher_y / k.base_y) >= 0.1, k.one_hot),
    ),
    "contrast": (
        choose("contrast", given={"alpha": 0.3, "beta": 0.45}),
        lambda k: (
            0,
            float((k.teacher * np.log(k.teacher / k.base)).sum()) >= 0.45,
            proportional(
                np.where(k.teacher >= 0.3 * k.teacher.max(), k.teacher / k.base, 0.0),
            ),
        ),
    ),
    "prift-mass": (
        choose("prift-mass", given={"tau": 0.3}),
        lambda k: (1, k.base[k.base <= k.base_y].sum() >= 0.3, k.one_hot),
    ),
    "infosft": (
        choose("infosft", given={"P": 0.9}),
        lambda k: (
            1,
            k.base_y * max(0, 1 - math.log(k.base_y / (1 - k.base_y)) / math.log(9)),
            k.one_hot,
        ),
    ),
    "deft": (choose("deft"), lambda k: (k.base_y ** (k.base**2).sum(), 1, k.base)),
    "talr": (
        choose("talr", given={"tau": 0.5, "floor": 0.05}),
        lambda k: (max(k.base_y**2, 0.05), 1, k.base),
    ),
    "ranktuner": (
        choose("ranktuner", given={"power": 0.5}),
        lambda k: (
            1,
            k.base_y**0.5
            * 2 ** (1 / math.log2(1 + np.sort(k.base)[::-1] @ np.arange(1, VOCAB + 1)))
            / 2 ** (1 / math.log2(1 + (k.base >= k.base_y).sum())),
            k.one_hot,
        ),
    ),
    "se-kd": (
        choose("se-kd", given={"threshold": 2.2}),
        lambda k: (0, -(k.base @ np.log(k.base)) >= 2.2, k.teacher),
    ),
    "tip": (
        choose("tip", given={"threshold": 2.8}),
        lambda k: (
            0,
            k.teacher @ np.log(k.teacher / k.base) - k.base @ np.log(k.base) >= 2.8,
            k.teacher,
        ),
    ),
    "amid": (
        choose("amid", given={"eta": 0.3}),
        lambda k: (0, 1, proportional((0.7 * k.base**0.5 + 0.3 * k.teacher**0.5) ** 2)),
    ),
    # a mask is γ, and no factor besides
    "cft": (choose("cft"), lambda k: (1, k.weight, k.one_hot)),
    "cft frozen-target": (choose("cft", "frozen-target"), lambda k: (k.weight, 1, k.base)),
}
OBSERVED_ALONE = {"label-smoothing", "iw-sft", "psft"}  # of a residual that is not one-hot


def top_20_entropy(probs: Floats) -> float:
    top = proportional(np.sort(probs)[-20:])
    return float(-(top * np.log(top)).sum())


@pytest.mark.parametrize("name", ANSWERS)
def test_targets_are_those_worked_out_over_the_whole_vocabulary(
    whole: Made, tmp_path: Path, name: str
) -> None:
    choice, answer = ANSWERS[name]
    whole.build(tmp_path / "targets", choice, top_p=1.0)

    seen = []
    for example, dense in zip(
        read_targets(tmp_path / "targets"), whole.demonstrations, strict=True
    ):
        taught = dense.under_teacher()
        for n, support in enumerate(supports_of(example)):
            known = Known(
                np.exp(dense.log_probs[n]),
                np.exp(taught.log_probs[n]),
                dense.observed[n],
                dense.weights[n],
            )
            trust, weight, residual = answer(known)
            if choice.method.name != "cft":
                weight *= known.weight
            alone = {} if name in OBSERVED_ALONE else {*np.flatnonzero(residual).tolist()}
            assert support.keys() == {known.observed, *alone}
            stored = residual[list(support)]
            np.testing.assert_allclose(list(support.values()), stored, rtol=2e-6)
            assert example.tail_mass[n] == pytest.approx(1 - stored.sum(), abs=1e-6)
            assert example.trust[n] == pytest.approx(trust, rel=2e-6)
            assert example.weights[n] == pytest.approx(weight, rel=2e-6)
            seen.append((float(trust), float(weight)))
    assert len(seen) == sum(range(7))
    assert len(set(seen)) > 1
    # no threshold has all tokens on one side
    indicators = {"profit", "stm", "token-cleaning", "contrast", "prift-mass", "se-kd", "tip"}
    if choice.method.name in indicators:
        full = [w for (_, w), k in zip(seen, flat_weights(whole), strict=True) if k > 0]
        assert 0 < sum(weight > 0 for weight in full) < len(full)


def test_truncation_is_as_it_was_asked_for(whole: Made, tmp_path: Path) -> None:
    whole.build(tmp_path / "targets", SFT_KL, top_p=0.6, max_support=5)

    sizes = set()
    for example, dense in zip(
        read_targets(tmp_path / "targets"), whole.demonstrations, strict=True
    ):
        for n, (support, observed) in enumerate(
            zip(supports_of(example), dense.observed, strict=True)
        ):
            order = np.argsort(-dense.log_probs[n])
            held = np.cumsum(np.exp(dense.log_probs[n][order]))
            size = min(int((held < 0.6).sum()) + 1, 5)
            assert support.keys() == {*order[:size].tolist(), observed}
            sizes.add(size)
    assert {*range(2, 6)} <= sizes


def test_temperatures_are_those_of_their_model(whole: Made, tmp_path: Path) -> None:
    made = whole.build(
        tmp_path / "targets", choose("target-sft"), top_p=1.0, temperature=2.0,
        teacher_temperature=0.5,
    )  # fmt: skip

    for example, dense in zip(
        read_targets(tmp_path / "targets"), whole.demonstrations, strict=True
    ):
        taught = dense.under_teacher()
        for n, support in enumerate(supports_of(example)):
            base = proportional(np.exp(dense.log_probs[n] / 2.0))
            mixed = proportional(np.sqrt(base) * np.exp(taught.log_probs[n] / 0.5) ** 0.5)
            np.testing.assert_allclose(list(support.values()), mixed[list(support)], rtol=5e-6)
            assert example.trust[n] == pytest.approx(base[dense.observed[n]], rel=5e-6)
    sums = made.manifest.totals["sums"]
    assert (sums["temperature_bound"], sums["teacher_temperature_bound"]) == (0, 0)  # no tail


def test_only_a_temperature_that_is_set_has_a_bound(made: Made, tmp_path: Path) -> None:
    def names(out: str, **options: Any) -> set[str]:
        sums = made.build(tmp_path / out, choose("kd"), **options).manifest.totals["sums"]
        return {name for name in sums if name.endswith("bound") and sums[name] > 0}

    assert names("a") == set()
    assert names("b", temperature=2.0) == {"temperature_bound"}
    assert names("c", teacher_temperature=2.0) == {"teacher_temperature_bound"}
