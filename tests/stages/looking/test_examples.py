"""Folders side by side, joined by id and position."""

from pathlib import Path

import numpy as np
import pytest
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.stages.looking.examples import Companion, looks, open_examples
from qpipe.stages.looking.overview import Overview
from qpipe.tests.support.examples import scored, targeted
from qpipe.tests.support.folders import folder_of

IDS = [0, 7, 8]
HALF = {7: 0.5, 9: 0.5}


def target(name: str, trust: float = 0.5, ids: list[int] = IDS):
    return targeted(name, ids, [trust, 1.0], [HALF, {8: 1.0}])


def score(name: str, ids: list[int] = IDS):
    return scored(name, ids, [{9: 0.75, 7: 0.25}, {8: 1.0}])


def joined(main: Path, other: Path) -> tuple[list, Companion]:
    folder = open_examples(main)
    companion = Companion(folder, open_sealed(other, "score"))
    return [look for group in looks(folder, {"base": companion}) for look in group], companion


def test_the_bases_scores_stand_beside_the_targets(tmp_path: Path) -> None:
    main = folder_of(tmp_path / "t", [target("a"), target("b", 0.0)])
    found, _ = joined(main, folder_of(tmp_path / "s", [score("a"), score("b")]))
    first, second = found
    np.testing.assert_allclose(first.values["gain"], [0.5, 0], atol=1e-6)
    np.testing.assert_allclose(second.values["gain"], [0.25, 0], atol=1e-6)
    assert first.values["base-rank"].tolist() == [2, 1]
    expected = 0.75 * np.log(0.75 / 0.25) + 0.25 * np.log(0.25 / 0.75)
    np.testing.assert_allclose(first.values["kl"], [expected, 0], atol=1e-6)
    assert first.panels["target"].ids.tolist() == [7, 9, 8]
    assert second.panels["base"].ids.tolist() == [9, 7, 8]


def test_another_order_and_missing_examples_are_joined_by_id(tmp_path: Path) -> None:
    main = folder_of(tmp_path / "t", [target(name) for name in "abcdef"], shards=2)
    rows = [score(name) for name in "fdba"] + [score("c", [0, 7, 9, 8])]
    found, companion = joined(main, folder_of(tmp_path / "s", rows, shards=3))
    assert [look.id for look in found] == ["a", "b", "d", "f"]
    assert [look.number for look in found] == [0, 1, 3, 5]
    assert (companion.missing, companion.differing) == (1, 1)


def test_only_positions_that_both_have_are_compared(tmp_path: Path) -> None:
    main = folder_of(tmp_path / "t", [target("a")])
    other = scored("a", IDS, [{8: 0.5, 9: 0.25}], positions=[2])
    (look,), _ = joined(main, folder_of(tmp_path / "s", [other]))
    assert look.positions.tolist() == [2]
    np.testing.assert_allclose(look.values["trust"], [1])
    np.testing.assert_allclose(look.values["gain"], [0.5], atol=1e-6)
    assert look.panels["target"].ids.tolist() == [8]


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    main = folder_of(tmp_path / "t", [target("a")])
    other = folder_of(tmp_path / "s", [score("a")], tokenizer_hash="another")
    with pytest.raises(UserError, match="give folders of the same tokenizer"):
        joined(main, other)


def test_an_overview_adds_up_tokens_not_examples(tmp_path: Path) -> None:
    rows = [target("a", 0.0), targeted("b", [0, 7], [0.5], [{7: 1.0}])]
    folder = open_examples(folder_of(tmp_path / "t", rows))
    overview = Overview()
    for group in looks(folder, {}):
        for look in group:  # one by one, as batches would
            overview.add([look])
    assert (overview.examples, overview.positions) == (2, 3)
    assert overview.mean("trust") == 0.5
    said = overview.as_json()
    assert said["by_position"]["starts"] == [0, 1]
    assert said["by_position"]["tokens"] == [2, 1]
    np.testing.assert_allclose(said["by_position"]["nll"], [np.log(2) / 2, 0], atol=1e-7)
    assert sum(said["measures"]["trust"]["histogram"]) == 3
    assert said["measures"]["trust"]["lowest"] == 0
    assert said["measures"]["trust"]["highest"] == 1
