"""Small rows, many at a time: neighbours are read and written together, and equal ones computed together.

A mixture of experts has tens of thousands of tensors of a few kinds, in turn. Within a bundle the tensors
of one kind lie at even distances, in the source as in the output, so one strided operation makes all of
them. What is left for every tensor by itself is its checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.execute.job import Job, Part, PartResult, RowJob, Seam
from sparkling_cli.storage.byte_ranges import Handles, read_range, write_range
from sparkling_cli.storage.crc import Span, crc32
from sparkling_cli.storage.tensors import ITEM_BYTES
from sparkling_cli.widening.entries import count_nonfinite
from sparkling_cli.widening.kernel import Kernel

if TYPE_CHECKING:
    import numpy as np

    from sparkling_cli.widening.kernel import Given

    Array = np.ndarray[Any, Any]

#: bytes of the source, and of the output, that are in memory at once: what a core's caches hold
ROOM = 1 << 21
#: largest gap between neighbours in a file that is read along
_GAP = 4096
_ALIGN = 64
#: most tensors of one kernel that take turns, as the gate and up matrices of experts do
_TURNS = 4


class Member(NamedTuple):
    """A row of a bundle: its number, and where its bytes are in the two buffers."""

    row: int
    job: RowJob
    kernel: Kernel
    source: slice
    target: slice


class Stretch(NamedTuple):
    """Bytes that lie together in the output's buffer and in a file."""

    path: str
    offset: int
    start: int
    stop: int


class Joint(NamedTuple):
    """A seam between two members that lie in one stretch: written with them, checksum and all.

    Attributes:
        member: the number of the one before it.
        start: where it begins in the output's buffer.
        path: the file that it is written to.
        offset: where it begins in the file.
        seam: what stands there.
    """

    member: int
    start: int
    path: str
    offset: int
    seam: Seam


class Bundle(NamedTuple):
    """Rows of one dtype that are neighbours in the source.

    Attributes:
        members: the rows.
        path: the file that they are read from.
        start: where in it reading begins.
        window: where in the source's buffer that goes.
        stretches: what is written, in order.
        joints: what is written between members.
    """

    members: tuple[Member, ...]
    path: str
    start: int
    window: slice
    stretches: tuple[Stretch, ...]
    joints: tuple[Joint, ...]


def gather(task: Sequence[Part], first: int, job: Job) -> Bundle | None:
    """The rows of a task from ``first`` on that can be done together; None if not even two can."""
    rows = job.rows
    head = rows[task[first].row]
    if not head.simple:
        return None
    dtype = head.row.dtype
    _, _, path, begin = head.source.places[0]
    lead = begin % _ALIGN  # as aligned in memory as in the file
    members: list[Member] = []
    stretches: list[Stretch] = []
    joints: list[Joint] = []
    end = begin  # of what is read, in its file
    _, _, into, start = head.target.places[0]  # the last stretch: its file, where in it,
    opened = at = start % _ALIGN  # and where in the buffer
    for number in range(first, len(task)):
        row = task[number].row
        one = rows[row]
        if not one.simple or one.kernel is None or one.row.dtype != dtype:
            break
        (_, size, where, offset), (_, length, to, place) = one.source.places[0], one.target.places[0]
        if where != path or not 0 <= offset - end <= _GAP:
            break
        gap = place - (start + at - opened) if to == into else -1
        seam = _seam(job.seams, into, place - gap, gap, members[-1].target) if gap > 0 else None
        joined = gap == 0 or seam is not None
        begins = at + gap if joined else at + (place - at) % _ALIGN
        base, end = lead + offset - begin, offset + size
        if base + size > ROOM or begins + length > ROOM:
            break
        if seam is not None:
            joints.append(Joint(len(members) - 1, at, into, place - gap, seam))
        if not joined:
            stretches.append(Stretch(into, start, opened, at))
            into, start, opened = to, place, begins
        at = begins + length
        members.append(Member(row, one, one.kernel, slice(base, base + size), slice(begins, at)))
    if len(members) < 2:
        return None
    stretches.append(Stretch(into, start, opened, at))
    window = slice(lead, members[-1].source.stop)
    return Bundle(tuple(members), path, begin, window, tuple(stretches), tuple(joints))


