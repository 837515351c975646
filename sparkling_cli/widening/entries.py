"""Arithmetic on entries of any dtype: numpy, and torch for float16, at which numpy is slow."""

from __future__ import annotations

from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Any

from sparkling_cli.storage.tensors import FLOATING, ITEM_BYTES
from sparkling_cli.widening import bfloat16

if TYPE_CHECKING:
    import numpy as np

    from sparkling_cli.widening.moments import Moments

    Array = np.ndarray[Any, Any]

#: entries that are added as one row
_ROW = 1024
_NUMPY_DTYPES = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64", 16: "complex128"}


@lru_cache(maxsize=64)
def numpy_dtype(dtype: str) -> Any:
    """A numpy dtype that moves the entries; for float32 and float64 also one that computes."""
    import numpy as np

    return np.dtype(dtype if dtype in ("float32", "float64") else _NUMPY_DTYPES[ITEM_BYTES[dtype]])


def scale_into(old: Array, factor: float, offset: float, into: Array, dtype: str) -> None:
    """``factor * old + offset`` in working precision, rounded once."""
    import numpy as np

    if dtype in ("float32", "float64"):
        np.multiply(old, old.dtype.type(factor), out=into)
        if offset:
            np.add(into, old.dtype.type(offset), out=into)
        return
    if dtype == "bfloat16":
        numbers = bfloat16.widened(old)
        np.multiply(numbers, np.float32(factor), out=numbers)
        if offset:
            np.add(numbers, np.float32(offset), out=numbers)
        bfloat16.round_into(numbers, into)
        return
    source, target = _as_torch(old, dtype), _as_torch(into, dtype)
    if offset:
        target.copy_(source.float().mul_(factor).add_(offset))
    else:
        # torch multiplies float16 by a number in float32 and rounds once: the same result
        import torch

        torch.mul(source, factor, out=target)


def draw_into(noise: Array, moments: Moments, factor: float, offset: float, into: Array, dtype: str) -> None:
    """``factor * (mean + std * noise) + offset`` in working precision, rounded once."""
    import numpy as np

    wide = np.float64 if dtype == "float64" else np.float32
    spread = wide(wide(moments.std) * wide(factor))
    shift = wide(wide(moments.mean) * wide(factor) + wide(offset))
    values = np.multiply(noise, spread, dtype=wide)
    np.add(values, shift, out=values)
    _round(values, into, dtype)


def noise_into(
    old: Array, noise: Array, spread: float, factor: float, offset: float, into: Array, dtype: str
) -> None:
    """``factor * (old + spread * noise) + offset`` in working precision, rounded once."""
    import numpy as np

    wide = np.float64 if dtype == "float64" else np.float32
    values = np.multiply(noise, wide(spread), dtype=wide)
    data = np.ascontiguousarray(old)
    np.add(values, as_doubles(data.reshape(-1), dtype).astype(wide).reshape(old.shape), out=values)
    round_into(values, factor, offset, into, dtype)


def round_into(values: Array, factor: float, offset: float, into: Array, dtype: str) -> None:
    """``factor * values + offset`` in working precision, rounded once."""
    import numpy as np

    wide = np.float64 if dtype == "float64" else np.float32
    made = np.multiply(values.astype(wide), wide(factor))
    _round(np.add(made, wide(offset)) if offset else made, into, dtype)


def _round(values: Array, into: Array, dtype: str) -> None:
    """Numbers in working precision as entries."""
    if dtype in ("float32", "float64"):
        into[...] = values
    elif dtype == "bfloat16":
        bfloat16.round_into(values, into)
    else:
        import torch

        _as_torch(into, dtype).copy_(torch.from_numpy(values))


def _as_torch(array: Array, dtype: str) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(array.view(np.int16)).view(getattr(torch, dtype))


def count_nonfinite(data: Array, dtype: str) -> int:
    """NaN and Inf among the entries.

    A sum is finite only if every entry is, and costs a tenth of looking at them one by one; a sum that
    is not (finite entries can overflow too) is looked into.
    """
    if dtype not in FLOATING or not len(data):
        return 0
    import numpy as np

    if dtype in ("float32", "float64"):
        numbers = data.view(dtype)
        rows = len(numbers) // _ROW
        total = np.add.reduce(numbers[rows * _ROW :])
        if rows:  # adding whole rows is three times as fast as adding along one
            total += np.add.reduce(np.add.reduce(numbers[: rows * _ROW].reshape(rows, _ROW), axis=0))
        return 0 if isfinite(total) else int(len(numbers) - np.isfinite(numbers).sum())
    if dtype == "bfloat16":
        return bfloat16.count_nonfinite(data.view(np.uint16))
    import torch

    values = torch.from_numpy(data.view(np.int16)).view(getattr(torch, dtype))
    if isfinite(values.sum().item()):
        return 0
    return int(values.numel() - torch.isfinite(values).sum().item())


def as_doubles(data: Array, dtype: str) -> Array:
    """Bytes of floating entries as float64 numbers."""
    import numpy as np

    if dtype in ("float32", "float64"):
        return data.view(dtype).astype(np.float64)
    if dtype == "bfloat16":
        return bfloat16.widened(data.view(np.uint16)).astype(np.float64)
    return data.view(np.float16).astype(np.float64)
