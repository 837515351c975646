"""A ``.metadata`` is sound before anything is looked up in it: types, boxes that tile, a place for each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.storage.byte_ranges import tiles

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


def check_metadata(metadata: Metadata, path: Path) -> None:
    """Every tensor's boxes tile it, and every item has a place and belongs to something.

    Raises:
        CheckpointError: names what does not hold, and the entry.
    """
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        MetadataIndex,
        TensorStorageMetadata,
    )

    planned = metadata.planner_data
    for fqn, steps in planned.items() if isinstance(planned, dict) else ():
        if not isinstance(steps, (list, tuple)):
            raise _damaged(path, f"the path of {fqn!r} is no tuple: {steps!r:.60}")
        # torch makes the name out of the path, and looks what it loads up by it
        if ".".join(map(str, steps)) != fqn or fqn not in metadata.state_dict_metadata:
            raise _damaged(path, f"{fqn!r} is described nowhere, or is not its own path: {steps!r:.120}")
    wanted = set()
    for fqn, meta in metadata.state_dict_metadata.items():
        if not isinstance(fqn, str):
            raise _damaged(path, f"a name is no text: {fqn!r:.80}")
        if isinstance(meta, BytesStorageMetadata):
            wanted.add(MetadataIndex(fqn))
        elif isinstance(meta, TensorStorageMetadata):
            wanted |= {MetadataIndex(fqn, offsets) for offsets in _offsets(fqn, meta, path)}
        else:
            raise _damaged(path, f"{fqn!r} is described by a {type(meta).__name__}")
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or index not in wanted:
            raise _damaged(path, f"it stores {index!r:.120}, which is no part of what it describes")
        _check_place(index.fqn, info, path)
    missing = [index for index in wanted if index not in metadata.storage_data]
    if missing:
        raise _damaged(path, f"it says nowhere where {missing[0].fqn!r} at {missing[0].offset} lies")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}", hint="copy the checkpoint again")


def _offsets(fqn: str, meta: Any, path: Path) -> list[Any]:
    """The boxes' offsets, when the boxes tile the tensor."""
    import torch

    size, chunks = meta.size, meta.chunks
    dtype = getattr(meta.properties, "dtype", None)
    if not _is_shape(size) or not isinstance(chunks, (list, tuple)) or not isinstance(dtype, torch.dtype):
        raise _damaged(path, f"size, dtype or boxes of {fqn!r} are none: {size!r:.60}, {dtype!r:.30}")
    for chunk in chunks:
        offsets: Any = getattr(chunk, "offsets", None)
        sizes: Any = getattr(chunk, "sizes", None)
        if not (_is_shape(offsets) and _is_shape(sizes) and len(offsets) == len(sizes) == len(size)):
            raise _damaged(path, f"a box of {fqn!r} is none: offsets {offsets!r:.60}, sizes {sizes!r:.60}")
    if not tiles([(chunk.offsets, chunk.sizes) for chunk in chunks], size):
        raise CheckpointError(
            f"{path}: the {len(chunks)} boxes of {fqn!r} do not tile its shape {tuple(size)}",
            hint="a rank's part is missing: was every rank's save finished?",
        )
    return [chunk.offsets for chunk in chunks]


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(type(n) is int and n >= 0 for n in value)


def _check_place(fqn: str, info: Any, path: Path) -> None:
    """A relative path inside the directory, and a range of bytes."""
    name = getattr(info, "relative_path", None)
    span = (getattr(info, "offset", None), getattr(info, "length", None))
    described = getattr(info, "transform_descriptors", None)
    if (
        not isinstance(name, str)
        or not name
        or "\0" in name
        or not _is_shape(span)
        or not (described is None or isinstance(described, (list, tuple)))
    ):
        raise _damaged(path, f"{fqn!r} has no place: file {name!r:.60}, bytes {span!r:.60}")
