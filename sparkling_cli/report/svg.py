"""SVG by hand: elements, scales and ticks. Pure text in, pure text out.

Coordinates are in the chart's own units (CSS pixels at natural size), y downwards. Colours and fonts
are classes of ``page.css``, so that one drawing serves the light and the dark theme.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

from markupsafe import Markup


def num(value: float) -> str:
    """A coordinate: two decimals at most, no trailing zeros, no minus zero."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def tag(name: str, *children: str, **attributes: object) -> str:
    """An element; ``class_`` is class, other underscores become hyphens; None is left out."""
    parts = [
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    ]
    body = "".join(children)
    return f"<{name}{''.join(parts)}>{body}</{name}>" if body else f"<{name}{''.join(parts)}/>"


def _attribute(value: object) -> str:
    return num(value) if isinstance(value, (int, float)) else escape(str(value), quote=True)


def text(x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> str:
    """A line of text."""
    place = None if anchor == "start" else anchor
    return tag("text", escape(words), x=x, y=y, class_=class_ or None, text_anchor=place)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, *children: str) -> str:
    """A rectangle; children may be a title."""
    return tag("rect", *children, x=x, y=y, width=width, height=height, class_=class_)


def path(points: Iterable[tuple[float, float]], class_: str) -> str:
    """A polyline through the points; nothing for fewer than two."""
    found = list(points)
    if len(found) < 2:
        return ""
    steps = "L".join(f"{num(x)} {num(y)}" for x, y in found)
    return tag("path", d=f"M{steps}", class_=class_)


def marker(shape: str, x: float, y: float, class_: str, title: str = "", size: float = 3.5) -> str:
    """A hollow or filled mark: ``circle`` or ``square`` (the class says how it is filled)."""
    hint = tag("title", escape(title)) if title else ""
    if shape == "circle":
        return tag("circle", hint, cx=x, cy=y, r=size, class_=class_)
    return rect(x - size * 0.9, y - size * 0.9, size * 1.8, size * 1.8, class_, hint)


def svg(width: float, height: float, title: str, description: str, *body: str, class_: str = "") -> Markup:
    """A drawing with a title and a description for those who cannot see it; its text is escaped already."""
    drawing = tag(
        "svg",
        tag("title", escape(title)),
        tag("desc", escape(description)),
        *body,
        viewBox=f"0 0 {num(width)} {num(height)}",
        role="img",
        class_=class_ or None,
        style=f"max-width:{num(width * 1.35)}px",
    )
    return Markup(drawing)


@dataclass(frozen=True)
class Scale:
    """Maps ``low..high`` to ``start..stop``, straight or by logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value; values outside the domain lie outside the range."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = log10(low), log10(high), log10(max(value, low * 1e-3))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, about: int) -> list[float]:
        """Round numbers inside the domain; powers of ten on a log scale."""
        if self.log:
            powers = range(ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9) + 1)
            if len(powers) >= 2:
                stride = ceil(len(powers) / about)
                return [10.0**p for p in powers][::stride]
        return nice_ticks(self.low, self.high, about)


def nice_step(span: float, about: int) -> float:
    """1, 2 or 5 times a power of ten, so that about so many steps fit into the span."""
    raw = span / max(about, 1)
    power = 10.0 ** floor(log10(raw))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw * 0.999)


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of a round step inside ``low..high``."""
    step = nice_step(high - low, about)
    first = ceil(low / step - 1e-9)
    last = floor(high / step + 1e-9)
    # rounded, so that 3 * 0.1 prints as 0.3
    digits = max(0, 2 - floor(log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def domain(values: Iterable[float]) -> tuple[float, float]:
    """Low and high around the values, at least a tenth of their size apart.

    Without the least width, differences of rounding would fill the whole chart.
    """
    found = [value for value in values if isfinite(value)]
    if not found:
        return 0.0, 1.0
    low, high = min(found), max(found)
    width = max(high - low, 0.1 * max(abs(low), abs(high)), 1e-12)
    middle = (low + high) / 2
    padded = (middle - 0.58 * width, middle + 0.58 * width)
    return (max(0.0, padded[0]) if low >= 0 else padded[0]), padded[1]
