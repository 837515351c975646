"""The arithmetic of a proof: what an entry must be, on bit patterns of any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparkling_cli.storage.tensors import FLOATING
from sparkling_cli.widening import fill
from sparkling_cli.widening.geometry import Fill

if TYPE_CHECKING:
    import numpy as np

    from sparkling_cli.verification.compare import Subject

    Array = np.ndarray[Any, Any]


def computed(
    subject: Subject,
    old: Array,
    factor: Array,
    how: Fill,
    spread: float,
    rows: slice,
    part: slice,
    width: int,
) -> Array:
    """Computed entries, rounded to the tensor's dtype, as integers."""
    import numpy as np

    if subject.dtype not in FLOATING:
        raise ValueError(f"{subject.key}: {subject.dtype} entries cannot have been computed")
    wide = np.dtype(wide_dtype(subject.dtype))
    if how is Fill.RANDOM:
        # wherever the spread meets the factors, in the precision of the arithmetic
        values: Array = _drawn(subject, rows, part, width).astype(wide) * (wide.type(spread) * factor)
        return _rounded(values, subject.dtype).view(old.dtype)
    if subject.dtype in ("float32", "float64"):
        values = old.view(subject.dtype) * factor
    else:
        values = _as_float32(old, subject.dtype) * factor
    values = values + values.dtype.type(subject.offset) if subject.offset else values
    return _rounded(values, subject.dtype).view(old.dtype)


def _drawn(subject: Subject, rows: slice, part: slice, width: int) -> Array:
    """The numbers of a box: of one row only its columns, else of whole rows."""
    if rows.stop - rows.start == 1:
        first = rows.start * width
        return fill.normal(subject.seed, subject.stream, first + part.start, first + part.stop)[None, :]
    drawn = fill.normal(subject.seed, subject.stream, rows.start * width, rows.stop * width)
    return drawn.reshape(-1, width)[:, part]


def _as_float32(bits: Array, dtype: str) -> Array:
    import numpy as np
    import torch

    stored = torch.from_numpy(np.ascontiguousarray(bits).view(signed_dtype(bits.dtype.itemsize)))
    values: Array = stored.view(getattr(torch, dtype)).float().numpy()
    return values


def _rounded(values: Array, dtype: str) -> Array:
    """Values in the tensor's dtype: as they are, or their bits where numpy does not have it."""
    if dtype in ("float32", "float64"):
        return values
    import numpy as np
    import torch

    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
    bits: Array = rounded.view(_torch_signed(rounded.element_size())).numpy()
    return bits


def wide_dtype(dtype: str) -> str:
    """The numpy dtype of the arithmetic."""
    return "float64" if dtype == "float64" else "float32"


def both_nan(found: Array, wanted: Array, dtype: str) -> Array:
    """Computed entries that are NaN on both sides: the payload of a computed NaN is nobody's promise."""
    import numpy as np
    import torch

    kind = getattr(torch, dtype)

    def nan(bits: Array) -> Array:
        values = torch.from_numpy(np.ascontiguousarray(bits).view(signed_dtype(bits.dtype.itemsize)))
        mask: Array = torch.isnan(values.view(kind)).numpy()
        return mask

    return nan(found) & nan(wanted)


def as_doubles(data: Array, dtype: str) -> Array:
    """Bytes of floating entries as float64 numbers."""
    import numpy as np

    if dtype in ("float32", "float64"):
        return data.view(dtype).astype(np.float64)
    import torch

    kind = getattr(torch, dtype)
    values: Array = torch.from_numpy(data.view(signed_dtype(kind.itemsize))).view(kind).double().numpy()
    return values


def bits_dtype(item: int) -> str:
    """A numpy dtype of that size that is compared bit by bit."""
    return {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64", 16: "complex128"}[item]


def signed_dtype(item: int) -> str:
    """A numpy dtype of that size that torch knows."""
    return {1: "int8", 2: "int16", 4: "int32", 8: "int64", 16: "complex128"}[item]


def _torch_signed(item: int) -> Any:
    import torch

    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[item]
