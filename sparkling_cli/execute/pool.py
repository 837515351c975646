"""A job's tasks, done by the threads of this process and of other ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TypeVar

from sparkling_cli.execute.job import Job, PartResult
from sparkling_cli.execute.journal import Journal
from sparkling_cli.execute.ranks import Team
from sparkling_cli.execute.worker import Worker
from sparkling_cli.storage.byte_ranges import span_of
from sparkling_cli.storage.threads import spread
from sparkling_cli.widening import moments
from sparkling_cli.widening.parts import Box, boxes, stream_of

T = TypeVar("T")
_MOMENT_BLOCKS = 512


class Pool:
    """Does a job's tasks.

    Args:
        job: the job.
        target: root of the output in the making.
        threads: how many threads.
        progress: called, in this thread, with bytes written since the last call.
        team: the ranks that share the tasks.
        clean: the output's files are new, not taken over from a killed run.

    Attributes:
        sealed: file and offset of literals that this process has written together with tensors.
    """

    def __init__(
        self,
        job: Job,
        target: Path,
        threads: int,
        progress: Callable[[int], None],
        team: Team,
        *,
        clean: bool,
    ) -> None:
        self.job, self.target, self.threads, self.clean = job, target, threads, clean
        self.progress, self.team = progress, team
        self.sealed: set[tuple[str, int]] = set()

    def run(self, resumed: Mapping[int, list[PartResult]], journal: Journal) -> list[PartResult]:
        """All results of all ranks.

        Args:
            resumed: tasks that an earlier run had finished, to be checked before they are believed.
            journal: where finished tasks are noted.
        """
        known = self._moments()

        def work(worker: Worker, number: int) -> list[PartResult]:
            known = resumed.get(number)
            if known is not None and self._still_true(worker, known):
                for result in known:
                    worker.wrote(sum(span.length for span in result.target))
                return known
            return worker.run(self.job.tasks[number])

        def note(number: int, results: list[PartResult]) -> None:
            if results is not resumed.get(number):
                journal.add(number, results)

        done = self._shared(len(self.job.tasks), work, known, note)
        return [result for results in done for result in results]

    def _still_true(self, worker: Worker, results: list[PartResult]) -> bool:
        """The bytes that a task wrote are there."""
        return all(
            span_of(worker.target, self.job.rows[result.row].target, span.start, span.length) == span
            for result in results
            for span in result.target
        )

    def _moments(self) -> dict[str, moments.Moments]:
        """Mean and deviation of every unit with random entries, by its stream.

        Tensors of one stream (a weight and the optimizer's copy of it, tied names) take those of the first.
        """
        parts: list[tuple[str, int, Box, int, int]] = []
        seen: set[str] = set()
        for row, job in enumerate(self.job.rows):
            if job.kernel is None or not job.kernel.random:
                continue
            for box in boxes(job.kernel.dims, source=True):
                stream = stream_of(job.row.stream, box.unit)
                if stream in seen:
                    continue
                seen.add(stream)
                count = -(-box.entries // moments.BLOCK)
                for first in range(0, count, _MOMENT_BLOCKS):
                    parts.append((stream, row, box, first, min(first + _MOMENT_BLOCKS, count)))
        if not parts:
            return {}

        def work(worker: Worker, number: int) -> list[moments.Moments]:
            return worker.moments(*parts[number][1:])

        blocks_of: dict[str, list[moments.Moments]] = {}
        for part, blocks in zip(parts, self._shared(len(parts), work, {}), strict=True):
            blocks_of.setdefault(part[0], []).extend(blocks)
        return {stream: moments.merged(blocks) for stream, blocks in blocks_of.items()}

    def _shared(
        self,
        count: int,
        work: Callable[[Worker, int], T],
        known: Mapping[str, moments.Moments],
        note: Callable[[int, T], None] = lambda _number, _result: None,
    ) -> list[T]:
        """Do ``work`` for the numbers below ``count`` on all ranks; results in the numbers' order."""
        take = self.team.numbers()
        counter = [0] * self.threads
        reported = 0

        def opened(index: int, stopped: Callable[[], bool]) -> AbstractContextManager[Worker]:
            def wrote(size: int) -> None:
                counter[index] += size

            return closing(Worker(self.job, self.target, known, self.sealed, self.clean, wrote, stopped))

        def tick() -> None:
            nonlocal reported
            total = sum(counter)
            if total > reported:
                self.progress(total - reported)
                reported = total

        def own() -> dict[int, T]:
            return spread(take, count, work, opened, threads=self.threads, done=note, tick=tick)

        done: dict[int, T] = {}
        for rank in self.team.step(own):
            done.update(rank)
        return [done[number] for number in range(count)]
