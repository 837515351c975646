"""Small rows, many at a time: neighbours are read and written together, and equal ones computed together.

A mixture of experts has tens of thousands of tensors of a few kinds, in turn. Within a bundle the tensors
of one kind lie at even distances, in the source as in the output, so one strided operation makes all of
them. What is left for every tensor by itself is its checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.checkpoint.model import ITEM_BYTES
from sparkling_cli.execute.crc import Span, crc32
from sparkling_cli.execute.entries import count_nonfinite
from sparkling_cli.execute.job import Job, Part, PartResult, RowJob, Seam
from sparkling_cli.execute.kernel import Kernel
from sparkling_cli.execute.places import Handles, Place, read_range, write_range

if TYPE_CHECKING:
    import numpy as np

    from sparkling_cli.execute.kernel import Noise

    Array = np.ndarray[Any, Any]

#: bytes of the source, and of the output, that are in memory at once: what a core's caches hold
ROOM = 1 << 21
#: largest gap between neighbours in a file that is read along
_GAP = 4096
_ALIGN = 64


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
    rows, seams = job.rows, job.seams
    head = rows[task[first].row]
    if not head.simple:
        return None
    _, _, path, begin = head.source.places[0]
    lead = begin % _ALIGN  # as aligned in memory as in the file
    members: list[Member] = []
    stretches: list[Stretch] = []
    joints: list[Joint] = []
    at, end = 0, begin
    for number in range(first, len(task)):
        row = task[number].row
        one = rows[row]
        if not one.simple or one.kernel is None or one.row.dtype != head.row.dtype:
            break
        (_, size, where, offset), target = one.source.places[0], one.target.places[0]
        if where != path or not 0 <= offset - end <= _GAP:
            break
        last = stretches[-1] if stretches else None
        seam = _seam(last, target, members[-1].target, seams) if last is not None else None
        begins = at + len(seam.content) if seam is not None else at + (target.offset - at) % _ALIGN
        base, end = lead + offset - begin, offset + size
        if base + size > ROOM or begins + target.stop > ROOM:
            break
        if last is not None and seam is not None:
            if seam.content:
                where_to = target.offset - len(seam.content)
                joints.append(Joint(len(members) - 1, at, target.path, where_to, seam))
            stretches[-1] = last._replace(stop=begins + target.stop)
        else:
            stretches.append(Stretch(target.path, target.offset, begins, begins + target.stop))
        at = begins + target.stop
        members.append(Member(row, one, one.kernel, slice(base, base + size), slice(begins, at)))
    if len(members) < 2:
        return None
    window = slice(lead, members[-1].source.stop)
    return Bundle(tuple(members), path, begin, window, tuple(stretches), tuple(joints))


_NOTHING = Seam(b"", ())


def _seam(last: Stretch, target: Place, before: slice, seams: Mapping[tuple[str, int], Seam]) -> Seam | None:
    """What stands between a stretch and the next target; None if that cannot be written along.

    Its checksums must be of the target before it alone: they are known when the stretch is written.
    """
    end = last.offset + last.stop - last.start
    if target.path != last.path or target.offset < end:
        return None
    if target.offset == end:
        return _NOTHING
    found = seams.get((last.path, end))
    if found is None or len(found.content) != target.offset - end:
        return None
    known = (end - (before.stop - before.start), end)
    return found if all(slot[1:] == known for slot in found.slots) else None


def run(
    bundle: Bundle,
    handles: tuple[Handles, Handles],
    buffers: tuple[Array, Array],
    random: Callable[[int], tuple[Noise, float]],
) -> list[PartResult]:
    """Read a bundle, make its output and write it.

    Args:
        bundle: what to do.
        handles: of the source and the output.
        buffers: ``ROOM`` bytes for the source and for the output.
        random: the noise of a row, and the standard deviation of its source.

    Raises:
        CheckpointError: the source cannot be read.
        OSError: the output cannot be written; names the file.
    """
    import numpy as np

    old, new = buffers
    read_range(handles[0], bundle.path, bundle.start, old[bundle.window])
    for members in _alike(bundle.members):
        _fill(members, old, new, random)
    dtype = bundle.members[0].job.row.dtype
    whole = old[bundle.window]
    # one look at all of them: what lies between neighbours only makes a second look necessary
    spotless = len(whole) % ITEM_BYTES[dtype] == 0 and count_nonfinite(whole, dtype) == 0
    results = []
    for row, _, kernel, source, target in bundle.members:
        data = old[source]
        before = Span(0, len(data), crc32(data))
        plain = kernel.piece(0).images[0].program.plain
        after = before if plain else Span(0, target.stop - target.start, crc32(new[target]))
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


def _alike(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Members with one kernel, at even distances (of whole entries) in both buffers."""
    kinds: dict[int, list[Member]] = {}
    for member in members:
        kinds.setdefault(id(member.kernel), []).append(member)
    for kind in kinds.values():
        group, item = kind[:1], kind[0].job.item
        for member in kind[1:]:
            apart = _distance(group[-1], member)
            uneven = len(group) > 1 and apart != _distance(group[0], group[1])
            if uneven or apart[0] % item or apart[1] % item:
                yield group
                group = []
            group.append(member)
        yield group


def _distance(one: Member, other: Member) -> tuple[int, int]:
    return other.source.start - one.source.start, other.target.start - one.target.start


def _fill(
    members: list[Member], old: Array, new: Array, random: Callable[[int], tuple[Noise, float]]
) -> None:
    """Make the output of members that are alike."""
    kernel = members[0].kernel
    if kernel.random:  # every row has its own noise
        image = kernel.piece(0).images[0]
        for member in members:
            kernel.fill(image, old[member.source], new[member.target], *random(member.row))
        return
    steps = _distance(members[0], members[1]) if len(members) > 1 else (0, 0)
    kernel.fill_alike(
        len(members), old[members[0].source.start :], steps[0], new[members[0].target.start :], steps[1]
    )
