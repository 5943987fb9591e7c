"""As much of Ray as handing out shards asks for, in virtual time.

Actors are made here in this process and their methods are really called, when the task is done;
they stand on slots, which a dead one leaves free. What takes how long, and who dies when, is told.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any


class RayError(Exception):
    """Whatever goes wrong with Ray."""


class ActorError(RayError):
    """That an actor has died."""


class OutOfMemoryError(RayError):
    """That an actor was killed for its memory: no ActorError of Ray's."""


class TaskError(RayError):
    """That a method has raised something."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Exceptions:
    """As `ray.exceptions`."""

    RayError = RayError
    RayActorError = ActorError
    RayTaskError = TaskError


@dataclass(eq=False)
class Task:
    """A method called, or a value put."""

    actor: "Actor"
    method: str
    arguments: tuple[Any, ...]
    is_cut: bool = False  # its actor dies before it is done


@dataclass(eq=False)
class Actor:
    """An object on a slot, made when its first method runs."""

    ray: "FakeRay"
    new: Callable[[], Any]
    slot: int
    dies_at: float
    object: Any = None
    busy_until: float = 0.0  # its tasks are done one after the other
    is_dead: bool = False

    def __getattr__(self, method: str) -> "_Method":
        return _Method(self, method)


@dataclass(frozen=True)
class _Method:
    actor: Actor
    name: str

    def remote(self, *arguments: Any) -> Task:
        """Call it."""
        task = Task(self.actor, self.name, arguments)
        self.actor.ray.begin(task)
        return task


@dataclass(frozen=True)
class _ActorClass:
    ray: "FakeRay"
    made_of: type

    def options(self, **_: Any) -> "_ActorClass":
        """Whatever it takes, a slot has it."""
        return self

    def remote(self, *arguments: Any) -> Actor:
        """A new actor on a free slot."""
        slot = heapq.heappop(self.ray.free)
        return Actor(
            self.ray, lambda: self.made_of(*arguments), slot, self.ray.now + self.ray.life_on(slot)
        )


@dataclass(eq=False)
class FakeRay:
    """A cluster of `slots` GPUs, eight a machine.

    `seconds` tells how long a method takes on a slot, with its arguments; `life` how long an actor
    lives there, in the order in which they are started. `unseen` tells whether an actor that dies
    in a task has done it all the same.
    """

    slots: int
    seconds: Callable[[int, str, tuple[Any, ...]], float]
    life_on: Callable[[int], float]
    unseen: Callable[[], bool] = lambda: False
    now: float = 0.0
    lost: float = 0.0  # seconds of work that died with an actor
    deaths: int = 0
    exceptions: type = Exceptions
    free: list[int] = field(default_factory=list)
    _running: list[tuple[float, int, Task]] = field(default_factory=list)
    _turns: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.free = list(range(self.slots))

    def nodes(self) -> list[dict[str, Any]]:
        """The machines."""
        machine = {"Alive": True, "Resources": {"GPU": 8, "CPU": 64}}
        return [machine] * (self.slots // 8)

    def put(self, value: Any) -> Any:
        """A value for an actor's arguments, where it comes out as itself."""
        return value

    def remote(self, made_of: type) -> _ActorClass:
        """A class whose objects are actors."""
        return _ActorClass(self, made_of)

    def begin(self, task: Task) -> None:
        """Let a task run; it ends when it is done, or its actor dead."""
        seconds = self.seconds(task.actor.slot, task.method, task.arguments)
        start = max(self.now, task.actor.busy_until)
        end = task.actor.busy_until = start + seconds
        if end >= task.actor.dies_at:
            task.is_cut = True
            end = max(self.now, task.actor.dies_at)
            self.lost += max(0.0, end - start) * (task.method == "make")
        heapq.heappush(self._running, (end, next(self._turns), task))

    def wait(self, tasks: Sequence[Task], num_returns: int) -> tuple[list[Task], list[Task]]:
        """The task that ends first, once it has."""
        assert num_returns == 1
        self.now, _, first = heapq.heappop(self._running)
        return [first], [task for task in tasks if task is not first]

    def get(self, task: Task) -> Any:
        """What a task gives."""
        actor = task.actor
        if task.is_cut:
            if not actor.is_dead:
                actor.is_dead = True
                self.deaths += 1
                heapq.heappush(self.free, actor.slot)
            if task.method == "make" and self.unseen():
                self._call(task)
            kind = OutOfMemoryError if actor.slot % 2 else ActorError
            raise kind(f"the actor on GPU {actor.slot} died")
        return self._call(task)

    def _call(self, task: Task) -> Any:
        actor = task.actor
        if actor.object is None:
            actor.object = actor.new()
        try:
            return getattr(actor.object, task.method)(*task.arguments)
        except Exception as error:
            raise TaskError(error) from error

    @contextmanager
    def connected(self, _: str | None) -> Iterator["FakeRay"]:
        """In the place of connecting to a cluster."""
        yield self
