"""Independent pieces of work, done one after the other in this process or wherever somebody runs them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Protocol):
    def map(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        name: Callable[[Item], str],
        memory: Callable[[Item], int],
    ) -> Iterator[Result]:
        """work(item) of every item, as they are finished, in any order.

        work, items and results have to be pickled where they are done elsewhere. name(item): what logs and
        errors call it. memory(item): bytes that it takes, at the most. The first error is raised, and nothing
        is begun after it.
        """
        ...


class Here:
    """In this process, in the order of the items."""

    def map(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        name: Callable[[Item], str],
        memory: Callable[[Item], int],
    ) -> Iterator[Result]:
        return map(work, items)


HERE = Here()
