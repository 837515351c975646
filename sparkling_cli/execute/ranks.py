"""Working alone, or as one of several ranks: the few things in which that differs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TypeVar

T = TypeVar("T")


class Team:
    """Ranks that carry out one plan together; as it stands here, one alone.

    Attributes:
        rank: this one's number.
        size: how many there are.
        first_on_host: no rank with a lower number works on this machine.
    """

    rank = 0
    size = 1
    first_on_host = True

    def step(self, work: Callable[[], T]) -> list[T]:
        """Everybody does some work and gets everybody's result, by rank; a barrier.

        Raises:
            Exception: if the work failed anywhere, that of the lowest rank where it did, on every rank.
            OutputError: a rank is gone.
        """
        return [work()]

    def lead(self, work: Callable[[], T]) -> T:
        """Rank 0 does some work and everybody gets its result.

        Raises:
            Exception: see :meth:`step`.
        """
        first: T = self.step(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[assignment]
        return first

    def numbers(self) -> Callable[[], int]:
        """A counter from 0 on that all ranks share: no number is given out twice, on any rank or thread.

        All ranks ask for their counters in the same order. Who is faster takes more, so that ranks end
        together whatever their work costs and however fast they are.
        """
        return count().__next__
