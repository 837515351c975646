"""A few threads that do a job's tasks; the main thread only waits, so that Ctrl-C reaches it."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sparkling_cli.execute.job import Job, PartResult
from sparkling_cli.execute.journal import Journal
from sparkling_cli.execute.team import Team
from sparkling_cli.execute.worker import Stopped, Surroundings, Worker
from sparkling_cli.storage.crc import Span, combine, crc32
from sparkling_cli.storage.places import Handles, Placement, read
from sparkling_cli.widening import moments

T = TypeVar("T")
_POLL = 0.1  # seconds between looks at the progress
_MOMENT_BLOCKS = 512


class Pool:
    """Does a job's tasks.

    Args:
        job: the job.
        target: root of the output in the making.
        threads: how many threads.
        progress: called, in this thread, with bytes written since the last call.
        team: the ranks that share the tasks.

    Attributes:
        sealed: file and offset of literals that this process has written together with tensors.
    """

    def __init__(
        self, job: Job, target: Path, threads: int, progress: Callable[[int], None], team: Team
    ) -> None:
        self.job, self.target, self.threads = job, target, threads
        self.progress, self.team = progress, team
        self.sealed: set[tuple[str, int]] = set()

    def run(self, resumed: Mapping[int, list[PartResult]], journal: Journal) -> list[PartResult]:
        """All results of all ranks.

        Args:
            resumed: tasks that an earlier run had finished, to be checked before they are believed.
            journal: where finished tasks are noted.
        """
        deviations = self._deviations()

        def work(worker: Worker, number: int) -> list[PartResult]:
            known = resumed.get(number)
            if known is not None and self._still_true(worker, known):
                for result in known:
                    worker.around.wrote(sum(span.length for span in result.target))
                return known
            return worker.run(self.job.tasks[number])

        def note(number: int, results: list[PartResult]) -> None:
            if results is not resumed.get(number):
                journal.add(number, results)

        done = self._shared(len(self.job.tasks), work, deviations, note)
        return [result for results in done for result in results]

    def _still_true(self, worker: Worker, results: list[PartResult]) -> bool:
        """The bytes that a task wrote are there."""
        import numpy as np

        buffer = np.empty(1 << 19, dtype=np.uint8)
        for result in results:
            placement = self.job.rows[result.row].target
            for span in result.target:
                if _crc_of(worker.target, placement, span, buffer) != span.crc:
                    return False
        return True

    def _deviations(self) -> dict[int, float]:
        """Standard deviations of all sources with random entries."""
        parts = []
        for row, job in enumerate(self.job.rows):
            if job.kernel is None or not job.kernel.random:
                continue
            count = -(-job.kernel.source_entries // moments.BLOCK)
            for first in range(0, count, _MOMENT_BLOCKS):
                parts.append((row, first, min(first + _MOMENT_BLOCKS, count)))
        if not parts:
            return {}

        def work(worker: Worker, number: int) -> list[moments.Moments]:
            return worker.moments(*parts[number])

        blocks_of: dict[int, list[moments.Moments]] = {}
        for (row, _, _), blocks in zip(parts, self._shared(len(parts), work, {}, None), strict=True):
            blocks_of.setdefault(row, []).extend(blocks)
        return {row: moments.deviation(blocks) for row, blocks in blocks_of.items()}

    def _shared(
        self,
        count: int,
        work: Callable[[Worker, int], T],
        deviations: Mapping[int, float],
        note: Callable[[int, T], None] | None,
    ) -> list[T]:
        """Do ``work`` for the numbers below ``count`` on all ranks; results in the numbers' order."""
        take = self.team.numbers()
        done: dict[int, T] = {}
        for rank in self.team.step(lambda: self._spread(count, take, work, deviations, note)):
            done.update(rank)
        return [done[number] for number in range(count)]

    def _spread(
        self,
        count: int,
        take: Callable[[], int],
        work: Callable[[Worker, int], T],
        deviations: Mapping[int, float],
        note: Callable[[int, T], None] | None,
    ) -> dict[int, T]:
        """Do ``work`` on all threads for the numbers that ``take`` gives, below ``count``; results by number.

        Raises:
            Exception: the first that a thread met; the others are stopped.
        """
        said: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        stop = threading.Event()
        counter = [0] * self.threads
        source = self.job.plan.source.root
        lock = threading.Lock()

        def thread(index: int) -> None:
            def wrote(size: int) -> None:
                counter[index] += size

            worker: Worker | None = None
            try:
                around = Surroundings(self.job, deviations, wrote, stop.is_set, self.sealed)
                worker = Worker(around, Handles(source), Handles(self.target, writing=True))
                _run_all(worker)
                said.put(("done", index))
            except Stopped:
                said.put(("done", index))
            except BaseException as error:
                stop.set()
                said.put(("error", error))
            finally:
                if worker is not None:
                    worker.close()

        def _run_all(worker: Worker) -> None:
            import numpy as np

            with np.errstate(all="ignore"):  # Inf and NaN are counted, not warned of
                while not stop.is_set():
                    number = take()
                    if number >= count:
                        return
                    result = work(worker, number)
                    if note is not None:
                        with lock:
                            note(number, result)
                    said.put(("result", (number, result)))

        threads = [threading.Thread(target=thread, args=(i,), daemon=True) for i in range(self.threads)]
        for one in threads:
            one.start()
        try:
            return self._listen(said, counter)
        finally:
            stop.set()
            for one in threads:
                one.join()

    def _listen(self, said: queue.SimpleQueue[tuple[str, Any]], counter: list[int]) -> dict[int, Any]:
        results: dict[int, Any] = {}
        running, reported = self.threads, 0
        error: BaseException | None = None
        while running:
            try:
                kind, value = said.get(timeout=_POLL)
            except queue.Empty:
                kind, value = "", None
            if kind == "result":
                results[value[0]] = value[1]
            elif kind == "done":
                running -= 1
            elif kind == "error":
                error, running = error or value, running - 1
            total = sum(counter)
            if total > reported:
                self.progress(total - reported)
                reported = total
        if error is not None:
            raise error
        return results


def processors() -> int:
    """Cores that this process may run on: a container or a job's slot may have fewer than its machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _crc_of(handles: Handles, placement: Placement, span: Span, buffer: Any) -> int:
    crc, at = 0, span.start
    while at < span.start + span.length:
        part = buffer[: min(len(buffer), span.start + span.length - at)]
        read(handles, placement, at, at + len(part), part)
        crc = combine(crc, crc32(part), len(part))
        at += len(part)
    return crc
