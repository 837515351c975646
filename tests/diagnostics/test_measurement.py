"""Comparing two measurements: deviations, the layers that are named, the verdict, JSON."""

from __future__ import annotations

import json
from math import inf, nan

import pytest

from sparkling_cli.diagnostics.measurement import (
    Change,
    LayerStat,
    LogitsChange,
    Measurement,
    StreamStat,
    compare,
    percent,
)


def measured(*ratios: float, loss: float | None = 2.0, stream: float = 1.0) -> Measurement:
    """A model whose layers have these r, each with RMS(x) = 2."""
    layers = tuple(LayerStat(f"layers.{i}.up", 2.0, 2.0 * r, 1) for i, r in enumerate(ratios))
    return Measurement(layers, (StreamStat("layers.0", stream),), 5.0, loss)


def test_deviation_of_r() -> None:
    """|r'/r - 1| per layer by name, worst first, and only those above 10% named."""
    report = compare(measured(1.0, 2.0, 4.0), measured(1.05, 1.5, 4.8))
    assert [change.deviation for change in report.layers] == pytest.approx([0.05, 0.25, 0.2])
    assert [change.name for change in report.offenders] == ["layers.1.up", "layers.2.up"]
    assert "2 of 3 linear layers" in report.verdict
    assert "layers.1.up (-25%)" in report.verdict


def test_kept_signal() -> None:
    """Within 10% everywhere: the verdict says so, and that the function is kept if it is."""
    report = compare(measured(1.0, 2.0), measured(1.0, 2.0), logits=LogitsChange(1e-7, 1e-7, 1e-7))
    assert report.offenders == ()
    assert "Signal kept" in report.verdict
    assert "preserved to rounding" in report.verdict
    assert "+0.0000" in report.verdict


def test_numbers_that_are_not_finite() -> None:
    """NaN after is named in words, and never gets into JSON."""
    report = compare(measured(1.0, 2.0), measured(1.0, nan, loss=nan, stream=inf))
    assert "NOT FINITE" in report.verdict
    assert [change.name for change in report.offenders] == ["layers.1.up"]
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["layers"][1]["after"] is None
    assert data["loss"]["after"] is None


def test_layers_of_one_model_only() -> None:
    """Layers without a partner are listed, not compared."""
    report = compare(measured(1.0), measured(1.0, 3.0))
    assert report.only_after == ("layers.1.up",)
    assert len(report.layers) == 1


def test_change_from_zero() -> None:
    """Zero to zero is no change; from zero to something is infinitely large."""
    assert Change("a", 0.0, 0.0).deviation == 0
    assert Change("a", 0.0, 1.0).deviation == inf
    assert Change("a", nan, nan).deviation == 0


def test_percent() -> None:
    """Shares as people read them."""
    assert [percent(x) for x in (0.123, 0.0312, 0.0031, 0.0, 2e-7)] == [
        "12%",
        "3.1%",
        "0.31%",
        "0%",
        "<0.001%",
    ]
    assert percent(-0.25, signed=True) == "-25%" and percent(0.25, signed=True) == "+25%"
    assert percent(inf) == "not finite"
