"""Stored bytes to torch tensors: whole tensors, row ranges, small pieces; for measuring and checking."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparkling_cli.errors import CheckpointError
from sparkling_cli.storage.byte_ranges import Handles, Placement
from sparkling_cli.storage.byte_ranges import read as read_bytes
from sparkling_cli.storage.tensors import ITEM_BYTES, StoredTensor

if TYPE_CHECKING:
    import torch

#: Bytes of a piece, unless a caller wants others.
PIECE = 4 << 20


class Stored(Protocol):
    """What has tensors on disk: an opened checkpoint (see ``formats.model.Checkpoint``)."""

    @property
    def root(self) -> Path:
        """Its directory or file."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Its tensors by key."""

    @property
    def weights(self) -> Mapping[str, str]:
        """Weight name -> key."""


class TensorSource:
    """Reads the tensors of an opened checkpoint; a context manager that closes its files.

    Order of use: construct (or ``with``), ``read`` / ``weight`` / ``pieces`` any number of times,
    ``close``.
    """

    def __init__(self, checkpoint: Stored) -> None:
        self.checkpoint = checkpoint
        self._files = Handles(checkpoint.root)
        self._placements: dict[str, Placement] = {}

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._files.close()

    def read(self, key: str, *, rows: slice | None = None) -> torch.Tensor:
        """The tensor stored under ``key``, or its rows ``rows`` (of dim 0)."""
        stored = self.checkpoint.tensors[key]
        if key not in self._placements:
            self._placements[key] = Placement(stored.dtype, stored.shape, stored.extents, key)
        return _read(self._files, self._placements[key], stored, rows)

    def weight(self, name: str, *, rows: slice | None = None) -> torch.Tensor:
        """The weight that is called ``name`` on disk, or its rows ``rows``."""
        return self.read(self.checkpoint.weights[name], rows=rows)

    def pieces(self, key: str, *, nbytes: int = PIECE) -> Iterator[torch.Tensor]:
        """The tensor's entries in pieces of whole rows, row-major, about ``nbytes`` each.

        A single row larger than that is one piece.
        """
        stored = self.checkpoint.tensors[key]
        for rows in row_ranges(stored, nbytes):
            yield self.read(key, rows=rows)


def row_ranges(stored: StoredTensor, nbytes: int) -> Iterator[slice | None]:
    """Ranges of rows of about ``nbytes`` that cover a tensor; None for a scalar."""
    if not stored.shape:
        yield None
        return
    row = max(1, prod(stored.shape[1:]) * ITEM_BYTES[stored.dtype])
    step = max(1, nbytes // row)
    for start in range(0, stored.shape[0], step):
        yield slice(start, min(start + step, stored.shape[0]))


def read_tensor(root: Path, stored: StoredTensor, *, rows: slice | None = None) -> torch.Tensor:
    """Read a stored tensor, or some of its rows, as a contiguous CPU tensor of the stored dtype.

    Args:
        root: the checkpoint's directory or file.
        stored: where its boxes lie.
        rows: range of dim 0, step 1; None for all.

    Raises:
        CheckpointError: a file is missing, unreadable or too short, or torch lacks the dtype.
        ValueError: ``rows`` has a step, or the tensor has no dims.
    """
    files = Handles(root)
    try:
        return _read(files, Placement(stored.dtype, stored.shape, stored.extents, str(root)), stored, rows)
    finally:
        files.close()


#: how many entries a sample has, in how many pieces
_SAMPLE, _SAMPLE_PIECES = 4096, 4
_PACKED = {"float64": "d", "float32": "f", "bfloat16": "f", "float16": "e"}


def sampled(root: Path, stored: StoredTensor) -> list[float]:
    """A few thousand entries of a floating tensor, at places that depend on its shape alone.

    It needs neither torch nor numpy where the tensor's bytes lie in a row.

    Args:
        root: the checkpoint's directory or file.
        stored: where its boxes lie.

    Raises:
        CheckpointError: a file is missing, unreadable or too short.
    """
    placement = Placement(stored.dtype, stored.shape, stored.extents, str(root))
    size = prod(stored.shape)
    step, piece = size // _SAMPLE_PIECES, _SAMPLE // _SAMPLE_PIECES
    starts = [0] if size <= _SAMPLE else [step * i + (step - piece) // 2 for i in range(_SAMPLE_PIECES)]
    item, found = placement.item, bytearray()
    files = Handles(root)
    try:
        for start in starts:
            data = _buffer((piece if size > _SAMPLE else size) * item, flat=placement.flat)
            read_bytes(files, placement, start * item, start * item + len(data), data)
            found += bytes(data)
    finally:
        files.close()
    if stored.dtype == "bfloat16":  # the upper half of a float32
        wide = bytearray(2 * len(found))
        wide[2::4], wide[3::4] = found[::2], found[1::2]
        found = wide
    code = _PACKED[stored.dtype]
    return [*struct.unpack(f"<{len(found) // struct.calcsize(code)}{code}", found)]


def _buffer(nbytes: int, *, flat: bool) -> Any:
    if flat:
        return memoryview(bytearray(nbytes))
    import numpy as np

    return np.empty(nbytes, dtype=np.uint8)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name.

    Raises:
        CheckpointError: the installed torch does not have it.
    """
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(
            f"a tensor has dtype {name}, which torch {torch.__version__} does not have",
            hint="upgrade torch",
        )
    return found


def _read(files: Handles, placement: Placement, stored: StoredTensor, rows: slice | None) -> torch.Tensor:
    import torch

    first, shape = 0, stored.shape
    if rows is not None:
        if not shape or rows.step not in (None, 1):
            raise ValueError(f"rows {rows} of a tensor of shape {shape}")
        first, last, _ = rows.indices(shape[0])
        shape = (max(0, last - first), *shape[1:])
    out = torch.empty(shape, dtype=torch_dtype(stored.dtype))
    start = first * prod(shape[1:]) * placement.item
    data = out.reshape(-1).view(torch.uint8).numpy()
    if len(data):
        read_bytes(files, placement, start, start + len(data), data)
    return out
