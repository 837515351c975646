"""Megatron's optimizer state in flat buckets (``dp_reshardable``): which of their entries are whose.

A bucket has the masters and the moments of many parameters, each from a multiple of 64 entries on, and no
name of any. But masters, rounded, are the weights: a parameter is where a part of a weight, as a rank saved
it, is found again. What is found is checked at places all over the part, and every bucket has to be made up
of such parts, so a moment is never taken for another parameter's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.storage.byte_ranges import Handles, Placement, fetched, slabs
from sparkling_cli.storage.tensors import FLOATING, Extent, Shape, StoredTensor
from sparkling_cli.widening.bfloat16 import round_into
from sparkling_cli.widening.entries import as_doubles

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: all that the distributed optimizer keeps by group of ranks: its buckets, its groups, its buckets' sizes
FLAT = re.compile(r"((?:chained_\d+\.)?)optimizer\.distributed\.dp_group_idx_(\d+)\.(.+)")
_BUCKET = re.compile(r"gbuf_idx_(\d+)\.dtype_.+\.bucket_idx_(\d+)\.([^.]+)")
MASTER = "param"
#: where a parameter begins in a bucket
_ALIGNED = 64
#: entries that are compared at one place, and at how many places of a part
_RUN, _PLACES = 16, 16
WAY_OUT = (
    "resume the run once with --dist-ckpt-optim-fully-reshardable beside --ckpt-format torch_dist, save, and "
    "expand that"
)


class Piece(NamedTuple):
    """A part of a weight, as a rank saved it: ``start`` and ``shape`` in the weight are the extent's."""

    name: str
    dtype: str
    extent: Extent


def is_bucket(name: str) -> bool:
    """Whether an entry of a checkpoint is a tensor of a bucket."""
    found = FLAT.fullmatch(name)
    return found is not None and _BUCKET.fullmatch(found[3]) is not None


def states_in_buckets(
    root: Path, weights: Mapping[str, StoredTensor], buckets: Mapping[str, StoredTensor]
) -> dict[str, dict[str, StoredTensor]]:
    """The optimizer's state by parameter: name -> slot -> where it lies.

    Ranks that have the same part of a weight have the same state of it; the first one's is taken.

    Args:
        root: the checkpoint.
        weights: of the model, by name.
        buckets: their tensors, by the names of the entries.

    Raises:
        CheckpointError: what lies in a bucket is no weight's, or might be two weights'.
    """
    grouped: dict[tuple[str, int, int, int], dict[str, tuple[str, StoredTensor]]] = {}
    for name, stored in buckets.items():
        chain, group, rest = FLAT.fullmatch(name).groups()  # type: ignore[union-attr]
        buffer, bucket, slot = _BUCKET.fullmatch(rest).groups()  # type: ignore[union-attr]
        grouped.setdefault((chain, int(group), int(buffer), int(bucket)), {})[slot] = (name, stored)
    found: dict[str, dict[str, dict[Shape, list[Extent]]]] = {}
    dtypes: dict[tuple[str, str], str] = {}
    handles = Handles(root)
    try:
        index = _Index(_Entries(handles), weights)
        taken: dict[tuple[str, int], set[Piece]] = {}
        for key, slots in sorted(grouped.items()):
            places = {
                slot: Placement(stored.dtype, stored.shape, stored.extents, name)
                for slot, (name, stored) in slots.items()
            }
            for at, piece in index.parts_of(slots, taken.setdefault(key[:2], set())):
                for slot, (name, stored) in slots.items():
                    if dtypes.setdefault((piece.name, slot), stored.dtype) != stored.dtype:
                        raise _unclear(name, f"{slot} of {piece.name!r} is of several dtypes")
                    parts = found.setdefault(piece.name, {}).setdefault(slot, {})
                    if piece.extent.start not in parts:
                        parts[piece.extent.start] = _boxes(places[slot], at, piece.extent)
    finally:
        handles.close()
    for name, slots_of in found.items():
        for slot, parts in slots_of.items():
            if sum(prod(e.shape) for part in parts.values() for e in part) != prod(weights[name].shape):
                raise CheckpointError(
                    f"{root}: the buckets have {slot} of a part of {name!r} only", hint=WAY_OUT
                )
    return {
        name: {
            slot: StoredTensor(
                dtypes[name, slot], weights[name].shape, tuple(e for part in parts.values() for e in part)
            )
            for slot, parts in slots_of.items()
        }
        for name, slots_of in found.items()
    }


