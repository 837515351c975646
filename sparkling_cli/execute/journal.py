"""What a killed run had finished: one line per task, each guarded by a CRC of its own.

The journal is a claim, not a proof (the machine itself may have gone down): a task found in it is taken
over only after the bytes it wrote have been read back and have the CRCs that it says.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from sparkling_cli import __version__
from sparkling_cli.execute.job import Job, PartResult
from sparkling_cli.execute.source_state import source_paths, source_state
from sparkling_cli.storage.crc import Span, crc32


class Journal:
    """Lines are appended whole, by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def add(self, task: int, results: list[PartResult]) -> None:
        """Note a finished task."""
        numbers = [task]
        for row, source, target, nonfinite in results:
            numbers += (row, nonfinite, len(source), len(target))
            for span in (*source, *target):
                numbers += span
        text = " ".join(map(str, numbers)).encode()
        self._file.write(b"%08x %s\n" % (crc32(text), text))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journals(paths: Iterable[Path]) -> dict[int, list[PartResult]]:
    """Finished tasks by number; lines that were cut short are left out."""
    found: dict[int, list[PartResult]] = {}
    for line in b"\n".join(path.read_bytes() for path in paths).split(b"\n"):
        crc, _, text = line.partition(b" ")
        if len(crc) != 8 or crc != b"%08x" % crc32(text) or not text[:1].isdigit():
            continue
        task, *numbers = map(int, text.split())
        found[task] = list(_results(iter(numbers)))
    return found


def _results(numbers: Iterator[int]) -> Iterator[PartResult]:
    for row in numbers:
        nonfinite, sources, targets = islice(numbers, 3)
        spans = [Span(*islice(numbers, 3)) for _ in range(sources + targets)]
        yield PartResult(row, tuple(spans[:sources]), tuple(spans[sources:]), nonfinite)


def fingerprint(job: Job) -> str:
    """A digest of all that decides the output's bytes: equal digests, equal work.

    Source files count by place, size and time of change; reading them again would cost as much as the
    work itself.
    """
    plan = job.plan
    digest = hashlib.sha256()

    def note(*items: object) -> None:
        digest.update(repr(items).encode())

    note(__version__, str(plan.source.root.resolve()), plan.spec, plan.recipes)
    numbers = {recipe: number for number, recipe in enumerate(plan.recipes)}
    lines = [f"{row.key}\0{row.stream}\0{numbers[row.recipe]}\n" for row in plan.rows]
    digest.update("".join(lines).encode(errors="surrogatepass"))
    paths = source_paths(plan)
    for path, state in source_state(plan.source.root, paths).items():
        note(path, state)
    for file in job.files:
        note(file.path, file.size, file.last, [offset for offset, _ in file.literals])
        digest.update(b"".join(content for _, content in file.literals))
        digest.update("\0".join([key for key, _ in file.tensors]).encode(errors="surrogatepass"))
        digest.update(array("q", [extent.offset for _, extent in file.tensors]))
    return digest.hexdigest()
