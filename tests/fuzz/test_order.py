"""The samples of a run, whatever the steps, processes, restarts and folders: each once an epoch.

The batches are the trainer's own; only the model is missing.
"""

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from qpipe.pipeline.folders.row_index import id_hash
from qpipe.pipeline.folders.sealed import open_sealed
from qpipe.pipeline.format.records import TargetExample
from qpipe.pipeline.threads import Prefetch
from qpipe.tests.support.examples import as_targets, random_scored
from qpipe.tests.support.folders import SCORES, seal
from qpipe.trainer.data.batch import Collator
from qpipe.trainer.data.dataset import TargetDataset
from qpipe.trainer.data.mixture import Mixture, mix
from qpipe.trainer.data.steps import Samples, Step, StepLoader
from qpipe.trainer.data.stream import TargetStream, are_held_out, open_streams
from qpipe.trainer.run.loop import STEPS_AHEAD

from .inputs import Draw, folder_until_exit, fuzz

TARGETS = {"method": "sft", "form": "live", "parameters": {}, "residual": "observed"}
TARGETS |= {"tail_shape": "student", "top_p": None, **SCORES}
SIZES = {"small": (3, 1, 4), "large": (90, 2, 30, 1, 1, 70)}  # rows of each shard


@cache
def folder(name: str) -> Path:
    """A target folder of rows of 3 to 12 tokens, and one without supervision."""
    root = folder_until_exit()
    numbers = iter(range(1000))
    shards = [[target(name, next(numbers)) for _ in range(size)] for size in SIZES[name]]
    return seal(root / name, "build-targets", TARGETS, shards)


def target(name: str, number: int) -> TargetExample:
    return replace(as_targets(random_scored(number % 10)), id=f"{name}-{number}")


def ids_of(name: str, eval_fraction: float = 0.0) -> list[str]:
    """The rows that are to be trained on, worked out from what was written."""
    ids = [f"{name}-{number}" for number in range(sum(SIZES[name])) if number % 10]
    hashes = np.array([id_hash(each) for each in ids], np.uint64)
    return [ids[place] for place in np.flatnonzero(~are_held_out(hashes, eval_fraction))]


@cache
def stream(name: str, eval_fraction: float = 0.0) -> TargetStream:
    return open_streams(open_sealed(folder(name)), eval_fraction)[0]


@st.composite
def sources(draw: Draw) -> tuple[Samples, list[str], bool]:
    """Samples, the ids of an epoch, and whether an epoch has each once."""
    if draw(st.booleans()):
        name, held_out = draw(st.sampled_from(list(SIZES))), draw(st.sampled_from([0.0, 0.3]))
        return stream(name, held_out), ids_of(name, held_out), True
    streams = [stream(name) for name in SIZES]
    ids = [each for name in SIZES for each in ids_of(name)]
    if draw(st.booleans()):
        return mix(streams, [len(each) for each in streams]), ids, True
    weights = draw(st.lists(st.integers(1, 9), min_size=2, max_size=2))
    return mix(streams, weights), ids, False


@st.composite
def loaders(draw: Draw, samples: Samples) -> StepLoader:
    tokens = st.integers(1, 200)
    return StepLoader(
        samples,
        seed=draw(st.integers(0, 2**32 - 1)),
        batch_size=draw(st.integers(1, 40)),
        step_tokens=draw(st.none() | tokens),
        forward_tokens=draw(tokens),
        collate=Collator(packed=draw(st.booleans())),
    )


def legs_of(
    loader: StepLoader, start: int, stop: int, world_size: int, most: int
) -> tuple[list[list[str]], int]:
    """The ids of each of the next steps, over all ranks, and where the run then stands."""
    steps: list[list[str]] = []
    starts: list[Step] = []
    counts: list[int] = []
    for rank in range(world_size):
        of_rank = replace(loader, rank=rank, world_size=world_size)
        next_steps = islice(of_rank.steps_between(start, stop), most)
        with Prefetch(of_rank.load(next_steps), STEPS_AHEAD) as ready:
            own = list(ready)
        steps = steps or [[] for _ in own]
        starts = starts or [step for step, _ in own]
        assert [step for step, _ in own] == starts  # all ranks take the same steps
        counts = counts or [len(batches) for _, batches in own]
        assert [len(batches) for _, batches in own] == counts  # in as many passes
        for ids, (_, batches) in zip(steps, own, strict=True):
            ids.extend(chain.from_iterable(batch.ids for batch in batches))
    return steps, starts[-1].stop if starts else start


@fuzz(
    40,
    source=sources(),
    data=st.data(),
    epochs=st.sampled_from([0.01, 0.5, 1.0, 2.0, 2.7]),
    max_steps=st.none() | st.integers(1, 50),
    worlds=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 20)), max_size=3),
)
def test_runs_stopped_and_continued_elsewhere(
    source: tuple[Samples, list[str], bool],
    data: st.DataObject,
    epochs: float,
    max_steps: int | None,
    worlds: list[tuple[int, int]],
) -> None:
    samples, ids, is_once = source
    loader = data.draw(loaders(samples))
    count, stop = loader.size(epochs, max_steps)
    whole = [example.id for example in samples.samples(loader.seed, range(stop))]
    if is_once:
        for start in range(0, len(whole) - len(ids) + 1, len(ids)):
            assert sorted(whole[start : start + len(ids)]) == sorted(ids)
    if isinstance(samples, Mixture):
        check_shares(samples, whole)

    found: list[list[str]] = []
    at = 0
    for world_size, most in [*worlds, (1, 10**6)]:
        more, at = legs_of(loader, at, stop, world_size, most)
        found += more
    assert len(found) == count
    assert at == stop
    places = np.cumsum([0, *map(len, found)])
    for start, step in zip(places, found, strict=False):  # a step's samples, in the ranks' order
        assert Counter(step) == Counter(whole[start : start + len(step)])


def check_shares(samples: Mixture, ids: list[str]) -> None:
    """After any number of samples, each folder has given within one of its share."""
    total = sum(samples.shares)
    for name, share in zip(SIZES, samples.shares, strict=True):
        given = np.cumsum([each.startswith(name) for each in ids])
        exact = np.arange(1, len(ids) + 1) * share / total
        assert (np.abs(given - exact) < 1 + 1e-9).all()


@cache
def data_set() -> tuple[TargetDataset, list[str]]:
    made = TargetDataset(folder("large"))
    return made, ids_of("large")


@fuzz(40, indices=st.lists(st.integers(0, 170), max_size=40), one_by_one=st.booleans())
def test_rows_asked_for_in_any_order(indices: list[int], one_by_one: bool) -> None:
    rows, ids = data_set()
    assert len(rows) == len(ids) > 170
    found = [rows[index] for index in indices] if one_by_one else rows.__getitems__(indices)
    assert [row["id"] for row in found] == [ids[index] for index in indices]
    for row in found:
        written = as_targets(random_scored(int(row["id"].partition("-")[2]) % 10))
        assert row["input_ids"].tolist() == written.input_ids.tolist()
