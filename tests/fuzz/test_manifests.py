"""Manifests, plans and sidecars of any content: read as they are, or refused in a line."""

import json
from functools import cache
from pathlib import Path

from hypothesis import strategies as st
from qpipe.pipeline.folders.manifest import (
    MANIFEST,
    PLAN,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from qpipe.pipeline.folders.sealed import SealedFolder, open_sealed
from qpipe.pipeline.folders.shard_run import Job, ShardRun, open_folder
from qpipe.pipeline.folders.shards import ShardContent, sidecar_path
from qpipe.stages.folders.status import status_of

from .folders import STAGES, as_bytes, copied, read_all, resealed, whole
from .inputs import Draw, damaged, fuzz, made_or_refused, spoilt


@cache
def manifest_of(stage: str) -> bytes:
    return (whole(stage) / MANIFEST).read_bytes()


@st.composite
def manifests(draw: Draw) -> tuple[str, bytes]:
    """A stage, and a manifest of its folder: its values spoilt and resealed, or its bytes."""
    stage = draw(st.sampled_from(STAGES))
    content = manifest_of(stage)
    match draw(st.integers(0, 2)):
        case 0:
            return stage, draw(damaged(content))
        case 1:
            return stage, as_bytes(draw(spoilt(json.loads(content))))
    return stage, resealed(draw(spoilt(json.loads(content))))


@fuzz(60, drawn=manifests())
def test_manifests_spoilt(drawn: tuple[str, bytes]) -> None:
    stage, content = drawn
    with copied(stage) as folder:
        (folder / MANIFEST).write_bytes(content)
        read_all(folder)
        manifest = made_or_refused(lambda: read_manifest(folder))
        if manifest is not None:
            write_manifest(folder, manifest)  # what is read says all that is written
            assert (folder / MANIFEST).read_bytes() == content


@fuzz(60, content=st.binary() | st.text().map(str.encode))
def test_manifests_of_anything(content: bytes) -> None:
    made_or_refused(lambda: parse_manifest(Path(MANIFEST), content))


def unfinished(folder: Path) -> Job:
    """Take a folder's seal off, as if its run had been killed before it; the run's job."""
    manifest = read_manifest(folder)
    job = Job(
        folder,
        SealedFolder(folder, manifest).schema,
        manifest.identity,
        manifest.parents,
        manifest.provenance,
        manifest.frequent_ids,
    )
    (folder / MANIFEST).unlink()
    open_folder_anew(folder, job)
    return job


def open_folder_anew(folder: Path, job: Job) -> None:
    hidden = [path.rename(folder.parent / path.name) for path in sorted(folder.iterdir())]
    assert open_folder(folder, job.identity) is None  # writes the plan
    for path in hidden:
        path.rename(folder / path.name)


def resume(job: Job, stage: str) -> bytes:
    """What a run that goes on there seals the folder with."""
    assert open_folder(job.folder, job.identity) is None
    run = ShardRun(job)
    run.make((index, lambda index=index: content_of(stage, index)) for index in (0, 1))
    run.seal()
    return (job.folder / MANIFEST).read_bytes()


def content_of(stage: str, index: int) -> ShardContent:
    """A shard's content, as the stage would make it again."""
    entry = read_manifest(whole(stage)).shards[index]
    content = ShardContent(list(open_sealed(whole(stage)).batches(index)))
    content.add_sums(**entry.sums)
    content.rejects = list(entry.rejects)
    return content


@st.composite
def contents(draw: Draw, content: bytes) -> bytes:
    """A JSON file's content, its values spoilt or its bytes."""
    if draw(st.booleans()):
        return draw(damaged(content))
    return as_bytes(draw(spoilt(json.loads(content))))


@cache
def plan_of(stage: str) -> bytes:
    with copied(stage) as folder:
        unfinished(folder)
        return (folder / PLAN).read_bytes()


plans = st.sampled_from(("score", "build-targets")).flatmap(
    lambda stage: st.tuples(st.just(stage), contents(plan_of(stage)))
)
sidecars = st.sampled_from(("score", "build-targets")).flatmap(
    lambda stage: st.tuples(st.just(stage), contents(sidecar_path(whole(stage), 1).read_bytes()))
)


@fuzz(50, drawn=plans)
def test_plans_spoilt(drawn: tuple[str, bytes]) -> None:
    stage, content = drawn
    with copied(stage) as folder:
        job = unfinished(folder)
        (folder / PLAN).write_bytes(content)
        made_or_refused(lambda: status_of(folder))
        made_or_refused(lambda: read_manifest(folder))
        sealed = made_or_refused(lambda: resume(job, stage))
        assert sealed in (None, manifest_of(stage))


@fuzz(50, drawn=sidecars)
def test_sidecars_spoilt(drawn: tuple[str, bytes]) -> None:
    """The run that goes on makes the folder that it would have made, or says what is wrong."""
    stage, content = drawn
    with copied(stage) as folder:
        job = unfinished(folder)
        sidecar_path(folder, 1).write_bytes(content)
        made_or_refused(lambda: status_of(folder))
        sealed = made_or_refused(lambda: resume(job, stage))
        assert sealed in (None, manifest_of(stage))


@fuzz(30, drawn=sidecars)
def test_sidecars_of_sealed_folders_spoilt(drawn: tuple[str, bytes]) -> None:
    stage, content = drawn
    with copied(stage) as folder:
        path = sidecar_path(folder, 1)
        is_whole = path.read_bytes() == content
        path.write_bytes(content)
        assert read_all(folder)
        from qpipe.stages.folders.verify import verify

        assert is_whole == (not list(verify(folder)))
