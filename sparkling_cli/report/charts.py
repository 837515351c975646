"""Charts of numbers over steps or layers, as SVG.

Two series differ in dash and mark as well as in colour: *before* and *old* are dashed with
hollow circles, *after* and *new* are solid with filled squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from markupsafe import Markup

from sparkling_cli.report import svg
from sparkling_cli.results.numbers import significant

#: More points than this are drawn as a line without marks.
MARKS_UP_TO = 40


@dataclass(frozen=True)
class Series:
    """A line: ``kind`` is ``before`` or ``after`` (also the CSS class)."""

    name: str
    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Note:
    """A word at a point: a worst offender, a peak."""

    x: float
    y: float
    words: str


@dataclass(frozen=True)
class Chart:
    """A chart to be drawn at some width.

    Attributes:
        title: what it shows, for screen readers.
        description: the same in a sentence.
        series: lines, the first at the back.
        x_label: under the axis.
        y_label: above the axis.
        notes: words at points.
        vertical: (x, words) of a moment that is marked by a line.
        log: logarithmic y.
        whole_x: x ticks are whole numbers.
        zero: y starts at zero.
    """

    title: str
    description: str
    series: tuple[Series, ...]
    x_label: str
    y_label: str
    notes: tuple[Note, ...] = ()
    vertical: tuple[float, str] | None = None
    log: bool = False
    whole_x: bool = True
    zero: bool = False


def draw(chart: Chart, width: float, height: float, class_: str = "") -> Markup:
    """The chart as an SVG element of this size."""
    x, y = _scales(chart, width, height)
    body = [*_grid(chart, x, y, width)]
    if chart.vertical is not None:
        at = x(chart.vertical[0])
        side = "end" if at > width * 0.6 else "start"
        shift = -5 if side == "end" else 5
        body.append(svg.line(at, y.stop - 20, at, y.start, "moment"))
        body.append(svg.text(at + shift, y.stop - 12, chart.vertical[1], "note", side))
    body += [_series(series, x, y) for series in chart.series]
    body += _notes(chart, x, y, width)
    return svg.svg(width, height, chart.title, chart.description, *body, class_=f"chart {class_}".strip())


def _scales(chart: Chart, width: float, height: float) -> tuple[svg.Scale, svg.Scale]:
    xs = [point[0] for series in chart.series for point in series.points]
    ys = [point[1] for series in chart.series for point in series.points if isfinite(point[1])]
    low, high = svg.domain(ys)
    log = chart.log and bool(ys) and min(ys) > 0
    if log:
        low, high = min(ys) / 1.4, max(ys) * 1.4
    elif chart.zero:
        low = 0.0
    first, last = (min(xs), max(xs)) if xs else (0.0, 1.0)
    if last == first:
        first, last = first - 0.5, last + 0.5
    elif chart.whole_x and len(xs) <= 2 * MARKS_UP_TO:
        # marks at the ends stay inside the frame
        first, last = first - 0.02 * (last - first), last + 0.02 * (last - first)
    scale_y = svg.Scale(low, high, height - 38, 24, log)
    labels = [significant(tick) for tick in scale_y.ticks(4)]
    left = 14 + 6.4 * max((len(label) for label in labels), default=1)
    return svg.Scale(first, last, left, width - 12), scale_y


def _grid(chart: Chart, x: svg.Scale, y: svg.Scale, width: float) -> list[str]:
    body = []
    for tick in y.ticks(4):
        body.append(svg.line(x.start, y(tick), width - 12, y(tick), "grid"))
        body.append(svg.text(x.start - 6, y(tick) + 4, significant(tick), "tick", "end"))
    ticks = x.ticks(max(2, int((x.stop - x.start) / 75)))
    if chart.whole_x:
        ticks = [tick for tick in ticks if tick == int(tick)]
    for tick in ticks:
        body.append(svg.line(x(tick), y.start, x(tick), y.start + 4, "axis"))
        body.append(
            svg.text(
                x(tick),
                y.start + 17,
                f"{tick:,.0f}" if chart.whole_x else significant(tick),
                "tick",
                "middle",
            )
        )
    body.append(svg.line(x.start, y.start, width - 12, y.start, "axis"))
    body.append(svg.text(x.start - 6, 12, chart.y_label, "label"))
    body.append(svg.text(width - 12, y.start + 32, chart.x_label, "label", "end"))
    return body


def _series(series: Series, x: svg.Scale, y: svg.Scale) -> str:
    points = [(x(a), y(b)) for a, b in series.points]
    parts = [svg.path(points, f"line {series.kind}")]
    if len(points) <= MARKS_UP_TO:
        shape = "circle" if series.kind == "before" else "square"
        # the earlier series lies around the later one where both have the same value
        size = 4.2 if series.kind == "before" else 2.6
        for (a, b), (px, py) in zip(series.points, points, strict=True):
            hint = f"{series.name}, {a:g}: {significant(b, 4)}"
            parts.append(svg.marker(shape, px, py, f"mark {series.kind}", hint, size))
    return svg.tag("g", *parts)


def _notes(chart: Chart, x: svg.Scale, y: svg.Scale, width: float) -> list[str]:
    body = []
    taken: list[tuple[float, float]] = []
    for note in chart.notes:
        px, py = x(note.x), y(note.y)
        room = 6.2 * len(note.words)
        anchor = "middle"
        if px - room / 2 < x.start:
            anchor = "start"
        elif px + room / 2 > width - 6:
            anchor = "end"
        up = py - 9 if py - 9 > 30 else py + 17
        while any(abs(up - other_y) < 12 and abs(px - other_x) < room for other_x, other_y in taken):
            up += 12
        taken.append((px, up))
        body.append(svg.marker("circle", px, py, "ring", size=7))
        body.append(svg.text(px, up, note.words, "note", anchor))
    return body


@dataclass(frozen=True)
class Part:
    """A part of a bar; ``kind`` is its CSS class."""

    value: float
    kind: str
    words: str


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of parts, with a name before it and words behind it."""

    name: str
    parts: tuple[Part, ...]
    words: str


def bars(title: str, description: str, rows: Sequence[Bar], width: float, class_: str = "") -> Markup:
    """Horizontal stacked bars on one scale, each under its name."""
    longest = max((sum(p.value for p in row.parts) for row in rows), default=0.0) or 1.0
    room = width - 8
    body = []
    y = 4.0
    for row in rows:
        body.append(svg.text(2, y + 12, row.name, "bar-name"))
        body.append(svg.text(width - 4, y + 12, row.words, "bar-words", "end"))
        x = 2.0
        for part in row.parts:
            length = part.value / longest * room
            if length <= 0:
                continue
            body.append(svg.rect(x, y + 19, length, 20, f"part {part.kind}", svg.tag("title", part.words)))
            if len(part.words) * 6.6 + 10 < length:
                body.append(svg.tag("g", svg.text(x + 6, y + 33, part.words, "part-words"), class_=part.kind))
            x += length
        y += 54
    return svg.svg(width, y, title, description, *body, class_=f"chart {class_}".strip())
