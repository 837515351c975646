"""Ticks, scales, numbers and marks: charts show the values that they are given."""

from __future__ import annotations

from math import floor, log10
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkling_cli.report import charts, rates, svg
from sparkling_cli.report.charts import Bar, Chart, Part, Series
from sparkling_cli.results.numbers import significant

finite = st.floats(-1e9, 1e9, allow_nan=False)


@given(finite, st.floats(1e-6, 1e9), st.integers(2, 9))
def test_ticks_are_round_inside_and_neither_few_nor_many(low: float, width: float, about: int) -> None:
    """Steps are 1, 2 or 5 times a power of ten."""
    high = low + width
    if high - low < 1e-9 * abs(low):
        return
    step = svg.nice_step(high - low, about)
    assert round(step / 10 ** floor(log10(step) + 1e-9), 6) in (1, 2, 5, 10)
    ticks = svg.nice_ticks(low, high, about)
    slack = 1e-6 * step + 1e-12 * abs(low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert 0 < len(ticks) <= about + 1 or about / 2.5 <= len(ticks) + 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_domain_holds_all_values_and_never_magnifies_rounding(values: list[float]) -> None:
    """All inside, at least a tenth of their size wide, never below zero for values that are not."""
    low, high = svg.domain(values)
    assert low <= min(values) + 1e-9
    assert high >= max(values) - 1e-9
    assert high - low >= 0.05 * max(values)
    assert low >= 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00103, "0.00103"), (1.9556e-5, "1.96e-5"), (12345.0, "12,345"), (0.5, "0.5"), (1.0, "1"),
     (2.5e7, "2.5e7"), (-0.24, "-0.24"), (1e-7, "1e-7")],
)  # fmt: skip
def test_numbers_for_people(value: float, text: str) -> None:
    """Three digits, no trailing zeros, powers of ten for the very small and large."""
    assert significant(value) == text


def marks(drawing: str, kind: str) -> list[tuple[float, float]]:
    """Centres of the marks of one series."""
    found = []
    for element in ElementTree.fromstring(drawing).iter():
        if element.get("class") == f"mark {kind}":
            if element.tag == "circle":
                found.append((float(element.get("cx", "")), float(element.get("cy", ""))))
            else:
                side = float(element.get("width", ""))
                found.append((float(element.get("x", "")) + side / 2, float(element.get("y", "")) + side / 2))
    return found


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=30))
def test_marks_lie_in_proportion_to_their_values(values: list[float]) -> None:
    """Pixels are an affine map of the values, the same for both series; larger is higher."""
    points = tuple((float(i), v) for i, v in enumerate(values))
    doubled = tuple((x, 2 * y) for x, y in points)
    chart = Chart("t", "d", (Series("a", "before", points), Series("b", "after", doubled)), "x", "y")
    drawing = charts.draw(chart, 350, 200)
    before, after = marks(drawing, "before"), marks(drawing, "after")
    assert len(before) == len(after) == len(values)
    pairs = [(v, y) for v, (_, y) in zip(values, before, strict=True)]
    pairs += [(2 * v, y) for v, (_, y) in zip(values, after, strict=True)]
    (low, bottom), (high, top) = min(pairs), max(pairs)
    for value, y in pairs:
        assert y == pytest.approx(bottom + (top - bottom) * (value - low) / (high - low), abs=0.02)
        assert 0 <= y <= 200
    assert bottom > top


def test_bars_are_in_proportion_and_on_one_scale() -> None:
    """Lengths of parts are their shares of the longest bar."""
    rows = [
        Bar("all", (Part(10.0, "large", "10"),), ""),
        Bar("parts", (Part(2.0, "small", "2"), Part(5.0, "large", "5")), ""),
    ]
    root = ElementTree.fromstring(charts.bars("t", "d", rows, 508))
    lengths = [float(e.get("width", "")) for e in root.iter() if e.tag == "rect"]
    assert lengths == pytest.approx([500, 100, 250], abs=0.02)


def test_series_are_told_apart_without_colour() -> None:
    """Before and after differ in mark; the style sheet gives one of them dashes."""
    points = ((0.0, 1.0), (1.0, 2.0))
    chart = Chart("t", "d", (Series("a", "before", points), Series("b", "after", points)), "x", "y")
    root = ElementTree.fromstring(charts.draw(chart, 350, 200))
    tags = {e.get("class"): e.tag for e in root.iter() if (e.get("class") or "").startswith("mark")}
    assert tags == {"mark before": "circle", "mark after": "rect"}


@given(st.integers(1, 5000), st.integers(2, 300))
def test_thinning_keeps_the_ends(count: int, at_most: int) -> None:
    """At most so many, in order, with the first and the last."""
    found = rates.thin(range(count), at_most)
    assert found == sorted(set(found))
    assert len(found) == min(count, at_most)
    assert (found[0], found[-1]) == (0, count - 1)
