"""Workers on Ray: independent pieces of work as named tasks with their memory declared, tried again where a
machine or a process is lost."""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...kernels.operator.errors import NamedError, sentence
from ..store.workers import Item, Result

LOCAL = "local"
ANSWER = 10  # seconds
TRIES = 4  # of a task whose process or machine is lost; what the task itself raises ends the job at once
EXTRA = "python -m pip install 'nibble-quant[cluster]'"
PACKAGE = __name__.partition(".quant_core.")[0]


class ClusterError(NamedError):
    """No cluster, one that has no place for the work, or a task that failed there."""


class Cluster:
    """Workers of the Ray cluster that this process is connected to.

    cpus: CPU threads that a task computes with; sums in another number of threads have another order, so it
    decides the bytes of the result, and the number of workers does not. gpus: of a task, 0 to 1; below 1
    several share a GPU.
    """

    def __init__(self, ray: Any, cpus: int = 1, gpus: float = 0.0):
        self._ray, self.cpus, self.gpus = ray, cpus, gpus

    def map(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        name: Callable[[Item], str],
        memory: Callable[[Item], int],
    ) -> Iterator[Result]:
        """As in `Workers`, the largest items first. Raises ClusterError for an item that fits no machine,
        before anything is begun, and for a task that failed, naming the item and the machine."""
        ray = self._ray
        self._require_place(items, name, memory)
        shared = ray.put(work)
        task = ray.remote(max_retries=TRIES - 1, retry_exceptions=False)(_run)
        left = {}
        for item in sorted(items, key=memory, reverse=True):
            options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "memory": memory(item)}
            # In a list a reference arrives as it is: `_shared` gets what it stands for once a process.
            ref = task.options(name=name(item), **options).remote([shared], item, self.cpus)
            left[ref] = name(item)
        try:
            while left:
                (ref, *_), _ = ray.wait(list(left), num_returns=1)
                yield self._result(ref, left.pop(ref))
        finally:  # an error, an interrupt, or nobody who wants the rest
            for ref in left:
                ray.cancel(ref, force=True)

    def _result(self, ref, name):
        errors = self._ray.exceptions
        try:
            done, node = self._ray.get(ref)
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError) as error:
            raise ClusterError(
                f"{name}: its process was lost {TRIES} times, most likely for want of memory: {error}"
            ) from error
        except errors.RayError as error:
            raise ClusterError(f"{name}: the cluster could not run it: {error}") from error
        if isinstance(done, _Failed):
            raise ClusterError(f"{name}, on {node}: {done.text}") from done.error
        return done

    def _require_place(self, items, name, memory):
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        largest = max(items, key=memory, default=None)
        if largest is None:
            return
        needs = {"CPU": self.cpus, "GPU": self.gpus, "memory": memory(largest)}
        if not any(all(node.get(k, 0) >= v for k, v in needs.items() if v) for node in nodes):
            most = lambda kind: max((node.get(kind, 0) for node in nodes), default=0)
            raise ClusterError(
                f"{name(largest)}: takes {self.cpus} CPUs, {self.gpus:g} GPUs and "
                f"{memory(largest) / 1e9:.1f} GB of memory, and no machine of the cluster has all of it; the "
                f"most of each are {most('CPU'):g}, {most('GPU'):g} and {most('memory') / 1e9:.1f} GB. Start "
                "Ray on a larger machine, or ask for fewer CPUs a task."
            )


@contextmanager
def connected(address: str, cpus: int = 1, gpus: float = 0.0) -> Iterator[Cluster]:
    """A Cluster at a Ray address ("auto", "host:6379"), or of this machine alone ("local"), started for as
    long as the context lasts.

    Its machines have to have this pack of the same version, and the paths of the job under the same names.
    Raises ImportError without Ray, ClusterError where none answers.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--ray needs Ray, which is not installed: {EXTRA}") from error
    local = address == LOCAL
    _require_answer(address)
    try:
        with findable() if local else nullcontext():
            ray.init(
                address=address,  # "local" starts one also where another runs
                namespace="nibble",
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _nobody(address, error) from error
    try:
        yield Cluster(ray, cpus, gpus)
    finally:
        ray.shutdown()


def _require_answer(address):
    """Raises ClusterError where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER).close()
    except (OSError, ValueError) as error:
        raise _nobody(address, error) from error


def _nobody(address, error) -> ClusterError:
    return ClusterError(
        f"--ray {address}: no Ray cluster there ({sentence(str(error))}). Start one with `ray start --head` "
        "and take its address, or take --ray local for this machine."
    )


@contextmanager
def findable() -> Iterator[None]:
    """Processes that are begun meanwhile find the pack, also where it is not installed.

    They inherit it: a `runtime_env` of Ray would start each process a second time and leave those that Ray
    has started in advance without work.
    """
    root, before = str(Path(__file__).parents[2 + PACKAGE.count(".") + 1]), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, before]))
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


class _Failed:
    """An error of the work itself, as it travels: its type may exist on no other machine."""

    def __init__(self, error: Exception):
        self.text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        self.error = error


def _run(shared, item, cpus):
    """(work(item), the machine), in a process of the cluster."""
    import ray
    import torch

    torch.set_num_threads(cpus)
    node = ray.util.get_node_ip_address()
    try:
        return _shared(shared[0])(item), node
    except Exception as error:  # told with the item and the machine by who waits for it
        return _Failed(error), node


@lru_cache(maxsize=2)
def _shared(ref):
    """What a reference stands for, once a process: files stay open from one item to the next."""
    import ray

    return ray.get(ref)
