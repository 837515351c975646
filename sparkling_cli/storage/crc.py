"""CRC-32 of bytes that are met out of order.

Pieces are written by several workers, so the CRC of a tensor or a file is put together from those of
its parts: ``crc(a + b)`` follows from ``crc(a)``, ``crc(b)`` and ``len(b)``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

try:
    from isal import isal_zlib

    _isal: Any = isal_zlib
except ImportError:  # a platform without a wheel: slower, never different
    _isal = None

_POLYNOMIAL = 0xEDB88320


class Span(NamedTuple):
    """``length`` bytes from ``start`` on, and their CRC-32."""

    start: int
    length: int
    crc: int


def crc32(data: Any) -> int:
    """CRC-32 of any contiguous buffer."""
    found: int = _isal.crc32(data) if _isal is not None else zlib.crc32(data)
    return found


@dataclass(frozen=True)
class FileDigest:
    """Size and CRC-32 of a file."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    bytes: int
    crc32: int

    @classmethod
    def of(cls, content: Any) -> FileDigest:
        """Of a file of that content."""
        return cls(len(content), crc32(content))


def combine(first: int, second: int, length: int) -> int:
    """CRC-32 of two neighbours, from their CRCs and the second one's length in bytes."""
    if length == 0:
        return first
    if _isal is not None:
        found: int = _isal.crc32_combine(first, second, length)
        return found
    return combine_slowly(first, second, length)


def combine_slowly(first: int, second: int, length: int) -> int:
    """``combine`` by polynomial arithmetic over GF(2), without a library.

    Appending ``length`` bytes multiplies the first CRC by ``x**(8 length)`` modulo the CRC's polynomial.
    """
    return _times(_power(length), first) ^ second


def _times(a: int, b: int) -> int:
    """Product of two polynomials modulo the CRC's, bit 31 being the constant term."""
    product = 0
    mask = 1 << 31
    while mask:
        if a & mask:
            product ^= b
        mask >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=4096)
def _power(length: int) -> int:
    result, square = 1 << 31, 1 << 23  # x**0 and x**8
    while length:
        if length & 1:
            result = _times(result, square)
        square = _times(square, square)
        length >>= 1
    return result


@lru_cache(maxsize=4096)
def zeros(length: int) -> int:
    """CRC-32 of ``length`` zero bytes, in logarithmic time."""
    crc, done = 0, 0
    power, block = crc32(b"\0"), 1
    while done < length:
        if length & block:
            crc = combine(crc, power, block)
            done += block
        power = combine(power, power, block)
        block *= 2
    return crc


def merge(spans: Iterable[Span]) -> list[Span]:
    """Sorted spans with neighbours joined.

    Raises:
        ValueError: two spans overlap.
    """
    merged: list[Span] = []
    for span in sorted(spans):
        if not span.length:
            continue
        if not merged or merged[-1].start + merged[-1].length < span.start:
            merged.append(span)
            continue
        last = merged[-1]
        if last.start + last.length > span.start:
            raise ValueError(f"bytes {span.start}.. are covered twice")
        merged[-1] = Span(last.start, last.length + span.length, combine(last.crc, span.crc, span.length))
    return merged


def whole(spans: Sequence[Span], start: int, stop: int) -> int:
    """CRC-32 of ``start <= i < stop``, which the spans must tile.

    Raises:
        ValueError: they do not.
    """
    if start == stop:
        return 0
    merged = merge(spans) if len(spans) > 1 else spans
    if len(merged) == 1:
        first, length, crc = merged[0]
        if first == start and length == stop - start:
            return crc
    found = [(s.start, s.start + s.length) for s in merged[:4]]
    raise ValueError(f"bytes {start}..{stop} are not covered exactly once: {found}")
