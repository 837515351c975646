"""The arithmetic of a proof: what an entry must be, on bit patterns of any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparkling_cli.checkpoint.model import FLOATING
from sparkling_cli.execute import fill
from sparkling_cli.layout.geometry import Fill

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
    if how is Fill.COPY and subject.dtype in ("float32", "float64"):
        values: Array = old.view(subject.dtype) * factor
        return (values + values.dtype.type(subject.offset) if subject.offset else values).view(old.dtype)
    import torch

    kind = getattr(torch, subject.dtype)
    wide = torch.float64 if subject.dtype == "float64" else torch.float32
    factors = torch.from_numpy(np.ascontiguousarray(factor))
    if how is Fill.RANDOM:
        first = rows.start * width + (part.start if rows.stop - rows.start == 1 else 0)
        count = part.stop - part.start if rows.stop - rows.start == 1 else (rows.stop - rows.start) * width
        drawn = fill.normal(subject.seed, subject.stream, first, first + count)
        drawn = drawn[None, :] if rows.stop - rows.start == 1 else drawn.reshape(-1, width)[:, part]
        result = drawn.to(wide) * (spread * factors)
    else:
        stored = torch.from_numpy(np.ascontiguousarray(old).view(signed_dtype(old.dtype.itemsize))).view(kind)
        result = stored.to(wide) * factors
        result = result + subject.offset if subject.offset else result
    bits: Array = result.to(kind).contiguous().view(_torch_signed(old.dtype.itemsize)).numpy()
    return bits.view(old.dtype)


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