def check_masters(
    root: Path, weights: Mapping[str, StoredTensor], masters: Mapping[str, StoredTensor]
) -> None:
    """Masters that lie by parameter are about the weights.

    Where a bucket is padded and not the last, Megatron saves what follows from elsewhere than where it is.

    Args:
        root: the checkpoint.
        weights: of the model, by name.
        masters: of some of them, by name.

    Raises:
        CheckpointError: some are something else.
    """
    handles = Handles(root)
    try:
        entries = _Entries(handles)
        for name, stored in masters.items():
            boxes = {extent[2:]: extent for extent in stored.extents if stored.dtype == "float32"}
            pieces = (piece for piece in _pieces({name: weights[name]}) if piece.extent[2:] in boxes)
            if not all(entries.are_near(piece, boxes[piece.extent[2:]]) for piece in pieces):
                raise CheckpointError(
                    f"{root}: the masters of {name!r} in the optimizer's state are other numbers than "
                    "the weights",
                    hint="Megatron shifts state that it saves with --dist-ckpt-optim-fully-reshardable where "
                    "its buckets are padded: save without that option, and expand that",
                )
    finally:
        handles.close()


def _boxes(placement: Placement, at: int, part: Extent) -> list[Extent]:
    """A part's entries, which lie from ``at`` on in a flat tensor, as boxes of the part's tensor."""
    item = placement.item
    found = []
    for place in placement.cut(at * item, (at + prod(part.shape)) * item):
        first, offset = place.start // item - at, place.offset
        for start, shape, _ in slabs(part.shape, first, place.stop // item - at):
            moved = tuple(a + b for a, b in zip(start, part.start, strict=True))
            found.append(Extent(place.path, offset, moved, shape))
            offset += prod(shape) * item
    return found


def _pieces(weights: Mapping[str, StoredTensor]) -> Iterator[Piece]:
    """The parts of weights that have entries, one behind the other."""
    for name, stored in weights.items():
        for extent in stored.extents:
            if prod(extent.shape) and extent.strides is None:
                yield Piece(name, stored.dtype, extent)


class _Entries:
    """Entries of weights and masters.

    Args:
        handles: open files.
    """

    def __init__(self, handles: Handles) -> None:
        self.handles = handles

    def of_weight(self, piece: Piece, start: int, stop: int) -> bytes:
        """A part's, as they are stored."""
        return fetched(self.handles, _alone(piece.dtype, piece.extent), start, stop).tobytes()

    def of_masters(self, masters: Placement, start: int, stop: int, dtype: str) -> bytes:
        """Those that are rounded to a dtype; nothing if that is no usual one of weights."""
        import numpy as np

        numbers = fetched(self.handles, masters, start, stop).view(np.float32)
        if dtype == "bfloat16":
            rounded = np.empty(stop - start, dtype=np.uint16)
            round_into(numbers, rounded)
            return rounded.tobytes()
        return numbers.astype(dtype).tobytes() if dtype in ("float16", "float32") else b""

    def are_near(self, piece: Piece, masters: Extent) -> bool:
        """Whether most of the entries that are looked at are about the same."""
        import numpy as np

        if piece.dtype not in FLOATING:
            return True
        near, seen = 0, 0
        ours, theirs = _alone(piece.dtype, piece.extent), _alone("float32", masters)
        for start, stop in _places(prod(piece.extent.shape)):
            one = as_doubles(fetched(self.handles, ours, start, stop), piece.dtype)
            other = as_doubles(fetched(self.handles, theirs, start, stop), "float32")
            near += int(np.count_nonzero(np.abs(one - other) <= np.abs(one) / 16))
            seen += stop - start
        return 2 * near >= seen


def _alone(dtype: str, extent: Extent) -> Placement:
    """A box as a flat tensor."""
    count = prod(extent.shape)
    return Placement(dtype, (count,), (Extent(extent.path, extent.offset, (0,), (count,)),), extent.path)


class _Index:
    """The parts of all weights, found by what they begin with.

    Args:
        entries: of the files.
        weights: of the model, by name.
    """

    def __init__(self, entries: _Entries, weights: Mapping[str, StoredTensor]) -> None:
        self.entries = entries
        self.heads: dict[tuple[str, int], dict[bytes, list[Piece]]] = {}
        for piece in _pieces(weights):
            size = min(_RUN, prod(piece.extent.shape))
            head = entries.of_weight(piece, 0, size)
            self.heads.setdefault((piece.dtype, size), {}).setdefault(head, []).append(piece)

    def parts_of(
        self, slots: Mapping[str, tuple[str, StoredTensor]], taken: set[Piece]
    ) -> Iterator[tuple[int, Piece]]:
        """The parts that a bucket is made up of, each with its first entry there.

        Args:
            slots: the bucket's tensors, with their names.
            taken: parts that these ranks have had; added to.

        Raises:
            CheckpointError: the bucket is not made up of parts of weights.
        """
        where, masters = slots.get(MASTER) or next(iter(slots.values()))
        if MASTER not in slots or masters.dtype != "float32" or len(masters.shape) != 1:
            raise _unclear(where, "it has no masters in float32, by which its parameters are told apart")
        other = next((name for name, stored in slots.values() if stored.shape != masters.shape), None)
        if other is not None:
            raise _unclear(other, "it is not as long as its masters")
        placement = Placement(masters.dtype, masters.shape, masters.extents, where)
        end, size = 0, masters.shape[0]
        while end < size:
            begin = -(-end // _ALIGNED) * _ALIGNED
            found: list[Piece] = []
            for at in dict.fromkeys((begin, end)):  # the second half of a gated matrix follows the first
                found = found or [piece for piece in self._at(placement, at, size) if piece not in taken]
                if len(found) == 1:
                    taken.add(found[0])
                    yield at, found[0]
                    end = at + prod(found[0].extent.shape)
                    break
            else:
                if not found and begin >= size:
                    return
                names = ", ".join(sorted({piece.name for piece in found}))
                what = (
                    f"it might be any of {names}, which are equal" if found else "it is no part of a weight"
                )
                raise _unclear(where, f"what lies from entry {begin} on is told by its masters, and {what}")

    def _at(self, masters: Placement, at: int, size: int) -> Iterator[Piece]:
        """Parts whose entries are the masters from ``at`` on, rounded."""
        for (dtype, length), heads in self.heads.items():
            if at + length > size:
                continue
            for piece in heads.get(self.entries.of_masters(masters, at, at + length, dtype), ()):
                count = prod(piece.extent.shape)
                if at + count <= size and all(
                    self.entries.of_weight(piece, start, stop)
                    == self.entries.of_masters(masters, at + start, at + stop, dtype)
                    for start, stop in _places(count)
                ):
                    yield piece


def _places(count: int) -> Collection[tuple[int, int]]:
    """Ranges of entries at which parts are compared: all of a small one, else the ends and some between."""
    if count <= _RUN * _PLACES:
        return ((0, count),)
    last = count - _RUN
    return [(start, start + _RUN) for start in (last * i // (_PLACES - 1) for i in range(_PLACES))]


def _unclear(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where!r} is a flat bucket of the optimizer: {what}", hint=WAY_OUT)
