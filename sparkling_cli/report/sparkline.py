"""Small charts of characters for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, log

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"

#: A span below this share of the values is flat: bars would show noise as a mountain.
FLAT = 1e-3


def sparkline(
    values: Sequence[float | None],
    width: int | None = None,
    *,
    logarithmic: bool = False,
    scale: Sequence[float | None] = (),
) -> str:
    """The values as one line of blocks, lowest to highest; ``×`` for what is not finite.

    Args:
        values: None is not finite.
        width: more values than this are averaged in equal groups.
        logarithmic: heights by the logarithm, where all values are positive (RMS over depth).
        scale: values of another line, which the heights are to be compared with.
    """
    chosen = values
    if width is not None and len(values) > width:
        groups = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
        chosen = [_mean(group) for group in groups]
    finite = [v for v in (*chosen, *scale) if v is not None and isfinite(v)]
    if logarithmic and finite and min(finite) > 0:
        chosen = [log(v) if v is not None and isfinite(v) else None for v in chosen]
        finite = [log(v) for v in finite]
        flat = 0.05  # five percent
    else:
        flat = FLAT * max((abs(v) for v in finite), default=0.0)
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high - low if high - low > flat else 0.0
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
