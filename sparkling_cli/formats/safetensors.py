"""Safetensors files: a strict reader of the header, and the layout of an output file.

Format: eight bytes header length (little-endian), a JSON header, the data without holes. Every rule of the
format is checked before an offset is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import OutputFile
from sparkling_cli.storage.tensors import ITEM_BYTES, Extent, StoredTensor, are_sizes

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
_FIELDS = {"dtype", "shape", "data_offsets"}
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
    places = _places(header, where)
    places.sort(key=itemgetter(0, 1))
    _check_no_holes(places, size - 8 - length, where)
    data = 8 + length
    tensors = {
        name: StoredTensor(kind.dtype, kind.shape, (Extent(relative, data + begin, kind.start, kind.shape),))
        for begin, _, name, kind in places
    }
    return SafetensorsFile(tensors, metadata)


class _Kind(NamedTuple):
    """What tensors of one dtype and shape share."""

    dtype: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    nbytes: int


#: first and last byte, name, kind
_Place = tuple[int, int, str, _Kind]


def _header(raw: bytes, where: str) -> dict[str, Any]:
    """The header as JSON, in which no name stands twice."""

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
        text = raw.decode("utf-8")
        header = json.loads(text)
        if not _is_complete(header, raw):
            header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: its header is no JSON: {error}", hint=_RECOPY) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: its header is a {type(header).__name__}, expected an object")
    return header


def _is_complete(header: Any, raw: bytes) -> bool:
    """Whether no pair of the text was overwritten by a later one of the same name.

    Without escapes every string has two quotes, and a pair that was lost had a name: they are counted,
    which is ten times as fast as to look at every pair.
    """
    if not isinstance(header, dict) or b"\\" in raw:
        return False
    strings = 0
    for name, entry in header.items():
        if name == "__metadata__" and _is_text_map(entry):
            strings += 1 + 2 * len(entry)
        elif type(entry) is dict and len(entry) == 3:
            strings += 5  # name, three fields, the dtype's name
        else:
            return False
    return raw.count(b'"') == 2 * strings


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _places(header: Mapping[str, Any], where: str) -> list[_Place]:
    """Check every entry: its fields, dtype, shape, and that its bytes are as many as these need."""
    kinds: dict[tuple[Any, ...], _Kind] = {}
    places = []
    for name, entry in header.items():
        if type(entry) is not dict or entry.keys() != _FIELDS:
            raise CheckpointError(
                f"{where}: the entry of {name!r} must have dtype, shape and data_offsets, "
                f"found {entry!r:.200}"
            )
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not (are_sizes(shape, list) and are_sizes(offsets, list) and len(offsets) == 2):
            raise CheckpointError(
                f"{where}: {name!r} has shape {shape!r:.200} and data_offsets {offsets!r:.200}"
            )
        mark = (entry["dtype"], *shape) if type(entry["dtype"]) is str else ()
        kind = kinds.get(mark)
        if kind is None:
            kind = kinds[mark] = _kind(name, entry, where)
        begin, end = offsets
        if end - begin != kind.nbytes:
            raise CheckpointError(
                f"{where}: {name!r}, {kind.dtype} of shape {kind.shape}, takes {kind.nbytes} bytes; "
                f"its data_offsets {begin}..{end} give it {end - begin}"
            )
        places.append((begin, end, name, kind))
    return places


def _kind(name: str, entry: Mapping[str, Any], where: str) -> _Kind:
    dtype = _NAMES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: {name!r} has dtype {entry['dtype']!r}; known are {', '.join(_NAMES)}",
            hint="dequantize the checkpoint first",
        )
    shape = tuple(entry["shape"])
    return _Kind(dtype, shape, (0,) * len(shape), prod(shape) * ITEM_BYTES[dtype])


def _check_no_holes(places: Sequence[_Place], size: int, where: str) -> None:
    """Tensors follow each other without overlap or hole, from the first byte to the last."""
    at = 0
    for begin, end, name, _ in places:
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
    names = [row[1] for row in rows] + (["__metadata__"] if metadata is not None else [])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path}: two tensors are called {twice!r}")
    kinds: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}
    said = [] if metadata is None else ['"__metadata__":' + _text(dict(metadata))]
    begins = []
    at = 0
    for _, name, dtype, shape in rows:
        kind = kinds.get((dtype, shape))
        if kind is None:
            fields = f'"dtype":"{_CODES[dtype]}","shape":{_text(shape)},"data_offsets":'
            kind = kinds[dtype, shape] = fields, prod(shape) * ITEM_BYTES[dtype]
        fields, size = kind
        said.append(f"{_quoted(name)}:{{{fields}[{at},{at + size}]}}")
        begins.append(at)
        at += size
    text = ("{" + ",".join(said) + "}").encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = [
        (key, Extent(path, start + begin, (0,) * len(shape), shape))
        for (key, _, _, shape), begin in zip(rows, begins, strict=True)
    ]
    return OutputFile(
        path=path,
        size=start + at,
        literals=((0, len(text).to_bytes(8, "little") + text),),
        tensors=tuple(places),
    )


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


#: a name as JSON text, a third of the price of ``_text``
_quoted = encode_basestring
