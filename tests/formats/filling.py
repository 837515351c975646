"""A test-only executor: fills an output file's extents from its source by plain NumPy, in memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import numpy as np

from sparkling_cli.formats.model import OutputFile
from sparkling_cli.storage.tensors import ITEM_BYTES, Extent, StoredTensor


def box(tensor: StoredTensor, extent: Extent, data: np.ndarray) -> np.ndarray:
    """One box of a tensor as an array of raw entries."""
    item = ITEM_BYTES[tensor.dtype]
    kind = np.dtype(f"V{item}")
    if prod(extent.shape) == 0:
        return np.zeros(extent.shape, kind)
    if extent.strides is None:
        flat = np.frombuffer(data, kind, prod(extent.shape), extent.offset)
        return flat.reshape(extent.shape)
    steps = [stride * item for stride in extent.strides]
    first = np.frombuffer(data, kind, 1, extent.offset)
    return np.lib.stride_tricks.as_strided(first, extent.shape, steps)


def read_stored(root: Path, tensor: StoredTensor) -> np.ndarray:
    """A whole stored tensor as an array of raw entries."""
    whole = np.zeros(tensor.shape, np.dtype(f"V{ITEM_BYTES[tensor.dtype]}"))
    for extent in tensor.extents:
        path = root / extent.path if extent.path else root
        where = tuple(slice(a, a + n) for a, n in zip(extent.start, extent.shape, strict=True))
        data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        whole[where] = box(tensor, extent, data)
    return whole


def filled(output: OutputFile, value: Callable[[str], np.ndarray]) -> bytes:
    """The file's bytes, with the tensors that ``value`` gives by key and all checksums."""
    data = bytearray(output.size)
    written = np.zeros(output.size, bool)

    def put(offset: int, raw: bytes, what: str) -> None:
        assert not written[offset : offset + len(raw)].any(), f"{what} overlaps something"
        data[offset : offset + len(raw)] = raw
        written[offset : offset + len(raw)] = True

    for offset, literal in output.literals:
        put(offset, literal, f"the literal at {offset}")
    for key, extent in output.tensors:
        part = value(key)[tuple(slice(a, a + n) for a, n in zip(extent.start, extent.shape, strict=True))]
        assert part.shape == extent.shape, key
        put(extent.offset, np.ascontiguousarray(part).tobytes(), key)
    for checksum in output.checksums:
        crc = zlib.crc32(data[checksum.start : checksum.stop])
        for at in checksum.at:
            data[at : at + 4] = crc.to_bytes(4, "little")
    return bytes(data)


def write_outputs(
    root: Path, source: Path, files: tuple[OutputFile, ...], tensors: Mapping[str, StoredTensor]
) -> None:
    """Write output files whose tensors are the source's, unchanged."""
    for output in files:
        path = root / output.path if output.path else root
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(filled(output, lambda key: read_stored(source, tensors[key])))
