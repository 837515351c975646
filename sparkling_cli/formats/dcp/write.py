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

from sparkling_cli.formats.dcp.buckets import FLAT
from sparkling_cli.formats.dcp.items import box, new_box, number, shifted
from sparkling_cli.formats.dcp.metadata import METADATA, dump_metadata
from sparkling_cli.formats.dcp.read import Directory, Entry
from sparkling_cli.formats.model import Checksum, Declared, OutputFile
from sparkling_cli.storage.tensors import Extent, grown_box

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

Shape = tuple[int, ...]


class _Growing:
    """A ``.distcp`` file as it is put together."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = 0
        self.literals: list[tuple[int, bytes]] = []
        self.tensors: list[tuple[str, Extent]] = []
        self.checksums: list[Checksum] = []

    def add(self, item: OutputFile | bytes) -> tuple[int, int]:
        """Append an item; gives its offset and length."""
        offset = self.size
        if isinstance(item, bytes):
            self.literals.append((offset, item))
            self.size += len(item)
            return offset, len(item)
        moved = shifted(item, offset)
        self.literals += moved.literals
        self.tensors += moved.tensors
        self.checksums += moved.checksums
        self.size += item.size
        return offset, item.size

    def done(self) -> OutputFile:
        return OutputFile(
            self.path, self.size, tuple(self.literals), tuple(self.tensors), tuple(self.checksums)
        )


def directory_outputs(
    directory: Directory,
    declared: Mapping[str, Declared],
    numbers: Mapping[str, Any],
    added: Mapping[str, tuple[str, ...]],
    pieces: Mapping[str, tuple[str, ...]],
) -> tuple[OutputFile, ...]:
    """All files of one DCP directory; ``.metadata`` is the last.

    Args:
        directory: the directory.
        declared: name in the checkpoint -> output tensor.
        numbers: name in the checkpoint -> new value of a one-number tensor, or of a plain value, or the whole
            item as it shall be.
        added: name of a tensor -> names of tensors of its shape that the output has beside it, where the
            source has flat ones instead, which are left out.
        pieces: name of an object -> its names in the output, where they are others.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    files: dict[str, _Growing] = {}
    moved: dict[MetadataIndex, list[tuple[MetadataIndex, object]]] = {}
    chunks: dict[str, dict[Shape, ChunkStorageMetadata]] = {}
    storage = directory.metadata.storage_data
    boxes = {
        (fqn, tuple(chunk.offsets)): tuple(chunk.sizes)
        for fqn, meta in directory.metadata.state_dict_metadata.items()
        for chunk in getattr(meta, "chunks", ())
    }
    for index in sorted(storage, key=lambda i: (str(storage[i].relative_path), storage[i].offset)):
        item = directory.item(index)
        name = directory.prefix + index.fqn
        if added and FLAT.fullmatch(name):
            continue
        target = declared.get(name)
        parts: list[tuple[MetadataIndex, OutputFile | bytes]] = []
        if target is not None:
            before = Entry(directory, index.fqn).described.size
            start: Shape = tuple(index.offset or ())
            sizes = boxes[index.fqn, start]
            new_start, new_sizes = grown_box(start, sizes, before, target.shape)
            content: OutputFile | bytes = box(item.read(), index.fqn, target.key, new_start, new_sizes)
            parts.append((MetadataIndex(index.fqn, new_start, index.index), content))
            for new in added.get(name, ()):
                content = new_box(item.file, new, declared[new].dtype, new_start, new_sizes)
                parts.append((MetadataIndex(new, new_start, index.index), content))
            grown = ChunkStorageMetadata(_size(new_start), _size(new_sizes))
            chunks.setdefault(index.fqn, {})[start] = grown
        elif name in numbers:
            value = numbers[name]
            whole = isinstance(value, OutputFile)
            parts.append((index, value if whole else number(item.read(), index.fqn, value)))
        else:
            data = item.carried(index.fqn)
            names = pieces.get(name, (index.fqn,))
            parts += [(MetadataIndex(fqn, index.offset, index.index), data) for fqn in names]
        file = files.setdefault(item.file, _Growing(item.file))
        for new_index, content in parts:
            info = _StorageInfo(storage[index].relative_path, *file.add(content))
            moved.setdefault(index, []).append((new_index, info))
    metadata = replace_metadata(directory, moved, chunks, declared, added, pieces)
    last = OutputFile(directory.folder + METADATA, len(metadata), ((0, metadata),), last=True)
    return (*(file.done() for file in files.values()), last)


def replace_metadata(
    directory: Directory,
    moved: Mapping[MetadataIndex, Sequence[tuple[MetadataIndex, object]]],
    chunks: Mapping[str, Mapping[Shape, ChunkStorageMetadata]],
    declared: Mapping[str, Declared],
    added: Mapping[str, tuple[str, ...]],
    pieces: Mapping[str, tuple[str, ...]],
) -> bytes:
    """The new ``.metadata``: as the old one, with new sizes, boxes and places."""
    import torch

    metadata = copy.copy(directory.metadata)
    vars(metadata).pop("all_local_plans", None)  # Megatron's cache of how it saved, by the old sizes
    metadata.state_dict_metadata = {
        name: described
        for fqn, described in metadata.state_dict_metadata.items()
        if not (added and FLAT.fullmatch(directory.prefix + fqn))
        for name in pieces.get(directory.prefix + fqn, (fqn,))
    }
    for fqn, grown in chunks.items():
        old = Entry(directory, fqn).described
        boxes = [grown[tuple(chunk.offsets)] for chunk in old.chunks]
        size = _size(declared[directory.prefix + fqn].shape)
        metadata.state_dict_metadata[fqn] = replace(old, size=size, chunks=boxes)
        for new in added.get(directory.prefix + fqn, ()):
            properties = replace(old.properties, dtype=getattr(torch, declared[new].dtype))
            metadata.state_dict_metadata[new] = replace(old, properties=properties, size=size, chunks=boxes)
    places = (moved.get(index, ()) for index in metadata.storage_data)
    metadata.storage_data = dict(place for several in places for place in several)
    return dump_metadata(metadata)


def _size(shape: Shape) -> torch.Size:
    import torch

    return torch.Size(shape)
