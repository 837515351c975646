"""Sizes as people write them: ``512M``, ``2G``."""

from __future__ import annotations

import re

from sparkling_cli.errors import SpecError

#: the least memory budget: some pieces of a tensor in flight
LEAST_MEMORY = 16 << 20
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)


def parse_bytes(text: str, where: str, *, least: int = 1) -> int:
    """Bytes of ``1G``, ``512 MiB``, ``1048576``; units are powers of 1024.

    Raises:
        SpecError: not a size, zero, or below ``least``.
    """
    match = _SIZE.fullmatch(text)
    size = int(float(match.group(1)) * (1 << _UNITS[match.group(2).lower()])) if match else 0
    if size <= 0:
        raise SpecError(f"{where}: {text!r} is not a size", hint="write it like 512M or 2G")
    if size < least:
        raise SpecError(
            f"{where}: expected at least {least >> 20} MiB, found {text}, which is {size:,} "
            f"{'byte' if size == 1 else 'bytes'}",
            hint="write it like 512M or 2G",
        )
    return size
