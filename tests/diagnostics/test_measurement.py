"""Comparing two measurements: deviations, what the verdict names, JSON."""

from __future__ import annotations

import json
from math import inf, nan

import pytest

from sparkling_cli.diagnostics.measurement import compare
from sparkling_cli.results.base import change
from sparkling_cli.results.measured import LayerStat, Measurement, StreamStat
from sparkling_cli.results.numbers import percent
from sparkling_cli.results.verdict import offenders, verdict_of_change


def measured(*ratios: float, loss: float | None = 2.0, stream: float = 1.0) -> Measurement:
    """A model whose layers have these r, each with RMS(x) = 2; no functions of blocks are known."""
    return Measurement(
        layers=tuple(LayerStat.of(f"layers.{i}.up", 2.0, 2.0 * r, 1) for i, r in enumerate(ratios)),
        functions=(),
        stream=(StreamStat(name="layers.0", rms=stream),),
        logits_rms=5.0,
        loss=loss,
        vocabulary=512,
    )


def words(*given: Measurement, **options: float) -> str:
    """All words of the verdict."""
    verdict = verdict_of_change(compare(*given, **options))  # type: ignore[arg-type]
    return " ".join([verdict.headline, *(finding.text for finding in verdict.findings)])


def test_deviation_of_r() -> None:
    """r'/r - 1 per layer by name, worst first, and only those above 10% named."""
    first, second = measured(1.0, 2.0, 4.0), measured(1.05, 1.5, 4.8)
    report = compare(first, second)
    assert [layer.deviation for layer in report.layers] == pytest.approx([0.05, -0.25, 0.2])
    assert [layer.name for layer in offenders(report)] == ["layers.1.up", "layers.2.up"]
    text = words(first, second)
    assert "2 of 3 linear layers" in text
    assert "layers.1.up (-25%)" in text


def test_kept_signal() -> None:
    """Within 10% everywhere: the verdict says so, and that the function is kept if it is."""
    first, second = measured(1.0, 2.0), measured(1.0, 2.0)
    assert offenders(compare(first, second)) == []
    text = words(first, second, logit_change=1e-7, logit_largest=1e-7)
    assert "Signal kept" in text
    assert "preserved to rounding" in text
    assert "(0.0000): the function is kept" in text
    trained = words(first, measured(1.0, 2.0, loss=2.004), logit_change=0.2, logit_largest=0.5)
    assert "(+0.0040): nearly as before" in trained and "function is kept" not in trained


def test_what_was_exactly_zero_is_not_called_infinite() -> None:
    """A layer that gave nothing out: still nothing is no change, and something is judged by its size."""
    assert "not finite" not in words(measured(1.0, 0.0), measured(1.0, 0.0))
    text = words(measured(1.0, 0.0), measured(1.0, 0.05))
    assert "Signal kept" in text
    assert "layers.1.up, moved by from 0" not in text
    assert "layers.1.up, moved from 0 to 0.05" in text
    text = words(measured(1.0, 0.0), measured(1.0, 0.5))
    assert "layers.1.up (from 0 to 0.5)" in text
    assert "not finite" not in text


def test_numbers_that_are_not_finite() -> None:
    """NaN after is named in words, and never gets into JSON."""
    first, second = measured(1.0, 2.0), measured(1.0, nan, loss=nan, stream=inf)
    report = compare(first, second)
    assert "not finite" in words(first, second)
    assert [layer.name for layer in offenders(report)] == ["layers.1.up"]
    data = json.loads(json.dumps(report.model_dump(mode="json"), allow_nan=False))
    assert data["layers"][1]["r_after"] is None
    assert data["residual"][0]["after"] is None
    assert data["loss_after"] is None


def test_layers_of_one_model_only() -> None:
    """Layers without a partner are listed, not compared."""
    report = compare(measured(1.0), measured(1.0, 3.0))
    assert report.only_after == ("layers.1.up",)
    assert len(report.layers) == 1


def test_change_from_zero() -> None:
    """Zero to zero is no change; from zero to something is not finite."""
    assert change(0.0, 0.0).deviation == 0
    assert change(0.0, 1.0).deviation is None
    assert change(0.0, 1.0).moved == inf
    assert change(nan, nan).deviation == 0


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
