"""From a request to ``.distcp`` files and a new ``.metadata``.

Every source item has its counterpart in the counterpart of its file, in the same order; a tensor's boxes
grow in proportion, so that the shards stay as even as they were. All else in ``.metadata`` (nesting, byte
entries, the planner's data) is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparkling_cli.formats.dcp.items import box, joined, new_box, number
from sparkling_cli.formats.dcp.metadata import METADATA, dump_metadata
from sparkling_cli.formats.dcp.read import Directory, Entry
from sparkling_cli.formats.directory import literal_file
from sparkling_cli.formats.model import Declared, OutputFile
from sparkling_cli.storage.tensors import Shape, grown_box

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex


def directory_outputs(
    directory: Directory,
    declared: Mapping[str, Declared],
    numbers: Mapping[str, Any],
    becomes: Mapping[str, Sequence[str]],
) -> tuple[OutputFile, ...]:
    """All files of one DCP directory; ``.metadata`` is the last.

    Args:
        directory: the directory.
        declared: name in the checkpoint -> output tensor.
        numbers: name in the checkpoint -> new value of a one-number tensor, or of a plain value, or the whole
            item as it shall be.
        becomes: name in the checkpoint -> its names in the output, where it has others, or none; a tensor's
            that are not its own are new tensors of its shape.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    items: dict[str, list[OutputFile]] = {}
    ends: dict[str, int] = {}
    moved: dict[MetadataIndex, list[tuple[MetadataIndex, object]]] = {}
    chunks: dict[str, dict[Shape, ChunkStorageMetadata]] = {}
    storage = directory.metadata.storage_data
    boxes = {
        (fqn, tuple(chunk.offsets)): tuple(chunk.sizes)
        for fqn, meta in directory.metadata.state_dict_metadata.items()
        for chunk in getattr(meta, "chunks", ())
    }
    for index in sorted(storage, key=lambda i: (str(storage[i].relative_path), storage[i].offset)):
        item, fqn = directory.item(index), index.fqn
        name = directory.prefix + fqn
        names, target, offset = becomes.get(name, (fqn,)), declared.get(name), index.offset
        parts: list[OutputFile] = []
        if target is not None:
            start: Shape = tuple(index.offset or ())
            before = Entry(directory, fqn).described.size
            place = grown_box(start, boxes[fqn, start], before, target.shape)
            offset, sizes = place
            chunks.setdefault(fqn, {})[start] = ChunkStorageMetadata(torch_size(offset), torch_size(sizes))
            parts = [
                box(item.read(), fqn, target.key, *place)
                if new == fqn
                else new_box(item.file, new, declared[new].dtype, *place)
                for new in names
            ]
        elif name in numbers:
            value = numbers[name]
            parts = [value if isinstance(value, OutputFile) else number(item.read(), fqn, value)]
        elif names:
            parts = [literal_file(item.file, item.carried(fqn))] * len(names)
        for new, part in zip(names, parts, strict=True):
            at = ends.get(item.file, 0)
            info = _StorageInfo(storage[index].relative_path, at, part.size)
            moved.setdefault(index, []).append((MetadataIndex(new, offset, index.index), info))
            items.setdefault(item.file, []).append(part)
            ends[item.file] = at + part.size
    metadata = replace_metadata(directory, moved, chunks, declared, becomes)
    last = literal_file(directory.folder + METADATA, metadata, last=True)
    return (*(joined(path, parts) for path, parts in items.items()), last)


def replace_metadata(
    directory: Directory,
    moved: Mapping[MetadataIndex, Sequence[tuple[MetadataIndex, object]]],
    chunks: Mapping[str, Mapping[Shape, ChunkStorageMetadata]],
    declared: Mapping[str, Declared],
    becomes: Mapping[str, Sequence[str]],
) -> bytes:
    """The new ``.metadata``: as the old one, with new sizes, boxes and places."""
    import torch

    metadata = copy.copy(directory.metadata)
    vars(metadata).pop("all_local_plans", None)  # Megatron's cache of how it saved, by the old sizes
    metadata.state_dict_metadata = {
        name: described
        for fqn, described in metadata.state_dict_metadata.items()
        for name in ((fqn,) if fqn in chunks else becomes.get(directory.prefix + fqn, (fqn,)))
    }
    for fqn, grown in chunks.items():
        old, full = Entry(directory, fqn).described, directory.prefix + fqn
        boxes = [grown[tuple(chunk.offsets)] for chunk in old.chunks]
        new = replace(old, size=torch_size(declared[full].shape), chunks=boxes)
        metadata.state_dict_metadata[fqn] = new
        for name in becomes.get(full, ()):
            if name != fqn:
                properties = replace(old.properties, dtype=getattr(torch, declared[name].dtype))
                metadata.state_dict_metadata[name] = replace(new, properties=properties)
    places = (moved.get(index, ()) for index in metadata.storage_data)
    metadata.storage_data = dict(place for several in places for place in several)
    return dump_metadata(metadata)


def torch_size(shape: Shape) -> torch.Size:
    """A shape as DCP has it."""
    import torch

    return torch.Size(shape)
