"""Parameters that the data set decides."""

import math
from pathlib import Path

import numpy as np
import pytest
from qpipe.pipeline import read_scores, read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.methods import choose
from qpipe.pipeline.targets.quantiles import OrderStatistics
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets

from .made import (
    Floats,
    Made,
    build,
    flat_weights,
    one_position,
    parameters,
    proportional,
    random_dense,
    score_folder,
)


def numbers_of(made: Made) -> tuple[Floats, Floats]:
    """The loss of the base and of the teacher at every position, as they are stored."""
    return tuple(
        -np.concatenate([example.observed_log_probs for example in read_scores(folder)]).astype(
            np.float64
        )
        for folder in (made.scores, made.teacher)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["frozen-weight", "frozen-target", "live"])
@pytest.mark.parametrize("numbers", [range(7), range(6), range(1, 3)], ids=["21", "15", "3"])
def test_flow_takes_the_median_of_the_base_losses(
    tmp_path: Path, form: str, numbers: range
) -> None:
    dense = [random_dense(number) for number in numbers]
    even = dense[:-1] if sum(numbers) % 2 else dense[1:]
    for name, rows in (("odd", dense), ("other", even)):
        folder = score_folder(tmp_path / name, rows, shard_size=2)
        result = build_targets(
            BuildSettings(folder, tmp_path / f"{name}-targets", choose("flow", form))
        )
        losses = np.concatenate([row.observed_log_probs for row in read_scores(folder)])
        assert parameters(result.manifest) == {"tau": float(np.median(-losses.astype(np.float64)))}


def test_flow_of_an_even_number_takes_the_middle_of_two(tmp_path: Path) -> None:
    probs = [0.9, 0.5, 0.2, 0.1]
    dense = [one_position(str(p), [p, 1 - p], observed=0) for p in probs]
    folder = score_folder(tmp_path / "scores", dense, 1, top_k=2, vocab_size=2)

    manifest = build(folder, tmp_path / "targets", "flow").manifest

    tau = (math.log(2) + math.log(5)) / 2
    assert parameters(manifest)["tau"] == pytest.approx(tau, rel=1e-6)
    weights = [float(example.weights[0]) for example in read_targets(tmp_path / "targets")]
    assert weights == pytest.approx([p ** (1 / tau) for p in probs], rel=1e-5)


@pytest.mark.parametrize("keep", [0.6, 0.3, 1.0, 0.05])
def test_token_cleaning_keeps_the_tokens_of_the_highest_excess_loss(
    sharded: dict[int, Made], tmp_path: Path, keep: float
) -> None:
    found = set()
    for size, each in sharded.items():
        choice = choose("token-cleaning", given={"keep": keep})
        out = tmp_path / str(size)
        found.add(parameters(each.build(out, choice).manifest)["threshold"])
    base, teacher = numbers_of(sharded[3])
    excess = base - teacher
    wanted = int(len(excess) * keep)  # as the authors take them
    assert found == {float(np.sort(excess)[::-1][wanted - 1])}
    kept = np.concatenate([example.weights > 0 for example in read_targets(tmp_path / "3")])
    came_with = np.array(flat_weights(sharded[3]))
    highest = np.isin(np.arange(len(excess)), np.argsort(-excess)[:wanted])
    assert kept.tolist() == (highest & (came_with > 0)).tolist()


def test_token_cleaning_may_keep_nothing(made: Made, tmp_path: Path) -> None:
    made.build(tmp_path / "targets", choose("token-cleaning", given={"keep": 0}))

    weights = [weight for each in read_targets(tmp_path / "targets") for weight in each.weights]
    assert len(weights) == 21
    assert not any(weights)


def test_a_statistic_follows_the_temperature(whole: Made, tmp_path: Path) -> None:
    result = whole.build(tmp_path / "targets", choose("flow"), temperature=2.0)

    losses = [
        -math.log(proportional(np.exp(row / 2.0))[observed])
        for dense in whole.demonstrations
        for row, observed in zip(dense.log_probs, dense.observed, strict=True)
    ]
    assert parameters(result.manifest)["tau"] == pytest.approx(np.median(losses), rel=1e-6)


def test_a_parameter_that_is_given_is_not_looked_for(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise AssertionError("it was")

    monkeypatch.setattr(OrderStatistics, "add", none)
    given = {"flow": {"tau": 0.75}, "token-cleaning": {"threshold": -0.5}}
    for method, values in given.items():
        manifest = made.build(tmp_path / method, choose(method, given=values)).manifest
        kept = {} if method == "flow" else {"keep": 0.6}
        assert parameters(manifest) == kept | values
    with pytest.raises(AssertionError, match="it was"):
        made.build(tmp_path / "sought", choose("flow"))


def test_flow_is_refused_where_the_median_is_0(tmp_path: Path) -> None:
    dense = [one_position(str(n), [1.0, 1e-9], observed=int(n == 4)) for n in range(5)]
    folder = score_folder(tmp_path / "scores", dense, 2, top_k=2, vocab_size=2)

    with pytest.raises(UserError, match=r"flow: tau=0 .*above 0.*--param tau=") as refused:
        build(folder, tmp_path / "targets", "flow")

    assert "\n" not in str(refused.value)
    assert not (tmp_path / "targets").exists()
    result = build_targets(
        BuildSettings(folder, tmp_path / "targets", choose("flow", given={"tau": 1}))
    )
    assert parameters(result.manifest) == {"tau": 1.0}
