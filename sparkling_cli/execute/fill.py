"""Random entries that depend on (seed, stream, position) alone.

The stream of one tensor is cut into blocks of fixed length, each with a generator of its own, so that
any part can be made without the parts before it: the result is the same whatever the order, the piece
size, the thread count or the number of hosts.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: entries per block; part of the definition of the stream, so it must never change.
BLOCK = 1 << 16


def normal(seed: int, stream: str, start: int, stop: int) -> torch.Tensor:
    """Standard normal float32 numbers ``start <= i < stop`` of a stream."""
    import torch

    parts = []
    for index in range(start // BLOCK, -(-stop // BLOCK)):
        low = max(start - index * BLOCK, 0)
        high = min(stop - index * BLOCK, BLOCK)
        parts.append(normal_block(seed, stream, index)[low:high])
    if not parts:
        return torch.empty(0)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def normal_block(seed: int, stream: str, index: int) -> torch.Tensor:
    """Block ``index`` of a stream: ``BLOCK`` standard normal float32 numbers."""
    import torch

    generator = torch.Generator().manual_seed(_block_seed(seed, stream, index))
    return torch.randn(BLOCK, generator=generator, dtype=torch.float32)


def _block_seed(seed: int, stream: str, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{stream}\0{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
