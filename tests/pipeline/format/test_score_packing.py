"""Packed scores: the codes of log-probabilities, and whole folders of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from numpy.typing import NDArray
from qpipe.pipeline import decoder, read_scores, read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest, write_manifest
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.format.arrow import decode, encode
from qpipe.pipeline.format.batches import FlatBatch, flatten
from qpipe.pipeline.format.packing import ScorePacking, pack, unpack
from qpipe.pipeline.format.probability_codes import FINE_LEVELS, FINE_ZERO, fine_codes_of
from qpipe.pipeline.format.records import ScoredExample
from qpipe.pipeline.format.row_checks import violations
from qpipe.pipeline.format.schema import schema_of
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.folders.verify import verify
from qpipe.stages.score.stage import most_probable

from ...support.examples import VOCAB, random_scored, scored
from ...support.folders import SCORES, seal

PACKED = SCORES | {"precision": "uint16"}
SCHEMA = schema_of("score", VOCAB, ScorePacking(VOCAB))


def test_levels_descend_from_one_to_nothing_and_have_their_own_codes() -> None:
    assert (np.diff(FINE_LEVELS) < 0).all()
    assert FINE_LEVELS[0] == 0
    assert FINE_LEVELS[-1] == -np.inf
    np.testing.assert_array_equal(
        fine_codes_of(FINE_LEVELS.astype(np.float32)), np.arange(FINE_ZERO + 1)
    )


@given(st.floats(-9e3, 0, width=32))
def test_a_code_is_as_near_as_stated(log_prob: float) -> None:
    (code,) = fine_codes_of(np.array([log_prob], np.float32))
    found = float(FINE_LEVELS[code])
    if log_prob < -104:
        assert found == pytest.approx(log_prob, rel=0.0051)
    elif log_prob < -8.4:
        assert found == pytest.approx(log_prob, abs=0.0201)
    else:
        assert np.exp(found / 2) == pytest.approx(np.exp(log_prob / 2), abs=1.51e-4)


def test_codes_ascend_as_probabilities_fall() -> None:
    logs = -np.sort(np.random.default_rng(0).exponential(4, 10**5).astype(np.float32))
    assert (np.diff(fine_codes_of(logs).astype(int)) >= 0).all()


def stored(batch: FlatBatch) -> FlatBatch:
    return decode(SCHEMA, encode(SCHEMA, batch), "here")


def masses(batch: FlatBatch) -> NDArray:
    counts = batch["counts"]
    position_of = np.repeat(np.arange(len(counts)), counts)
    inside = np.bincount(position_of, np.exp(batch["topk_log_probs"].astype(float)), len(counts))
    return np.asarray(inside + batch["tail_mass"])


def test_ids_keep_their_order_and_probabilities_a_divergence_of_a_millionth() -> None:
    batch = flatten(SCHEMA, [random_scored(number) for number in (40, 41, 42)])
    found = stored(batch)
    for name in ("input_ids", "positions", "counts", "topk_ids", "observed_ranks", "token_weights"):
        np.testing.assert_array_equal(found[name], batch[name])
    np.testing.assert_allclose(masses(found), 1, atol=1e-6)
    assert not list(violations("score", found, VOCAB))
    logs, counts = batch["topk_log_probs"].astype(float), batch["counts"]
    terms = np.exp(logs) * (logs - found["topk_log_probs"])
    tails = batch["tail_mass"].astype(float)
    tails = tails * np.log(tails / found["tail_mass"])
    divergence = (terms.sum() + tails.sum()) / len(counts)
    assert 0 < divergence < 1e-6
    assert np.abs(found["observed_log_probs"] - batch["observed_log_probs"]).max() < 0.021


def test_the_ends_of_the_range_are_kept() -> None:
    """A tail of 0, an impossible entry, an observed token far below a float32, equal entries."""
    example = scored("a", [1, 2, 3], [{2: 0.5, 3: 0.5}, {3: 1.0, 4: 1e-30}])
    example.topk_log_probs[-1] = -np.inf
    example.observed_log_probs[0] = -150
    example.tail_mass[:] = 0
    found = stored(flatten(SCHEMA, [example]))
    assert found["tail_mass"].tolist() == [0, 0]
    np.testing.assert_allclose(found["topk_log_probs"], example.topk_log_probs, atol=1e-6)
    assert found["observed_log_probs"][0] == pytest.approx(-150, rel=0.006)
    uniform = dict.fromkeys(range(64), 1 / 64)
    found = stored(flatten(SCHEMA, [scored("b", [1, 2], [uniform])]))
    np.testing.assert_allclose(found["topk_log_probs"], np.log(1 / 64), atol=1e-6)


def test_neighbours_that_rounding_has_exchanged_get_one_code() -> None:
    example = scored("a", [1, 2, 3], [{2: 0.5, 3: 0.3, 4: 0.2}, {3: 0.9, 7: 0.1}])
    levels = FINE_LEVELS[[100, 400, 399, 200, 900]]
    example.topk_log_probs[:] = levels
    batch = flatten(SCHEMA, [example])
    steps = pack(batch.arrays, ScorePacking(VOCAB))
    codes = steps["log_prob_steps_low"] + 256 * steps["log_prob_steps_high"].astype(int)
    assert codes.tolist() == [100, 300, 0, 200, 700]
    example.topk_log_probs[2] = FINE_LEVELS[398]
    with pytest.raises(AssertionError, match="do not descend"):
        pack(flatten(SCHEMA, [example]).arrays, ScorePacking(VOCAB))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("topk_ids_high", 200, "entry 0 topk_ids_high leads outside the vocabulary"),
        ("log_prob_steps_high", 40, "entry 0 log_prob_steps_high leads to no code"),
        ("observed_codes", FINE_ZERO + 1, "position 0 observed_codes leads to no code"),
        ("tail_codes", 65535, "position 0 tail_codes leads to no code"),
    ],
)
def test_codes_that_are_not_written_are_refused(name: str, value: int, words: str) -> None:
    batch = flatten(SCHEMA, [random_scored(3)])
    packed = pack(batch.arrays, ScorePacking(VOCAB))
    packed[name] = packed[name].astype(np.uint16)
    packed[name][0] = value

    def wrong(level: str, place: int, what: str) -> UserError:
        return UserError(f"{level} {place} {what}")

    with pytest.raises(UserError, match=words):
        unpack(packed, ScorePacking(VOCAB), wrong)


def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The same scores, plain and packed."""
    shards = [[random_scored(number) for number in shard] for shard in ((5, 6), (7, 8, 9))]
    plain = seal(tmp_path / "plain", "score", SCORES, shards)
    return plain, seal(tmp_path / "packed", "score", PACKED, shards)


