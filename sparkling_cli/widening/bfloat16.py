"""bfloat16 in numpy, which has no such dtype: the upper half of a float32, held as uint16.

With it nothing of torch is needed for bfloat16, which takes longer to import than many a checkpoint to write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_EXPONENT = 0x7F80
_NAN = 0x7FC0


def widened(old: Array) -> Array:
    """The same numbers as a new float32 array.

    Args:
        old: uint16, of any shape.
    """
    import numpy as np

    wide = old.astype(np.uint32)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


def round_into(numbers: Array, into: Array) -> None:
    """Round float32 numbers to the nearest, ties to even; NaN stays NaN.

    Args:
        numbers: overwritten.
        into: uint16, of the same shape.
    """
    import numpy as np

    lost = np.isnan(numbers) if numbers.size and np.isnan(numbers.max()) else None
    wide = numbers.view(np.uint32)
    odd = wide >> 16
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, 0x7FFF, out=odd)
    np.add(wide, odd, out=wide)  # carries into the upper half where it is rounded up
    np.right_shift(wide, 16, out=wide)
    if lost is not None:
        wide[lost] = _NAN
    into[...] = wide


def count_nonfinite(data: Array) -> int:
    """NaN and Inf among uint16 entries: those whose exponent has all bits set."""
    import numpy as np

    exponents = np.bitwise_and(data, _EXPONENT)
    if not len(data) or exponents.max() < _EXPONENT:
        return 0
    return int(np.count_nonzero(exponents == _EXPONENT))
