"""One item of a ``.distcp`` file: a whole ``torch.save`` archive at an offset.

A tensor item's inner directory says where its raw bytes lie. A bytes item is a pickled Python object.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checksum, OutputFile
from sparkling_cli.formats.torchfile import TorchFile, lay_out, plain, read_torch_file
from sparkling_cli.formats.torchfile.archive import open_window, read_archive
from sparkling_cli.storage.tensors import Extent

#: how one number of a dtype is packed
_STRUCT = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}


#: the end of an archive's directory lies in so many last bytes
_END_OF_ARCHIVE = 22 + 65535


@dataclass(frozen=True)
class Place:
    """Where an item lies: the file (relative to the checkpoint's root), its first byte, its length."""

    file: str
    offset: int
    length: int


def read_item(root: Path, place: Place) -> TorchFile:
    """The item as a tree; tensor data is not read, and nothing of the pickle is executed.

    Raises:
        CheckpointError: the file is missing or too short, or the item is damaged.
        UnsafePickleError: its pickle names something that is not harmless.
    """
    return read_torch_file(root / place.file, place.file, offset=place.offset, length=place.length)


def read_bytes(root: Path, place: Place, name: str) -> bytes:
    """All bytes of an item.

    Raises:
        CheckpointError: the file is missing or too short.
    """
    try:
        with (root / place.file).open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
    except OSError as error:
        raise CheckpointError(f"cannot read {root / place.file} ({name!r}): {error.strerror}") from None
    if len(data) != place.length:
        raise CheckpointError(f"{root / place.file} ends inside {name!r}", hint="copy the checkpoint again")
    return data


def carried_bytes(root: Path, place: Place, name: str) -> bytes:
    """All bytes of an item that is carried over, which must be whole.

    torch saves every object as an archive with a checksum of each record; an item that looks like one and
    does not agree with its own checksums was damaged, and nobody could load the output. An item that never
    was an archive is a planner's own matter.

    Raises:
        CheckpointError: the file is missing or too short, or the item is damaged.
    """
    data = read_bytes(root, place, name)
    if not data.startswith(b"PK\x03\x04") and b"PK\x05\x06" not in data[-_END_OF_ARCHIVE:]:
        return data
    where = f"{place.file}: item {name!r}"
    with open_window(root / place.file, where, place.offset, place.length) as window:
        records = read_archive(window).records
    for _, start, size, crc in records if any(record.crc for record in records) else ():
        if crc32(data[start : start + size]) != crc:
            raise CheckpointError(
                f"{where} is damaged: its CRC-32 is another", hint="copy the checkpoint again"
            )
    return data


def value_of(item: TorchFile) -> Any:
    """A bytes item's object as plain data."""
    return plain(item.tree)


def tensor_key(item: TorchFile, name: str) -> str:
    """The key of the one tensor that a tensor item holds.

    Raises:
        CheckpointError: it holds something else.
    """
    if len(item.tensors) != 1 or item.wrapped or any(item.paths.values()):
        kind = "a tensor subclass" if item.wrapped else f"{len(item.tensors)} tensors"
        raise CheckpointError(f"{item.relative}: item {name!r} holds {kind}, expected one dense tensor")
    return next(iter(item.tensors))


def scalar_of(item: TorchFile, name: str) -> float | None:
    """The value of a one-entry tensor of a numeric dtype; None for anything else."""
    stored = item.tensors[tensor_key(item, name)]
    code = _STRUCT.get(stored.dtype)
    if code is None or prod(stored.shape) != 1:
        return None
    with item.path.open("rb") as file:
        file.seek(stored.extents[0].offset)
        return float(struct.unpack(code, file.read(struct.calcsize(code)))[0])


def number(item: TorchFile, name: str, value: float) -> OutputFile:
    """The item of a one-entry tensor with another value."""
    key = tensor_key(item, name)
    dtype = item.tensors[key].dtype
    data = struct.pack(_STRUCT[dtype], int(value) if dtype.startswith("int") else value)
    return lay_out(item, values={key: data})


def box(item: TorchFile, name: str, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> OutputFile:
    """The item with room for another box of a tensor.

    Args:
        item: the source's item; everything but the tensor is kept.
        name: its fully qualified name.
        key: the output tensor's key.
        start: the box's first index in the whole tensor.
        shape: the box's size.
    """
    own = tensor_key(item, name)
    file = lay_out(item, {own: (item.tensors[own].dtype, shape)})
    return replace(file, tensors=tuple((key, extent._replace(start=start)) for _, extent in file.tensors))


def shifted(file: OutputFile, offset: int) -> OutputFile:
    """The same layout, ``offset`` bytes further on."""
    return replace(
        file,
        literals=tuple((at + offset, data) for at, data in file.literals),
        tensors=tuple((key, _moved(extent, offset)) for key, extent in file.tensors),
        checksums=tuple(
            Checksum(c.start + offset, c.stop + offset, tuple(at + offset for at in c.at))
            for c in file.checksums
        ),
    )


def _moved(extent: Extent, offset: int) -> Extent:
    return extent._replace(offset=extent.offset + offset)