def _seam(
    seams: Mapping[tuple[str, int], Seam], path: str, offset: int, size: int, before: slice
) -> Seam | None:
    """What stands in a gap behind a target of the stretch; None if that cannot be written along.

    Its checksums must be of the target before it alone: they are known when the stretch is written.
    """
    found = seams.get((path, offset))
    if found is None or len(found.content) != size:
        return None
    known = (offset - (before.stop - before.start), offset)
    return found if all(slot[1:] == known for slot in found.slots) else None


def run(
    bundle: Bundle,
    handles: tuple[Handles, Handles],
    buffers: tuple[Array, Array],
    given: Callable[[int], Given],
) -> list[PartResult]:
    """Read a bundle, make its output and write it.

    Args:
        bundle: what to do.
        handles: of the source and the output.
        buffers: ``ROOM`` bytes for the source and for the output.
        given: random numbers and means of a row.

    Raises:
        CheckpointError: the source cannot be read.
        OSError: the output cannot be written; names the file.
    """
    import numpy as np

    old, new = buffers
    read_range(handles[0], bundle.path, bundle.start, old[bundle.window])
    for members in _alike(bundle.members):
        _fill(members, old, new, given)
    dtype = bundle.members[0].job.row.dtype
    spotless = _spotless(bundle, old[bundle.window], dtype)
    results = []
    for row, _, kernel, source, target in bundle.members:
        data = old[source]
        before = Span(0, len(data), crc32(data))
        after = before if kernel.plain else Span(0, target.stop - target.start, crc32(new[target]))
        bad = 0 if spotless else count_nonfinite(data, dtype)
        results.append(PartResult(row, (before,), (after,), bad))
    for joint in bundle.joints:
        content = bytearray(joint.seam.content)
        for place, _, _ in joint.seam.slots:
            content[place : place + 4] = results[joint.member].target[0].crc.to_bytes(4, "little")
        new[joint.start : joint.start + len(content)] = np.frombuffer(content, np.uint8)
    for stretch in bundle.stretches:
        write_range(handles[1], stretch.path, stretch.offset, new[stretch.start : stretch.stop])
    return results


def _spotless(bundle: Bundle, whole: Array, dtype: str) -> bool:
    """Whether one look at all that was read shows no NaN or Inf; else each member needs a look of its own.

    What lies between neighbours may be taken for one; none goes unseen, if entries are read where they begin.
    """
    first, item = bundle.window.start, ITEM_BYTES[dtype]
    aligned = all((member.source.start - first) % item == 0 for member in bundle.members)
    return aligned and count_nonfinite(whole, dtype) == 0


def _alike(members: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """Members with one kernel, at even distances (of whole entries) in both buffers."""
    kinds: dict[int, list[Member]] = {}
    for member in members:
        kinds.setdefault(id(member.kernel), []).append(member)
    for kind in kinds.values():
        apart = [_distance(one, other) for one, other in pairwise(kind)]
        at = 0
        while at < len(kind):
            turns, stop = _regular(apart, at, kind[0].job.item)
            for first in range(at, at + turns):
                yield kind[first:stop:turns]
            at = stop


def _regular(apart: list[tuple[int, int]], at: int, item: int) -> tuple[int, int]:
    """How many take turns from member ``at`` on, each at even distances, and where that ends.

    Args:
        apart: distances of all neighbours, in bytes of both buffers.
        at: the first member.
        item: bytes of an entry.
    """
    best = (1, at + 1)
    for turns in range(1, _TURNS + 1):
        end = at + turns
        if end > len(apart):
            break
        step = [sum(part) for part in zip(*apart[at:end], strict=True)]
        if step[0] % item or step[1] % item:
            continue
        while end < len(apart) and apart[end] == apart[end - turns]:
            end += 1
        if (end + 1 - at) * best[0] > (best[1] - at) * turns:  # larger groups
            best = turns, end + 1
        if end == len(apart):
            break
    return best


def _distance(one: Member, other: Member) -> tuple[int, int]:
    return other.source.start - one.source.start, other.target.start - one.target.start


def _fill(members: Sequence[Member], old: Array, new: Array, given: Callable[[int], Given]) -> None:
    """Make the output of members that are alike."""
    kernel = members[0].kernel
    if kernel.given:  # every row has its own numbers
        image = kernel.piece(0).images[0]
        for member in members:
            kernel.fill(image, old[member.source], new[member.target], given(member.row))
        return
    steps = _distance(members[0], members[1]) if len(members) > 1 else (0, 0)
    kernel.fill_alike(
        len(members), old[members[0].source.start :], steps[0], new[members[0].target.start :], steps[1]
    )