def test_readers_read_a_packed_folder(tmp_path: Path) -> None:
    plain, packed = folders(tmp_path)
    assert list(verify(packed)) == []
    assert [read_manifest(each).identity.format_version for each in (plain, packed)] == [3, 4]
    for one, other in zip(read_scores(plain), read_scores(packed), strict=True):
        assert one.id == other.id
        np.testing.assert_array_equal(one.topk_ids, other.topk_ids)
        np.testing.assert_allclose(one.topk_log_probs, other.topk_log_probs, atol=0.021)
    folder = open_sealed(packed)
    rows = next(folder.stored_batches(0)).to_pydict()
    first = next(read_scores(packed))
    decoded = decoder(packed)(rows)
    assert np.concatenate(decoded["topk_ids"][0]).tolist() == first.topk_ids.tolist()
    assert decoded["observed_log_probs"][0] == first.observed_log_probs.tolist()


def test_targets_of_packed_scores_are_those_of_plain_ones(tmp_path: Path) -> None:
    made = []
    for scores in folders(tmp_path):
        out = tmp_path / f"targets-{scores.name}"
        settings = {"precision": "float32", "top_p": 1.0}
        build_targets(BuildSettings(scores, out, choose("dft"), **settings))
        made.append(list(read_targets(out)))
    for one, other in zip(*made, strict=True):
        np.testing.assert_allclose(one.trust, other.trust, atol=5e-4)
        np.testing.assert_array_equal(one.counts, other.counts)
        for example in (one, other):
            position_of = np.repeat(np.arange(len(example.counts)), example.counts)
            order = np.lexsort((example.support_ids, position_of))
            example.support_ids[:] = example.support_ids[order]
            example.support_probs[:] = example.support_probs[order]
        np.testing.assert_array_equal(one.support_ids, other.support_ids)
        np.testing.assert_allclose(one.support_probs, other.support_probs, atol=5e-4, rtol=0.03)


@pytest.mark.parametrize(("stage", "precision"), [("score", "uint8"), ("build-targets", "uint16")])
def test_a_precision_of_another_stage_is_refused(
    tmp_path: Path, stage: str, precision: str
) -> None:
    folder = seal(tmp_path / "scores", "score", SCORES, [[random_scored(4)]])
    if stage == "build-targets":
        build_targets(BuildSettings(folder, tmp_path / "targets", choose("dft")))
        folder = tmp_path / "targets"
    manifest = read_manifest(folder)
    manifest.identity.settings["precision"] = precision
    identity = manifest.identity
    write_manifest(folder, structs.replace(manifest, fingerprint=identity.fingerprint))
    with pytest.raises(UserError, match=f"precision '?{precision}'? is not one of"):
        read_manifest(folder)


@pytest.mark.parametrize(("settings", "version"), [(SCORES, 4), (PACKED, 3)])
def test_a_version_that_is_not_that_of_the_precision_is_refused(
    tmp_path: Path, settings: dict[str, Any], version: int
) -> None:
    folder = seal(tmp_path / "scores", "score", settings, [[random_scored(4)]])
    manifest = read_manifest(folder)
    identity = structs.replace(manifest.identity, format_version=version)
    changed = structs.replace(manifest, identity=identity, fingerprint=identity.fingerprint)
    write_manifest(folder, changed)
    with pytest.raises(UserError, match="format_version does not match the precision"):
        read_manifest(folder)


def test_the_prefix_of_a_mass_is_kept_and_the_rest_is_tail() -> None:
    example = scored("a", [1, 2, 3], [{2: 0.5, 3: 0.3, 4: 0.15, 5: 0.05}, {3: 0.9, 7: 0.1}])
    cut = most_probable(example, 0.75)
    assert cut.counts.tolist() == [2, 1]
    assert cut.topk_ids.tolist() == [2, 3, 3]
    np.testing.assert_allclose(cut.tail_mass, [0.2, 0.1], atol=1e-7)
    np.testing.assert_array_equal(cut.topk_log_probs, example.topk_log_probs[[0, 1, 4]])
    assert most_probable(example, 1.0) is example
    many = replace(random_scored(50), id="b")
    assert isinstance(many, ScoredExample)
    kept = most_probable(many, 0.9)
    starts = np.cumsum(kept.counts) - kept.counts
    probs = np.exp(kept.topk_log_probs.astype(float))
    before = [probs[s : s + n - 1].sum() for s, n in zip(starts, kept.counts, strict=True)]
    assert max(before) < 0.9
