"""How long a job of `Cluster.map` takes on machines that nobody has at hand: a list scheduler over tasks
whose times are known. It says when tasks end, nothing of what they compute."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count


@dataclass(frozen=True)
class Task:
    """A task of a phase. seconds: of computing; memory: bytes, as declared to Ray; reads, writes: bytes of
    the shared storage, before and behind it."""

    seconds: float
    memory: int = 0
    reads: int = 0
    writes: int = 0


@dataclass(frozen=True)
class Phase:
    """The tasks of one `Cluster.map`, and the CPUs and GPUs of each.

    start: seconds that a process takes before its first task; start_reads: bytes that the first process of a
    machine reads from the shared storage then, and the later ones find in its page cache.
    """

    name: str
    tasks: Sequence[Task]
    cpus: float = 1
    gpus: float = 0
    start: float = 0.0
    start_reads: int = 0


@dataclass(frozen=True)
class Machine:
    """What a machine of the cluster has; memory in bytes, as Ray counts it."""

    cpus: float
    gpus: float = 0
    memory: float = float("inf")

    def holds(self, phase: Phase, task: Task) -> bool:
        return self.cpus >= phase.cpus and self.gpus >= phase.gpus and self.memory >= task.memory

    def without(self, phase: Phase, task: Task, sign: int = 1) -> "Machine":
        return Machine(
            self.cpus - sign * phase.cpus, self.gpus - sign * phase.gpus, self.memory - sign * task.memory
        )


@dataclass
class Storage:
    """A shared file system that serves one transfer after the other: bytes a second of all, and of one
    machine."""

    total: float = float("inf")
    machine: float = float("inf")
    _free: dict[int | None, float] = field(default_factory=dict)
    _cached: dict[int, float] = field(default_factory=dict)

    def moved(self, now: float, nbytes: int, machine: int) -> float:
        """When a transfer that a machine asks for now has ended."""
        for who, rate in ((None, self.total), (machine, self.machine)):
            self._free[who] = max(self._free.get(who, 0.0), now) + nbytes / rate
        return max(self._free[None], self._free[machine]) if nbytes else now

    def cached(self, now: float, nbytes: int, machine: int) -> float:
        """`moved` for files that the machine's page cache holds from the first time on."""
        if machine not in self._cached:
            self._cached[machine] = self.moved(now, nbytes, machine)
        return max(self._cached[machine], now)


@dataclass(frozen=True)
class Outcome:
    """seconds: until the last task has ended; at_once: the most tasks that ran at the same time."""

    seconds: float
    at_once: int


class NoPlace(ValueError):
    """A task that fits no machine, which `Cluster.map` refuses."""


@dataclass(eq=False)
class _Place:
    """A machine at work: what is free of it, its processes, and how many of them have a task."""

    free: Machine
    processes: int = 0
    busy: int = 0

    def take(self, phase: Phase, task: Task) -> bool:
        """Takes what a task needs. Whether a process has to be started for it."""
        self.free = self.free.without(phase, task)
        self.busy += 1
        cold = self.busy > self.processes
        self.processes += cold
        return cold

    def give_back(self, phase: Phase, task: Task):
        self.free = self.free.without(phase, task, -1)
        self.busy -= 1


def simulated(phase: Phase, machines: Sequence[Machine], storage: Storage | None = None) -> Outcome:
    """A phase on machines of which nothing else runs.

    Tasks begin as `Cluster.map` hands them to Ray, those with the most memory first, each on the machine with
    the most free CPUs and GPUs; one that fits nowhere now waits while smaller ones behind it go ahead.
    Raises NoPlace.
    """
    storage = replace(storage or Storage(), _free={}, _cached={})
    waiting = sorted(phase.tasks, key=lambda task: task.memory, reverse=True)
    if waiting and not any(machine.holds(phase, waiting[0]) for machine in machines):
        raise NoPlace(f"{phase.name}: {waiting[0]} fits no machine")
    places = [_Place(machine) for machine in machines]
    under_way: dict[int, tuple[_Place, Task, Generator[float, float, None]]] = {}
    ends: list[tuple[float, int]] = []
    number, now, most = count(), 0.0, 0
    while waiting or ends:
        for task, place in _begun(phase, waiting, places):
            cold = place.take(phase, task)
            steps = _steps(
                phase,
                task,
                storage,
                places.index(place),
                cold,
            )
            next(steps)
            heappush(ends, (now, at := next(number)))
            under_way[at] = place, task, steps
        most = max(most, len(under_way))
        now, at = heappop(ends)
        place, task, steps = under_way[at]
        try:
            heappush(ends, (steps.send(now), at))
        except StopIteration:
            place.give_back(phase, task)
            del under_way[at]
    return Outcome(now, most)


def _begun(phase, waiting, places) -> Iterator[tuple[Task, _Place]]:
    """Takes out of `waiting` what can begin now, with its place, which is to be taken before the next."""
    full = float("inf")  # a task with this much memory fits nowhere now
    for task in list(waiting):
        able = [p for p in places if p.free.holds(phase, task)] if task.memory < full else []
        if not able:
            full = min(full, task.memory)
            continue
        waiting.remove(task)
        yield task, max(able, key=lambda p: (p.free.gpus, p.free.cpus))


def _steps(phase, task, storage, machine, cold) -> Generator[float, float, None]:
    """Takes the time at which a step begins and gives the one at which it ends."""
    now = yield 0.0
    if cold:
        now = yield now + phase.start
        now = yield storage.cached(now, phase.start_reads, machine)
    now = yield storage.moved(now, task.reads, machine)
    now = yield now + task.seconds
    yield storage.moved(now, task.writes, machine)
