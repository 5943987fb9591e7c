"""What `build-targets` stores of every method and form, however it is sharded or stopped."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qpipe.pipeline import read_targets
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.methods import choose
from qpipe.pipeline.methods.definition import Choice
from qpipe.pipeline.storage.json_files import sha256_of_json
from qpipe.stages.build_targets import inputs, stage
from qpipe.tests.support.folders import seal_shards
from qpipe.tests.support.methods import FACTS, WITH_TEACHER

from .made import (
    TOP_K,
    VOCAB,
    Made,
    build,
    every_choice,
    examples_in,
    folder_bytes,
    random_dense,
    supports_of,
    times,
)


@every_choice
def test_the_manifest_says_what_the_targets_are_and_where_from(
    made: Made, tmp_path: Path, choice: Choice
) -> None:
    options = {"top_p": 0.9, "max_support": 8, "temperature": 1.25}
    if choice.method.name in WITH_TEACHER:
        options["teacher_temperature"] = 0.8
    result = made.build(tmp_path / "targets", choice, **options)
    manifest = read_manifest(tmp_path / "targets", "build-targets")

    assert result.manifest == manifest
    settings = dict(manifest.settings)
    found = settings.pop("parameters")
    given = {p.name: p.default for p in choice.method.parameters if p.default is not None}
    assert {name: found.pop(name) for name in given} == given
    statistic = choice.method.statistic
    assert list(found) == ([statistic.parameter] if statistic else [])
    stored = FACTS[choice.method.name, choice.form].stored
    is_cut = stored in ("base", "teacher", "mixture", "contrast")
    assert settings.pop("support_order") == sha256_of_json(manifest.frequent_ids)
    assert bool(manifest.frequent_ids) == is_cut
    assert settings == {
        "method": choice.method.name,
        "form": choice.form,
        "residual": stored,
        "tail_shape": "uniform" if choice.method.name == "label-smoothing" else "student",
        "top_p": 0.9 if is_cut else None,
        "max_support": 8 if is_cut else None,
        "precision": "float32",
        "temperature": 1.25,
        "teacher_temperature": 0.8 if choice.method.name in WITH_TEACHER else 1.0,
        "vocab_size": VOCAB,
        "tokenizer_hash": "3fa9",
    }
    sources = {"scores": read_manifest(made.scores)}
    if choice.method.name in WITH_TEACHER:
        sources["teacher"] = read_manifest(made.teacher)
        assert manifest.provenance["teacher"] == sources["teacher"].provenance
    assert manifest.identity.inputs == {name: each.fingerprint for name, each in sources.items()}
    assert manifest.parents.keys() == sources.keys()
    for name, source in sources.items():
        assert manifest.parents[name]["identity"]["settings"] == source.settings
    assert manifest.provenance["model"] == "scores"


@every_choice
def test_every_example_is_there_with_distributions_that_add_up(
    made: Made, tmp_path: Path, choice: Choice
) -> None:
    result = made.build(tmp_path / "targets", choice, top_p=0.9, max_support=4)

    read = list(read_targets(tmp_path / "targets"))
    assert [example.id for example in read] == [f"chats:{number}" for number in range(7)]
    for example, dense in zip(read, made.demonstrations, strict=True):
        assert example.input_ids.tolist() == dense.input_ids
        assert example.positions.tolist() == dense.positions
        supports = supports_of(example)
        assert len(supports) == len(example.trust) == len(example.weights) == len(dense.positions)
        for support, observed, tail in zip(
            supports, dense.observed, example.tail_mass, strict=True
        ):
            assert observed in support
            assert len(support) <= 4 + 1
            assert sum(support.values()) + tail == pytest.approx(1, abs=1e-6)
        values = [*example.trust, *example.support_probs, *example.tail_mass]
        assert all(0 <= value <= 1 for value in values)
        assert np.isfinite(example.weights).all()
        assert (example.weights >= 0).all()
    entries = sum(len(example.support_ids) for example in read)
    totals, of_scores = result.manifest.totals, read_manifest(made.scores).totals
    assert totals["entries"] == entries
    assert totals["rows"] == 7 == of_scores["rows"]
    assert totals["positions"] == result.positions == sum(range(7)) == of_scores["positions"]
    assert totals["tokens"] == sum(len(example.input_ids) for example in read)
    for name in ("trust", "tail_mass"):
        total = sum(float(getattr(example, name).sum()) for example in read)
        assert totals["sums"][name] == pytest.approx(total, rel=1e-6, abs=1e-9)


@every_choice
def test_a_second_build_does_nothing(made: Made, tmp_path: Path, choice: Choice) -> None:
    first = made.build(tmp_path / "targets", choice)
    before = times(tmp_path / "targets")
    second = made.build(tmp_path / "targets", choice)

    assert second.manifest == first.manifest
    assert (second.positions, second.seconds, second.was_done) == (0, 0.0, True)
    assert not first.was_done
    assert times(tmp_path / "targets") == before


@every_choice
def test_sharding_of_any_size_gives_the_same_examples(
    sharded: dict[int, Made], tmp_path: Path, choice: Choice
) -> None:
    found = {}
    for size, each in sharded.items():
        out = tmp_path / f"targets-{size}"
        manifest = each.build(out, choice, top_p=0.8).manifest
        assert len(manifest.shards) == math.ceil(7 / size)
        found[size] = (examples_in(out), manifest)

    examples, manifest = found[3]
    assert len(examples) == 7
    for other, its_manifest in found.values():
        assert other == examples
        assert its_manifest.settings == manifest.settings
        assert its_manifest.totals["sums"] == pytest.approx(manifest.totals["sums"], rel=1e-9)


@every_choice
def test_a_stopped_build_goes_on_and_gives_the_same_bytes(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: Choice
) -> None:
    stop_and_go_on(made, tmp_path, monkeypatch, choice, stopped_at=1)


@pytest.mark.parametrize("stopped_at", [0, 1, 2])
def test_a_build_may_be_stopped_at_any_shard(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    stop_and_go_on(made, tmp_path, monkeypatch, choose("gift"), stopped_at)


def stop_and_go_on(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: Choice, stopped_at: int
) -> None:
    calls: list[int] = []
    targets_of = stage.targets_of

    def counted(*arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) - 1 == stopped_at:
            raise KeyboardInterrupt
        return targets_of(*arguments)

    made.build(tmp_path / "undisturbed", choice)
    monkeypatch.setattr(stage, "targets_of", counted)
    with pytest.raises(KeyboardInterrupt):
        made.build(tmp_path / "targets", choice)
    with pytest.raises(UserError, match="not finished yet: run `qpipe build-targets`"):
        read_manifest(tmp_path / "targets")
    result = made.build(tmp_path / "targets", choice)

    assert len(calls) == 3 + 1  # three shards of a batch each, one of them begun twice
    assert result.positions == sum([3, 12, 6][stopped_at:])
    assert folder_bytes(tmp_path / "targets") == folder_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize("choice", [choose("gift"), choose("target-sft"), choose("flow")])
def test_pieces_of_any_size_give_the_same_examples(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: Choice
) -> None:
    whole = made.build(tmp_path / "whole", choice).manifest
    monkeypatch.setattr(inputs, "PIECE_POSITIONS", 4)
    cut = made.build(tmp_path / "cut", choice).manifest

    assert examples_in(tmp_path / "cut") == examples_in(tmp_path / "whole")
    assert cut.settings == whole.settings
    assert cut.totals["sums"] == pytest.approx(whole.totals["sums"], rel=1e-9)


def test_a_shard_of_rejects_alone_stays_a_shard(tmp_path: Path) -> None:
    found = [random_dense(number).scored(TOP_K) for number in (2, 3)]
    settings = {"vocab_size": VOCAB, "tokenizer_hash": "3fa9", "top_k": TOP_K}
    seal_shards(tmp_path / "scores", "score", settings, [[], found, []])

    for method in ("sft+kl", "flow", "kd"):
        teacher = (tmp_path / "scores",) if method == "kd" else ()
        result = build(tmp_path / "scores", tmp_path / method, method, teacher=teacher)
        assert [shard.rows for shard in result.manifest.shards] == [0, 2, 0]
        assert [each.id for each in read_targets(tmp_path / method)] == ["chats:2", "chats:3"]
