"""A checkpoint in several torch files, whose stored tensors may be parts of the model's, or several of them.

Trainers that shard by hand leave one file per rank: rows of a parameter's state, slices of its weight, or the
state of several parameters stacked. Each stored tensor is described by boxes, one behind the other; the boxes
grow with their tensors, so every rank's part stays the part that it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Declared, OutputFile, OutputRequest
from sparkling_cli.formats.statedict import at, packed, remaining_values
from sparkling_cli.formats.torchfile import REMOVED, TorchFile, TreePath, lay_out
from sparkling_cli.storage.tensors import ITEM_BYTES, Extent, StoredTensor, grown_box

Shape = tuple[int, ...]


class Box(NamedTuple):
    """A box of a tensor, in entries of its stored tensor that follow each other.

    Attributes:
        key: of the tensor.
        start: the box's first index in the tensor, per dim.
        shape: the box's size, per dim.
        padding: zeros of the box's size, and no part of the tensor.
    """

    key: str
    start: Shape
    shape: Shape
    padding: bool = False


class Place(NamedTuple):
    """Where a number of the state stands: in which file, as which tensor or at which path."""

    file: str
    at: str | TreePath


@dataclass(frozen=True)
class RankFiles:
    """Torch files that make up a checkpoint.

    Attributes:
        files: by relative path.
        boxes: key of a stored tensor -> its boxes; one that is not here is a tensor by itself.
        scalars: parameter and name of a number of its state -> every place of it.
    """

    files: Mapping[str, TorchFile]
    boxes: Mapping[str, tuple[Box, ...]] = field(default_factory=dict)
    scalars: Mapping[tuple[str, str], tuple[Place, ...]] = field(default_factory=dict)

    def tensors(self, wanted: Iterable[str]) -> dict[str, StoredTensor]:
        """The tensors of these keys, each with all of its boxes.

        Raises:
            CheckpointError: a stored tensor is not contiguous, or boxes do not make up their tensor.
        """
        pieces: dict[str, list[Extent]] = {}
        dtypes: dict[str, str] = {}
        alone = {}
        for file in self.files.values():
            for key, stored in file.tensors.items():
                if key not in self.boxes:
                    alone[key] = stored
                    continue
                extent = stored.extents[0]
                if extent.strides is not None:
                    raise CheckpointError(f"{key!r} of shape {stored.shape} is not contiguous")
                offset = extent.offset
                for name, start, shape, padding in self.boxes[key]:
                    if not padding:
                        pieces.setdefault(name, []).append(Extent(extent.path, offset, start, shape))
                        if dtypes.setdefault(name, stored.dtype) != stored.dtype:
                            raise CheckpointError(
                                f"{name!r} is {dtypes[name]} in one file, {stored.dtype} here: {key!r}"
                            )
                    offset += prod(shape) * ITEM_BYTES[stored.dtype]
        found = {}
        for key in wanted:
            if key in alone:
                found[key] = alone[key]
                continue
            extents = pieces[key]
            shape = tuple(max(e.start[d] + e.shape[d] for e in extents) for d in range(len(extents[0].shape)))
            if sum(prod(extent.shape) for extent in extents) != prod(shape):
                raise CheckpointError(
                    f"the parts of {key!r} do not make up its shape {shape}: one is missing, or twice there"
                )
            found[key] = StoredTensor(dtypes[key], shape, tuple(extents))
        return found

    def outputs(
        self,
        request: OutputRequest,
        before: Mapping[str, StoredTensor],
        edits: Mapping[str, Mapping[TreePath, Any]] | None = None,
    ) -> tuple[OutputFile, ...]:
        """Every file with its tensors' new shapes.

        Args:
            request: what the output shall hold.
            before: the tensors as they were read.
            edits: relative path -> edits of the file's tree.
        """
        declared = {item.key: item for item in request.tensors}
        changes = {name: dict((edits or {}).get(name, {})) for name in self.files}
        values: dict[str, dict[str, bytes]] = {name: {} for name in self.files}
        for full, value in request.scalars.items():
            param, _, name = full.rpartition(".")
            for path, place in self.scalars[param, name]:
                if isinstance(place, str):
                    values[path][place] = packed(self.files[path].tensors[place].dtype, value)
                else:
                    changes[path][place] = type(at(self.files[path].tree, place))(value)
        return tuple(
            self._output(file, declared, before, changes[name], values[name])
            for name, file in self.files.items()
        )

    def _output(
        self,
        file: TorchFile,
        declared: Mapping[str, Declared],
        before: Mapping[str, StoredTensor],
        edits: Mapping[TreePath, Any],
        values: Mapping[str, bytes],
    ) -> OutputFile:
        new: dict[str, tuple[str, Shape]] = {}
        grown: dict[str, list[Box]] = {}
        for key, stored in file.tensors.items():
            boxes = self.boxes.get(key)
            if boxes is None:
                if key in declared:
                    new[key] = (stored.dtype, declared[key].shape)
                continue
            grown[key] = [
                Box(key, *grown_box(start, shape, before[key].shape, declared[key].shape), padding)
                for key, start, shape, padding in boxes
            ]
            new[key] = (stored.dtype, joined_shape(stored.shape, grown[key]))
        gone = [key for key, path in file.paths.items() if edits.get(path) is REMOVED]
        laid = lay_out(file, new, edits=edits, values=remaining_values(file, [*new, *gone], values))
        found: list[tuple[str, Extent]] = []
        for key, extent in laid.tensors:
            offset = extent.offset
            for name, start, shape, padding in grown.get(key, [Box(key, extent.start, extent.shape)]):
                if not padding:
                    found.append((name, Extent(extent.path, offset, start, shape)))
                offset += prod(shape) * ITEM_BYTES[file.tensors[key].dtype]
        return replace(laid, tensors=tuple(found))


def joined_shape(before: Shape, boxes: Sequence[Box]) -> Shape:
    """The stored shape of boxes that follow each other: stacked if it has one dim more, else joined rows."""
    whole = boxes[0].shape
    if len(before) > len(whole):
        return (before[0], *whole)
    return (sum(box.shape[0] for box in boxes), *whole[1:]) if whole else ()
