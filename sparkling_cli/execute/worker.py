"""One task done: read a piece, make its images, write them, and remember what the bytes were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

from sparkling_cli.checkpoint.model import FLOATING
from sparkling_cli.execute import fill, moments
from sparkling_cli.execute.crc import Span, crc32, merge, zeros
from sparkling_cli.execute.job import Job, Part, PartResult, RowJob
from sparkling_cli.execute.kernel import PIECE, Piece
from sparkling_cli.execute.places import Handles, Place, read, read_range, write_range
from sparkling_cli.execute.places import write as write_boxes

if TYPE_CHECKING:
    import numpy as np

    from sparkling_cli.execute.kernel import Noise

    Array = np.ndarray[Any, Any]

#: entries that are added as one row
_ROW = 1024
#: largest gap between neighbours in a file that is read along
_GAP = 4096
_ALIGN = 64


class Stopped(Exception):
    """Work was broken off on request."""


@dataclass(frozen=True)
class Surroundings:
    """What all workers share.

    Attributes:
        job: the job.
        deviations: row -> standard deviation of its source, for rows with random entries.
        wrote: called with the number of target bytes after every piece.
        stopped: asked before every piece; :class:`Stopped` is raised when it says yes.
    """

    job: Job
    deviations: Mapping[int, float]
    wrote: Callable[[int], None]
    stopped: Callable[[], bool]


class Worker:
    """What one thread needs: open files and two buffers."""

    def __init__(self, around: Surroundings, source: Handles, target: Handles) -> None:
        import numpy as np

        self.around, self.source, self.target = around, source, target
        self._old = np.empty(PIECE, dtype=np.uint8)
        self._new = np.empty(PIECE, dtype=np.uint8)

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
            bundle = self._bundle(task, len(results))
            if len(bundle) > 1:
                results += self._run_bundle(bundle)
            else:
                results.append(self._run_part(task[len(results)]))
        return results

    def _bundle(self, task: tuple[Part, ...], first: int) -> list[tuple[int, RowJob]]:
        """Small rows from ``first`` on that are neighbours in the source and fit into a piece together."""
        found: list[tuple[int, RowJob]] = []
        path, base, end, room = "", 0, 0, PIECE
        for number in range(first, len(task)):
            row = task[number].row
            job = self.around.job.rows[row]
            if not job.simple:
                break
            start, stop, where, offset = job.source.places[0]
            if not found:
                path, base, end = where, offset, offset
            room -= job.nbytes + _ALIGN
            near = where == path and 0 <= offset - end <= _GAP
            if not near or room < 0 or offset + stop - start - base > PIECE - _ALIGN:
                break
            end = offset + stop - start
            found.append((row, job))
        return found

    def _run_bundle(self, bundle: list[tuple[int, RowJob]]) -> list[PartResult]:
        """Rows that are read at once, and written at once where they are neighbours in the output too."""
        if self.around.stopped():
            raise Stopped
        first, last = bundle[0][1].source.places[0], bundle[-1][1].source.places[0]
        base = first.offset - first.offset % _ALIGN
        window = self._old[: last.offset + last.stop - base]
        read_range(self.source, first.path, first.offset, window[first.offset - base :])
        results, at, pending = [], 0, _Pending(self.target, self._new)
        for row, job in bundle:
            source, target, kernel = job.source.places[0], job.target.places[0], job.kernel
            assert kernel is not None
            data = window[source.offset - base : source.offset - base + source.stop]
            image = kernel.piece(0).images[0]
            at = pending.place(target, at)
            out = self._new[at : at + target.stop]
            if image.program.plain:
                out[...] = data
            else:
                noise = self._noise_of(job.row.stream) if image.program.random else None
                kernel.fill(image, data, out, noise, self.around.deviations.get(row, 0.0))
            at += target.stop
            source_span = Span(0, source.stop, crc32(data))
            target_span = Span(0, target.stop, source_span.crc if image.program.plain else crc32(out))
            bad = count_nonfinite(data, job.row.dtype)
            results.append(PartResult(row, (source_span,), (target_span,), bad))
        pending.flush()
        self.around.wrote(sum(job.nbytes for _, job in bundle))
        return results

    def _run_part(self, part: Part) -> PartResult:
        job = self.around.job.rows[part.row]
        target: list[Span] = []
        if job.kernel is None:
            _zero(job, 0, job.nbytes, target)
            self.around.wrote(job.nbytes)
            return PartResult(part.row, (), tuple(target), 0)
        source: list[Span] = []
        nonfinite = 0
        for index in range(part.first, part.last):
            if self.around.stopped():
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

    def _write_images(self, row: int, piece: Piece, data: Array, crc: int, spans: list[Span]) -> None:
        """Write all images of a piece; images of equal content are made and summed once."""
        job, kernel = self.around.job.rows[row], self.around.job.rows[row].kernel
        assert kernel is not None
        made: tuple[int, int, int] | None = None
        made_crc: int | None = None
        written = 0
        for image in piece.images:
            start, stop = image.start * job.item, image.stop * job.item
            written += stop - start
            if image.program.zero:
                _zero(job, start, stop, spans)
            elif image.program.plain:
                out = data[kernel.bytes_of(image)]
                self._put(job, start, out, crc if len(out) == len(data) else None, spans)
            else:
                out = self._new[: stop - start]
                content = (id(image.program), image.first, image.last)
                if image.program.random or content != made:
                    noise = self._noise_of(job.row.stream) if image.program.random else None
                    kernel.fill(image, data, out, noise, self.around.deviations.get(row, 0.0))
                    made, made_crc = content, None
                made_crc = self._put(job, start, out, made_crc, spans)
        self.around.wrote(written)

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

    def _noise_of(self, stream: str) -> Noise:
        return partial(fill.normal, self.around.job.plan.seed, stream)

    def moments(self, row: int, first: int, last: int) -> list[moments.Moments]:
        """Mean and spread of the source's blocks ``first <= i < last`` (``moments.BLOCK`` entries each).

        Raises:
            CheckpointError: the source cannot be read.
            Stopped: on request.
        """
        job = self.around.job.rows[row]
        assert job.kernel is not None
        entries, found = job.kernel.source_entries, []
        for index in range(first, last):
            if self.around.stopped():
                raise Stopped
            low, high = index * moments.BLOCK, min((index + 1) * moments.BLOCK, entries)
            data = self._old[: (high - low) * job.item]
            read(self.source, job.source, low * job.item, high * job.item, data)
            found.append(moments.block_moments(_doubles(data, job.row.dtype)))
        return found


class _Pending:
    """Output that lies together in a buffer and in a file, to be written at once."""

    def __init__(self, handles: Handles, buffer: Array) -> None:
        self._handles, self._buffer = handles, buffer
        self._path, self._offset, self._start, self._stop = "", 0, 0, 0

    def place(self, target: Place, at: int) -> int:
        """Where in the buffer bytes for that place go, ``at`` being its first free byte."""
        together = target.path == self._path and target.offset == self._offset + self._stop - self._start
        if not together or self._stop != at:
            self.flush()
            at += (target.offset - at) % _ALIGN  # as aligned in memory as in the file
            self._path, self._offset, self._start, self._stop = target.path, target.offset, at, at
        self._stop += target.stop
        return at

    def flush(self) -> None:
        """Write what has gathered."""
        if self._stop > self._start:
            write_range(self._handles, self._path, self._offset, self._buffer[self._start : self._stop])
        self._start = self._stop


def _zero(job: RowJob, start: int, stop: int, spans: list[Span]) -> None:
    """Zeros need no writing: new files are zeros all over."""
    if start == stop:
        return
    if not job.target.flat:
        spans.append(Span(start, stop - start, zeros(stop - start)))
        return
    for place in job.target.cut(start, stop):
        size = place.stop - place.start
        spans.append(Span(place.start, size, zeros(size)))


def _doubles(data: Array, dtype: str) -> Array:
    import numpy as np

    if dtype in ("float32", "float64"):
        return data.view(dtype).astype(np.float64)
    import torch

    values: Array = torch.from_numpy(data.view(np.int16)).view(getattr(torch, dtype)).double().numpy()
    return values


def count_nonfinite(data: Array, dtype: str) -> int:
    """NaN and Inf among the entries.

    A sum is finite only if every entry is, and costs a tenth of looking at them one by one; a sum that
    is not (finite entries can overflow too) is looked into.
    """
    if dtype not in FLOATING or not len(data):
        return 0
    import numpy as np

    if dtype in ("float32", "float64"):
        numbers = data.view(dtype)
        rows = len(numbers) // _ROW
        total = np.add.reduce(numbers[rows * _ROW :])
        if rows:  # adding whole rows is three times as fast as adding along one
            total += np.add.reduce(np.add.reduce(numbers[: rows * _ROW].reshape(rows, _ROW), axis=0))
        return 0 if isfinite(total) else int(len(numbers) - np.isfinite(numbers).sum())
    import torch

    values = torch.from_numpy(data.view(np.int16)).view(getattr(torch, dtype))
    if isfinite(values.sum().item()):
        return 0
    return int(values.numel() - torch.isfinite(values).sum().item())
