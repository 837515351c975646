"""Stored bytes to torch tensors, by positioned reads: whole tensors, row ranges, small pieces.

For measuring and checking. Widening itself moves bytes in ``execute`` and does not come by here.
A tensor's boxes are read straight into place; strided boxes in pieces of a few MiB, so that the peak
is the result and one piece.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.storage.tensors import ITEM_BYTES, Extent, StoredTensor, row_major

if TYPE_CHECKING:
    import torch

#: Most files that one source keeps open; a checkpoint may have tens of thousands.
MAX_OPEN = 64
#: Bytes of the temporary buffer for boxes that cannot be read straight into place.
PIECE = 4 << 20


class OpenFiles:
    """File descriptors below a root, opened when first needed, the least used closed first.

    Not for several threads at once: one may close what another reads.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: OrderedDict[str, int] = OrderedDict()

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of a file from ``offset`` on.

        Raises:
            CheckpointError: the file cannot be read, or ends before that.
        """
        done = 0
        try:
            fd = self._descriptor(path)
            while done < len(buffer):
                # One call reads at most 2 GiB on Linux.
                count = os.preadv(fd, [buffer[done : done + (1 << 30)]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {self.root / path}: {error.strerror}") from error
        if done < len(buffer):
            raise CheckpointError(
                f"{self.root / path} ends at byte {offset + done}; a tensor's data goes to byte "
                f"{offset + len(buffer)}",
                hint="the file is truncated: copy the checkpoint again",
            )

    def _descriptor(self, path: str) -> int:
        fd = self._open.get(path)
        if fd is None:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            fd = os.open(self.root / path, os.O_RDONLY)
            self._open[path] = fd
        else:
            self._open.move_to_end(path)
        return fd

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])


class TensorSource:
    """Reads the tensors of an opened checkpoint; a context manager that closes its files.

    Order of use: construct (or ``with``), ``read`` / ``weight`` / ``pieces`` any number of times,
    ``close``.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files = OpenFiles(checkpoint.root)

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._files.close()

    def read(self, key: str, *, rows: slice | None = None) -> torch.Tensor:
        """The tensor stored under ``key``, or its rows ``rows`` (of dim 0)."""
        return _read(self._files, self.checkpoint.tensors[key], rows)

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
    files = OpenFiles(root)
    try:
        return _read(files, stored, rows)
    finally:
        files.close()


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


def _read(files: OpenFiles, stored: StoredTensor, rows: slice | None) -> torch.Tensor:
    import torch

    first, shape = 0, stored.shape
    if rows is not None:
        if not shape or rows.step not in (None, 1):
            raise ValueError(f"rows {rows} of a tensor of shape {shape}")
        first, last, _ = rows.indices(shape[0])
        shape = (max(0, last - first), *shape[1:])
    out = torch.empty(shape, dtype=torch_dtype(stored.dtype))
    for extent in stored.extents:
        _read_extent(files, extent, out, first)
    return out


def _read_extent(files: OpenFiles, extent: Extent, out: torch.Tensor, first: int) -> None:
    """Bring one box into ``out``, whose row 0 is row ``first`` of the tensor."""
    item = out.element_size()
    strides = extent.strides if extent.strides is not None else row_major(extent.shape)
    start, shape, offset = extent.start, extent.shape, extent.offset
    if shape:
        low = max(start[0], first)
        high = min(start[0] + shape[0], first + out.shape[0])
        if low >= high:
            return
        offset += (low - start[0]) * strides[0] * item
        start, shape = (low - first, *start[1:]), (high - low, *shape[1:])
    if not prod(shape):
        return
    target = out
    for dim, (at, size) in enumerate(zip(start, shape, strict=True)):
        target = target.narrow(dim, at, size)
    _fill(files, extent.path, offset, strides, target)


def _fill(files: OpenFiles, path: str, offset: int, strides: tuple[int, ...], target: torch.Tensor) -> None:
    """Read a strided box into ``target``: in one go, or its longest-stride dim in halves."""
    import torch

    item = target.element_size()
    span = 1 + sum((n - 1) * s for n, s in zip(target.shape, strides, strict=True))
    if target.is_contiguous() and _is_row_major(target.shape, strides):
        files.read_into(path, offset, _bytes_of(target))
    elif span * item <= PIECE or target.numel() == 1:
        buffer = torch.empty(span, dtype=target.dtype)
        files.read_into(path, offset, _bytes_of(buffer))
        target.copy_(buffer.as_strided(tuple(target.shape), strides))
    else:
        dims = [d for d in range(target.ndim) if target.shape[d] > 1]
        dim = max(dims, key=lambda d: strides[d])
        half = target.shape[dim] // 2
        rest = target.shape[dim] - half
        _fill(files, path, offset, strides, target.narrow(dim, 0, half))
        offset += half * strides[dim] * item
        _fill(files, path, offset, strides, target.narrow(dim, half, rest))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    wanted = row_major(tuple(shape))
    return all(n == 1 or s == w for n, s, w in zip(shape, strides, wanted, strict=True))
