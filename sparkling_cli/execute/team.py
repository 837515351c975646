"""Working alone, or as one of several ranks: the few things in which that differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Team(Protocol):
    """Ranks that carry out one plan together."""

    rank: int
    size: int

    def step(self, work: Callable[[], T]) -> list[T]:
        """Everybody does some work and gets everybody's result, by rank; a barrier.

        Raises:
            Exception: if the work failed anywhere, on every rank.
        """

    def lead(self, work: Callable[[], T]) -> T:
        """Rank 0 does some work and everybody gets its result.

        Raises:
            Exception: if the work failed, on every rank.
        """


class Alone:
    """A team of one."""

    rank = 0
    size = 1

    def step(self, work: Callable[[], T]) -> list[T]:
        """See :class:`Team`."""
        return [work()]

    def lead(self, work: Callable[[], T]) -> T:
        """See :class:`Team`."""
        return work()


def shares(sizes: list[int], count: int) -> list[list[int]]:
    """Numbers of items for each of ``count`` ranks, neighbours together, near equal in size."""
    total = sum(sizes) or 1
    found: list[list[int]] = [[] for _ in range(count)]
    done = 0
    for index, size in enumerate(sizes):
        found[min((done + size // 2) * count // total, count - 1)].append(index)
        done += size
    return found
