"""The torch files that a checkpoint's state lies in, whose stored tensors may be parts of the model's.

Most trainers save one file, or one for weights and one for the optimizer. Those that shard by hand leave one
per rank: rows of a parameter's state, slices of its weight, or the state of several parameters stacked. Each
such tensor is described by boxes, one behind the other; the boxes grow with their tensors, so every rank's
part stays the part that it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.directory import inside
from sparkling_cli.formats.model import Checkpoint, Declared, Further, OutputFile, OutputRequest, ParamState
from sparkling_cli.formats.other_files import further_in
from sparkling_cli.formats.statedict import (
    is_optimizer,
    is_state_dict,
    packed,
    with_shapes,
)
from sparkling_cli.formats.torchfile import (
    INSIDE,
    TorchFile,
    TreePath,
    at,
    is_subclass,
    read_torch_file,
    resized,
)
from sparkling_cli.storage.tensors import ITEM_BYTES, Extent, Shape, StoredTensor, grown_box


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


def read_weights_file(root: Path, name: str) -> TorchFile:
    """A file that is a state dict.

    Raises:
        CheckpointError: missing, damaged, or something else.
    """
    file = read_torch_file(inside(root, name, "the directory"), name)
    if not is_state_dict(file.tree):
        raise CheckpointError(f"{name}: expected a state dict: names and tensors")
    return file


def read_optimizer_file(root: Path, name: str, hint: str | None = None) -> TorchFile:
    """A file that is an optimizer's state dict.

    Args:
        root: the checkpoint.
        name: of the file.
        hint: what to do if it is something else.

    Raises:
        CheckpointError: missing, damaged, or something else.
    """
    file = read_torch_file(inside(root, name, "the directory"), name)
    if not is_optimizer(file.tree):
        raise CheckpointError(
            f"{name}: expected an optimizer's state dict: state and param_groups", hint=hint
        )
    return file


@dataclass(frozen=True)
class StateFiles:
    """Torch files that make up a checkpoint, or the part of it that is no weight file.

    Attributes:
        files: by relative path.
        boxes: key of a stored tensor -> its boxes; one that is not here is a tensor by itself.
    """

    files: Mapping[str, TorchFile]
    boxes: Mapping[str, tuple[Box, ...]] = field(default_factory=dict)

    def found(
        self, weights: Mapping[str, str], states: Iterable[ParamState]
    ) -> tuple[dict[str, StoredTensor], list[Further]]:
        """The tensors of weights and states, and all others in the files.

        Args:
            weights: name -> key.
            states: of the optimizer.

        Raises:
            CheckpointError: a stored tensor is not contiguous, or boxes do not make up their tensor.
        """
        wanted = dict.fromkeys(weights.values())
        wanted.update(dict.fromkeys(key for state in states for key in state.tensors.values()))
        used = {*wanted, *self.boxes}
        others = [item for file in self.files.values() for item in further_in(file, used)]
        return self._tensors(wanted), others

    def _tensors(self, wanted: Iterable[str]) -> dict[str, StoredTensor]:
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
        checkpoint: Checkpoint,
        request: OutputRequest,
        edits: Mapping[str, Mapping[TreePath, Any]] | None = None,
    ) -> tuple[OutputFile, ...]:
        """Every file with its tensors' new shapes.

        Args:
            checkpoint: the source; its states may have got other names, in the same order.
            request: what the output shall hold.
            edits: relative path -> edits of the file's tree.
        """
        declared = {item.key: item for item in request.tensors}
        changes = {name: dict((edits or {}).get(name, {})) for name in self.files}
        values: dict[str, dict[str, bytes]] = {name: {} for name in self.files}
        for (path, place), value in request.numbers(checkpoint.states):
            if isinstance(place, str):
                values[path][place] = packed(self.files[path].tensors[place].dtype, value)
            else:
                changes[path][place] = type(at(self.files[path].tree, place))(value)
        return tuple(
            self._output(file, declared, checkpoint.tensors, changes[name], values[name])
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
        new = {
            key: (declared[key].dtype, declared[key].shape)
            for key in file.tensors
            if key in declared and key not in self.boxes
        }
        grown = {
            key: [
                Box(name, *grown_box(start, shape, before[name].shape, declared[name].shape), padding)
                for name, start, shape, padding in self.boxes[key]
            ]
            for key in file.tensors
            if key in self.boxes
        }
        edits = {**edits, **_resized_subclasses(file, [declared[key] for key in new])}
        for key, boxes in grown.items():
            stored = file.tensors[key]
            new[key] = (stored.dtype, joined_shape(stored.shape, boxes))
        laid = with_shapes(file, new, edits=edits, values=values)
        if not grown:
            return laid
        found: list[tuple[str, Extent]] = []
        for key, extent in laid.tensors:
            offset = extent.offset
            for name, start, shape, padding in grown.get(key, [Box(key, extent.start, extent.shape)]):
                if not padding:
                    found.append((name, Extent(extent.path, offset, start, shape)))
                offset += prod(shape) * ITEM_BYTES[file.tensors[key].dtype]
        return replace(laid, tensors=tuple(found))


def _resized_subclasses(file: TorchFile, new: Iterable[Declared]) -> dict[TreePath, Any]:
    """Edits of the tensor subclasses that hold tensors whose shape changes."""
    edits: dict[TreePath, Any] = {}
    for item in new:
        place = file.paths[item.key][: -len(INSIDE) - 1]
        call = at(file.tree, place) if item.around else None
        if call is not None and is_subclass(call):
            edits[(*place, INSIDE[0])] = resized(call.args, item.around)
    return edits


def joined_shape(before: Shape, boxes: Sequence[Box]) -> Shape:
    """The stored shape of boxes that follow each other: stacked (a dim more), flat, or joined rows."""
    whole = boxes[0].shape
    if len(before) > len(whole):
        return (before[0], *whole)
    if len(before) < len(whole):
        return (sum(prod(box.shape) for box in boxes),)
    return (sum(box.shape[0] for box in boxes), *whole[1:]) if whole else ()
