"""Safetensors files: a strict reader of the header, and the layout of an output file.

Format: eight bytes header length (little-endian), a JSON header, the data without holes. Every rule of the
format is checked before an offset is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sparkling_cli.checkpoint.model import ITEM_BYTES, Extent, OutputFile, StoredTensor
from sparkling_cli.errors import CheckpointError

#: dtype names of the format, in the order in which ``save_file`` writes tensors: by alignment, largest
#: first, as the library's own list has it backwards.
_NAMES: Mapping[str, str] = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64", "F32": "float32",
    "U32": "uint32", "I32": "int32", "BF16": "bfloat16", "F16": "float16", "U16": "uint16",
    "I16": "int16", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_CODES = {name: code for code, name in _NAMES.items()}
_RANK = {name: rank for rank, name in enumerate(_NAMES.values())}
#: The library refuses longer headers.
_LONGEST_HEADER = 100_000_000
_RECOPY = "copy or download the file again"


@dataclass(frozen=True)
class SafetensorsFile:
    """A parsed header.

    Attributes:
        tensors: name -> place, in the file's order.
        metadata: the ``__metadata__`` entry; None when there is none.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] | None


def read_safetensors(path: Path, relative: str) -> SafetensorsFile:
    """Read and check a file's header; no tensor data is read.

    Args:
        path: the file.
        relative: its path in the checkpoint, for extents and messages.

    Raises:
        CheckpointError: missing, truncated, or against the format.
    """
    where = relative or path.name
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{where}: truncated: its header should take {length} bytes, the file has {size}",
                    hint=_RECOPY,
                )
            if length > _LONGEST_HEADER:
                raise CheckpointError(
                    f"{where}: its header claims {length} bytes; at most {_LONGEST_HEADER} are allowed",
                    hint="this is no safetensors file, or it is damaged",
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from error
    header = _header(raw, where)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise CheckpointError(f"{where}: its __metadata__ must map text to text, found {metadata!r}")
    places = [_place(name, entry, where) for name, entry in header.items()]
    places.sort(key=lambda place: (place[3], place[4]))
    _check_no_holes(places, size - 8 - length, where)
    tensors = {
        name: StoredTensor(dtype, shape, (Extent(relative, 8 + length + begin, (0,) * len(shape), shape),))
        for name, dtype, shape, begin, _ in places
    }
    return SafetensorsFile(tensors, metadata)


_Place = tuple[str, str, tuple[int, ...], int, int]


def _header(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{where}: its header has {twice!r} twice")
        return found

    if raw[:1] != b"{":
        raise CheckpointError(
            f"{where}: its header should start with '{{', it starts with {raw[:8]!r}",
            hint="this is no safetensors file, or it is damaged",
        )
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: its header is no JSON: {error}", hint=_RECOPY) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: its header is a {type(header).__name__}, expected an object")
    return header


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _place(name: str, entry: Any, where: str) -> _Place:
    """Check one entry: its fields, dtype, shape, and that its bytes are as many as these need."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: the entry of {name!r} must have dtype, shape and data_offsets, found {entry!r:.200}"
        )
    dtype = _NAMES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: {name!r} has dtype {entry['dtype']!r}; known are {', '.join(_NAMES)}",
            hint="dequantize the checkpoint first",
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{where}: {name!r} has shape {shape!r:.200} and data_offsets {offsets!r:.200}")
    begin, end = offsets
    expected = prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise CheckpointError(
            f"{where}: {name!r}, {dtype} of shape {tuple(shape)}, takes {expected} bytes; "
            f"its data_offsets {begin}..{end} give it {end - begin}"
        )
    return name, dtype, tuple(shape), begin, end


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_no_holes(places: Sequence[_Place], size: int, where: str) -> None:
    """Tensors follow each other without overlap or hole, from the first byte to the last."""
    at = 0
    for name, _, _, begin, end in places:
        if begin != at:
            fault = "overlaps the tensor before it" if begin < at else f"leaves a hole from {at} on"
            raise CheckpointError(f"{where}: {name!r} starts at data byte {begin} and {fault}")
        at = end
    if at > size:
        raise CheckpointError(f"{where}: truncated: {at} bytes of data expected, {size} found", hint=_RECOPY)
    if at < size:
        raise CheckpointError(f"{where}: {size - at} bytes behind the last tensor belong to nothing")


def lay_out_safetensors(
    path: str,
    tensors: Iterable[tuple[str, str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None,
) -> OutputFile:
    """Lay out a file as ``save_file`` writes it.

    Args:
        path: of the output file.
        tensors: (key, name, dtype, shape), in any order.
        metadata: for the header.

    Raises:
        CheckpointError: two tensors of one name, or a dtype that the format does not have.
    """
    rows = list(tensors)
    for key, name, dtype, _ in rows:
        if dtype not in _CODES:
            raise CheckpointError(f"{path}: {name or key!r} is {dtype}, which safetensors does not have")
    rows.sort(key=lambda row: (_RANK[row[2]], row[1]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    places = []
    at = 0
    for key, name, dtype, shape in rows:
        if name in header:
            raise CheckpointError(f"{path}: two tensors are called {name!r}")
        size = prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        places.append((key, at, shape))
        at += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return OutputFile(
        path=path,
        size=start + at,
        literals=((0, len(text).to_bytes(8, "little") + text),),
        tensors=tuple(
            (key, Extent(path, start + begin, (0,) * len(shape), shape)) for key, begin, shape in places
        ),
    )
