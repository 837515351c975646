"""Random entries that depend on (seed, stream, position) alone.

The stream of one tensor is cut into blocks of fixed length, each with a generator of its own, so that
any part can be made without the parts before it: the result is the same whatever the order, the piece
size, the thread count or the number of hosts.

The numbers come from numpy's ziggurat over SFC64: tables, comparisons and single multiplications, so they
do not depend on a processor's vector unit, and torch (a second to import) is not needed for them.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: entries per block; part of the definition of the stream, so it must never change.
BLOCK = 1 << 16


def normal(seed: int, stream: str, start: int, stop: int) -> Array:
    """Standard normal float32 numbers ``start <= i < stop`` of a stream; not to be written to."""
    import numpy as np

    if stop <= BLOCK:  # a small tensor: no more than it needs
        return _made(seed, stream, 0, stop)[start:]
    found = np.empty(stop - start, dtype=np.float32)
    at = start
    while at < stop:
        index, low = divmod(at, BLOCK)
        high = min(stop - index * BLOCK, BLOCK)
        found[at - start : at - start + high - low] = _block(seed, stream, index)[low:high]
        at += high - low
    return found


@lru_cache(maxsize=24)  # pieces and blocks have different borders: a few are needed twice, by each thread
def _block(seed: int, stream: str, index: int) -> Array:
    return _made(seed, stream, index, BLOCK)


def _made(seed: int, stream: str, index: int, count: int) -> Array:
    """The first ``count`` numbers of a block."""
    import numpy as np

    digest = hashlib.blake2b(f"{seed}\0{stream}\0{index}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    return generator.standard_normal(count, dtype=np.float32)
