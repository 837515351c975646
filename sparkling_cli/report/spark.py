"""Small charts of characters for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"


def sparkline(values: Sequence[float | None], width: int = 24) -> str:
    """The values as one line of blocks, lowest to highest; ``×`` for what is not finite.

    More values than ``width`` are averaged in equal groups.
    """
    groups = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    chosen: Sequence[float | None] = [_mean(g) for g in groups] if len(values) > width else values
    finite = [v for v in chosen if v is not None and isfinite(v)]
    if not finite:
        return "×" * len(chosen)
    low, high = min(finite), max(finite)
    # differences of rounding are no shape
    span = high - low if high - low > 1e-3 * max(abs(low), abs(high)) else 0.0
    return "".join(_level(v, low, span) for v in chosen)


def _mean(group: Sequence[float | None]) -> float | None:
    finite = [v for v in group if v is not None and isfinite(v)]
    return sum(finite) / len(finite) if len(finite) == len(group) else None


def _level(value: float | None, low: float, span: float) -> str:
    if value is None or not isfinite(value):
        return "×"
    if span == 0.0:
        return _LEVELS[3]
    return _LEVELS[min(7, int((value - low) / span * 8))]


def share_bar(share: float, width: int = 20) -> str:
    """A share of one as a bar of so many characters, to an eighth of one."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    whole, rest = divmod(eighths, 8)
    bar = "█" * whole + (_EIGHTHS[rest] if rest else "")
    return bar.ljust(width)
