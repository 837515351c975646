"""What there is to do, cut into tasks.

A job is the same on every run and on every rank: tasks depend on the plan alone, never on the number of
threads or processes, so finished tasks can be kept after a crash and shared out among ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import OutputFile
from sparkling_cli.plan.model import Plan, Recipe, Row
from sparkling_cli.storage.byte_ranges import Placement
from sparkling_cli.storage.crc import Span
from sparkling_cli.storage.tensors import Extent
from sparkling_cli.widening.kernel import Kernel, compile_kernel

#: target bytes of one task
TASK = 1 << 25
#: longest literal that is written together with its neighbours
SEAM = 4096


class RowJob:
    """One row with its kernel and places: one of tens of thousands, hence no dataclass.

    Attributes:
        row: the row.
        kernel: None if the whole tensor becomes zero, or is made as a whole.
        source: where its source's bytes are.
        target: where its bytes shall be.
        item: bytes per entry.
        nbytes: bytes of the target.
        simple: small enough for one piece, and in one place on both sides.
    """

    __slots__ = ("item", "kernel", "nbytes", "row", "simple", "source", "target")

    def __init__(self, row: Row, kernel: Kernel | None, extents: tuple[Extent, ...]) -> None:
        recipe = row.recipe
        self.row, self.kernel = row, kernel
        self.source = Placement(recipe.dtype, recipe.before, row.source.extents, row.key)
        self.target = Placement(recipe.dtype, recipe.shape, extents, row.key)
        self.item = self.target.item
        self.nbytes = prod(recipe.shape) * self.item
        self.simple = (
            kernel is not None
            and kernel.split < 0
            and kernel.pieces == 1
            and len(self.source.places) == len(self.target.places) == 1
        )


class Part(NamedTuple):
    """Pieces ``first <= i < last`` of a row (0, 0 for a row without a kernel)."""

    row: int
    first: int
    last: int


class PartResult(NamedTuple):
    """CRCs of what was read and written, in bytes of the tensor, and what was wrong with it."""

    row: int
    source: tuple[Span, ...]
    target: tuple[Span, ...]
    nonfinite: int


class Seam(NamedTuple):
    """What stands between two neighbours in an output file: the end of one record, the head of the next.

    Attributes:
        content: the bytes, with room for checksums.
        slots: (place in ``content``, first byte in the file, end) of CRC-32s and what they are taken of.
    """

    content: bytes
    slots: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Job:
    """All rows, in the plan's order, and tasks that cover them.

    Attributes:
        plan: what to do.
        files: the output's, laid out.
        rows: one per row of the plan.
        seams: file and offset -> a small literal there.
    """

    plan: Plan
    files: tuple[OutputFile, ...]
    rows: tuple[RowJob, ...]
    seams: Mapping[tuple[str, int], Seam]

    @cached_property
    def tasks(self) -> tuple[tuple[Part, ...], ...]:
        """Tasks of about ``TASK`` bytes each, in the output's order."""
        tasks: list[tuple[Part, ...]] = []
        small: list[Part] = []
        size = 0
        for index, job in enumerate(self.rows):
            if job.nbytes <= TASK:
                small.append(Part(index, 0, job.kernel.pieces if job.kernel else 0))
                size += job.nbytes
                if size >= TASK:
                    tasks.append(tuple(small))
                    small, size = [], 0
                continue
            tasks.extend((part,) for part in _cut(index, job))
        if small:
            tasks.append(tuple(small))
        return tuple(tasks)


def _cut(index: int, job: RowJob) -> Iterator[Part]:
    if job.kernel is None:
        yield Part(index, 0, 0)
        return
    pieces = job.kernel.pieces
    step = max(pieces * TASK // job.nbytes, 1)
    for first in range(0, pieces, step):
        yield Part(index, first, min(first + step, pieces))


def make_job(plan: Plan, files: tuple[OutputFile, ...]) -> Job:
    """The job of a plan and its laid-out output.

    Raises:
        CheckpointError: extents do not tile a tensor, or an output tensor has no row.
    """
    where: dict[str, tuple[Extent, ...]] = {}
    for file in files:
        for key, extent in file.tensors:
            if extent.path != file.path:
                extent = extent._replace(path=file.path)
            where[key] = (*where[key], extent) if key in where else (extent,)
    kernels = {recipe: _kernel(recipe) for recipe in plan.recipes}
    rows = tuple([RowJob(row, kernels[row.recipe], where.pop(row.key, ())) for row in plan.rows])
    unknown = where.keys()
    if unknown:
        raise CheckpointError(f"the output has tensors that the plan does not make: {sorted(unknown)[:5]}")
    return Job(plan, files, rows, _seams(files))


def _seams(files: tuple[OutputFile, ...]) -> dict[tuple[str, int], Seam]:
    found = {}
    for file in files:
        offsets = [offset for offset, _ in file.literals]
        slots: dict[int, list[tuple[int, int, int]]] = {}
        for checksum in file.checksums:
            for at in checksum.at:
                offset = offsets[bisect_right(offsets, at) - 1]
                slots.setdefault(offset, []).append((at - offset, checksum.start, checksum.stop))
        for offset, content in file.literals:
            if len(content) <= SEAM:
                found[file.path, offset] = Seam(content, tuple(slots.get(offset, ())))
    return found


def _kernel(recipe: Recipe) -> Kernel | None:
    """What makes a recipe's rows; recipes that differ in name alone share it, so their rows go together."""
    if recipe.zero or recipe.derived:
        return None
    return compile_kernel(recipe.view, recipe.dtype, recipe.scale, recipe.offset, fresh=recipe.fresh)
