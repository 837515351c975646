"""One task done: read a piece, make its images, write them, and remember what the bytes were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkling_cli.execute import bundle
from sparkling_cli.execute.job import Job, Part, PartResult, RowJob
from sparkling_cli.storage.byte_ranges import Handles, Placement, fetched, read, write_range
from sparkling_cli.storage.byte_ranges import write as write_boxes
from sparkling_cli.storage.crc import Span, crc32, merge, zeros
from sparkling_cli.storage.threads import Stopped
from sparkling_cli.widening import moments
from sparkling_cli.widening.derived import derived
from sparkling_cli.widening.entries import as_doubles, count_nonfinite, numpy_dtype
from sparkling_cli.widening.geometry import source_shape
from sparkling_cli.widening.kernel import PIECE, Given, Piece
from sparkling_cli.widening.means import Means
from sparkling_cli.widening.parts import Box
from sparkling_cli.widening.quantized import requantized

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


class Worker:
    """What one thread needs: open files, two buffers, and what all threads share.

    Args:
        job: the job.
        target: root of the output in the making.
        known: stream -> mean and deviation of the unit's old entries, where new ones are random.
        sealed: file and offset of literals that were written together with tensors; workers add to it.
        clean: the output's files are new, so what is not written in them is zero.
        wrote: called with the number of target bytes after every piece.
        stopped: asked before every piece; :class:`Stopped` is raised when it says yes.
    """

    def __init__(
        self,
        job: Job,
        target: Path,
        known: Mapping[str, moments.Moments],
        sealed: set[tuple[str, int]],
        clean: bool,
        wrote: Callable[[int], None],
        stopped: Callable[[], bool],
    ) -> None:
        import numpy as np

        self.job, self.known, self.sealed, self.clean = job, known, sealed, clean
        self.wrote, self.stopped = wrote, stopped
        self.source, self.target = Handles(job.plan.source.root), Handles(target, writing=True)
        room = max(PIECE, bundle.ROOM)
        self._old = np.empty(room, dtype=np.uint8)
        self._new = np.empty(room, dtype=np.uint8)
        self._means: dict[int, Means] = {}

    def close(self) -> None:
        """Close the files."""
        self.source.close()
        self.target.close()

    def run(self, task: tuple[Part, ...]) -> list[PartResult]:
        """Do a task.

        Raises:
            CheckpointError: the source cannot be read.
            OSError: the output cannot be written; names the file.
            Stopped: on request.
        """
        results: list[PartResult] = []
        while len(results) < len(task):
            together = bundle.gather(task, len(results), self.job)
            if together is not None:
                results += self._run_bundle(together)
            else:
                results.append(self._run_part(task[len(results)]))
        return results

    def _run_bundle(self, together: bundle.Bundle) -> list[PartResult]:
        if self.stopped():
            raise Stopped
        handles, buffers = (self.source, self.target), (self._old, self._new)
        results = bundle.run(together, handles, buffers, self._given_of)
        self.sealed.update((joint.path, joint.offset) for joint in together.joints)
        self.wrote(sum(member.job.nbytes for member in together.members))
        return results

    def _run_part(self, part: Part) -> PartResult:
        job = self.job.rows[part.row]
        target: list[Span] = []
        if job.row.recipe.derived:
            return self._derive(part.row, job, target)
        if job.kernel is None:
            self._zero(job, 0, job.nbytes, target)
            self.wrote(job.nbytes)
            return PartResult(part.row, (), tuple(target), 0)
        source: list[Span] = []
        nonfinite = 0
        for index in range(part.first, part.last):
            if self.stopped():
                raise Stopped
            piece = job.kernel.piece(index)
            start, stop = piece.start * job.item, piece.stop * job.item
            data = self._old[: stop - start]
            read(self.source, job.source, start, stop, data)
            source.append(Span(start, stop - start, crc32(data)))
            nonfinite += count_nonfinite(data, job.row.dtype)
            self._write_images(part.row, piece, data, source[-1].crc, target)
        joined = merge(target) if len(job.target.places) == 1 else target
        return PartResult(part.row, tuple(merge(source)), tuple(joined), nonfinite)

    def _derive(self, row: int, job: RowJob, target: list[Span]) -> PartResult:
        """Make a tensor as a whole: its new entries follow from all old ones, or it is part of another."""
        import numpy as np

        recipe = job.row.recipe
        data = fetched(self.source, job.source)
        if recipe.blocks is None:
            old = data.view(numpy_dtype(recipe.dtype)).reshape(source_shape(recipe.view))
            made = np.ascontiguousarray(derived(recipe.view, old, recipe.dtype))
        else:
            places = (Placement(one.dtype, one.shape, one.extents, job.row.key) for one in job.row.parts)
            parts = [fetched(self.source, place) for place in places]
            made = requantized(recipe.view, recipe.scale, recipe.blocks, parts)
        self._put(job, 0, made.reshape(-1).view(np.uint8), None, target)
        self.wrote(job.nbytes)
        whole = (Span(0, len(data), crc32(data)),)
        return PartResult(row, whole, tuple(target), count_nonfinite(data, recipe.dtype))

    def _write_images(self, row: int, piece: Piece, data: Array, crc: int, spans: list[Span]) -> None:
        """Write all images of a piece; images of equal content are made and summed once."""
        job, kernel = self.job.rows[row], self.job.rows[row].kernel
        assert kernel is not None
        made: tuple[int, int, int] | None = None
        made_crc: int | None = None
        written = 0
        for image in piece.images:
            start, stop = image.start * job.item, image.stop * job.item
            written += stop - start
            if image.program.zero:
                self._zero(job, start, stop, spans)
            elif image.program.plain:
                out = data[kernel.bytes_of(image)]
                self._put(job, start, out, crc if len(out) == len(data) else None, spans)
            else:
                out = self._new[: stop - start]
                content = (id(image.program), image.first, image.last)
                if image.program.given or content != made:
                    kernel.fill(image, data, out, self._given_of(row) if image.program.given else None)
                    made, made_crc = content, None
                made_crc = self._put(job, start, out, made_crc, spans)
        self.wrote(written)

    def _zero(self, job: RowJob, start: int, stop: int, spans: list[Span]) -> None:
        """Note zeros. They need writing only where a killed run may have left something else."""
        if start == stop:
            return
        if not self.clean:
            self._write_zeros(job, start, stop)
        if not job.target.flat:
            spans.append(Span(start, stop - start, zeros(stop - start)))
            return
        for place in job.target.cut(start, stop):
            size = place.stop - place.start
            spans.append(Span(place.start, size, zeros(size)))

    def _write_zeros(self, job: RowJob, start: int, stop: int) -> None:
        import numpy as np

        blank = np.zeros(min(PIECE, stop - start), dtype=np.uint8)
        for at in range(start, stop, PIECE):
            if self.stopped():
                raise Stopped
            end = min(at + PIECE, stop)
            write_boxes(self.target, job.target, at, end, blank[: end - at])

    def _put(self, job: RowJob, start: int, out: Array, crc: int | None, spans: list[Span]) -> int | None:
        """Write bytes of a target and note their CRC, one span per place; returns the CRC of all."""
        if not job.target.flat:
            write_boxes(self.target, job.target, start, start + len(out), out)
            spans.append(Span(start, len(out), crc32(out) if crc is None else crc))
            return spans[-1].crc
        whole = len(job.target.places) == 1
        for place in job.target.cut(start, start + len(out)):
            part = out[place.start - start : place.stop - start]
            known = crc if whole and crc is not None else crc32(part)
            spans.append(Span(place.start, len(part), known))
            write_range(self.target, place.path, place.offset, part)
        return spans[-1].crc if whole else None

    def _given_of(self, row: int) -> Given:
        job, spec = self.job.rows[row], self.job.plan.spec
        if row not in self._means:
            shape = source_shape(job.row.recipe.view)  # rows of the parameter, however its copy is stored
            self._means[row] = Means(self.job.plan.means, shape, partial(self._numbers, job))
        return Given(spec.seed, job.row.stream, self.known, self._means[row], spec.router_noise)

    def _numbers(self, job: RowJob, start: int, stop: int) -> Array:
        """Entries ``start <= i < stop`` of a row's source."""
        return as_doubles(fetched(self.source, job.source, start, stop), job.row.dtype)

    def moments(self, row: int, box: Box, first: int, last: int) -> list[moments.Moments]:
        """Mean and spread of a unit's blocks ``first <= i < last`` (``moments.BLOCK`` entries each).

        Raises:
            CheckpointError: the source cannot be read.
            Stopped: on request.
        """
        import numpy as np

        dtype = self.job.rows[row].row.dtype
        found = []
        for index in range(first, last):
            if self.stopped():
                raise Stopped
            low, high = index * moments.BLOCK, min((index + 1) * moments.BLOCK, box.entries)
            values = [as_doubles(data, dtype) for data in self._picked(row, box, low, high)]
            found.append(moments.block_moments(values[0] if len(values) == 1 else np.concatenate(values)))
        return found

    def _picked(self, row: int, box: Box, low: int, high: int) -> Iterator[Array]:
        """The bytes of a unit's entries ``low <= i < high``, in parts that are valid until the next one."""
        job = self.job.rows[row]
        first, last = (int(box.places(i, i + 1)[0]) for i in (low, high - 1))
        size = (last + 1 - first) * job.item
        if size > len(self._old) and high - low > 1:  # far apart: in two halves
            middle = (low + high) // 2
            yield from self._picked(row, box, low, middle)
            yield from self._picked(row, box, middle, high)
            return
        data = self._old[:size]
        read(self.source, job.source, first * job.item, (last + 1) * job.item, data)
        if last + 1 - first == high - low:
            yield data
            return
        chosen = data.reshape(-1, job.item)[box.places(low, high) - first]
        yield chosen.reshape(-1)
