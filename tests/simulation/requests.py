"""What an array of tasks asks of an S3 store, counted at the socket of a real server's client."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, urlsplit

from qpipe.pipeline.folders.tasks import TaskShare, run_task
from qpipe.pipeline.storage.remote import open_path
from qpipe.tests.simulation.scheduler import WATCHER, TinyStage, without_bars


def array_requests(name: str, shards: int, tasks: int) -> tuple[Counter[str], Counter[str]]:
    """Requests of all tasks of an array, one after the other, and of a task that comes back late.

    The late one starts when all shards but its last are there.
    """
    folder = open_path(f"s3://bucket/{name}")
    with without_bars():
        with counted() as fresh:
            for rank in range(tasks):
                run_task(TinyStage(folder, shards), TaskShare(rank, tasks), WATCHER)
        (folder / "manifest.json").unlink()
        (folder / f"shard-{shards - 1:05d}.json").unlink()
        plan = TinyStage(folder, shards)
        late = TaskShare((shards - 1) % tasks, tasks)
        _open_again(plan)
        with counted() as again:
            run_task(plan, late, WATCHER)
    return fresh, again


def _open_again(stage: TinyStage) -> None:
    """Put the plan back that sealing has removed."""
    from qpipe.pipeline.folders.manifest import write_plan
    from qpipe.pipeline.folders.tasks import plan_of

    write_plan(stage.job.folder, plan_of(stage))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the requests within the block by their kind."""
    from aiobotocore.httpsession import AIOHTTPSession

    counts: Counter[str] = Counter()
    send = AIOHTTPSession.send

    async def counting(self: Any, request: Any) -> Any:
        is_list = "list-type" in parse_qs(urlsplit(request.url).query)
        counts["LIST" if is_list else request.method] += 1
        return await send(self, request)

    with patch.object(AIOHTTPSession, "send", counting):
        yield counts
