"""Sparklines and pictures."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkling_cli.errors import OutputError
from sparkling_cli.report.plots import plot_activations, plot_schedule
from sparkling_cli.report.sparkline import share_bar, sparkline
from tests.report.samples import activations, learning_rate


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=100), st.integers(5, 40))
def test_sparkline_is_monotone_in_its_values(values: list[float], width: int) -> None:
    """Sorted values give sorted levels; never more characters than the width."""
    line = sparkline(sorted(values), width)
    assert len(line) == min(len(values), width)
    assert list(line) == sorted(line)


def test_sparkline_shows_no_shape_in_rounding_and_marks_what_is_not_finite() -> None:
    """Equal to three digits is flat; None and infinity are crosses."""
    assert len(set(sparkline([1.0, 1.0001, 0.9999]))) == 1
    assert sparkline([1.0, None, 2.0, float("inf")])[1::2] == "\u00d7" * 2
    assert sparkline([0.0, 1.0]) == "▁█"


@given(st.floats(0, 1), st.integers(1, 60))
def test_share_bar_is_as_long_as_its_share(share: float, width: int) -> None:
    """Full blocks and the eighths of the last add up."""
    bar = share_bar(share, width)
    assert len(bar) == width
    eighths = sum(8 if c == "█" else " ▏▎▍▌▋▊▉".index(c) for c in bar)
    assert eighths == pytest.approx(share * width * 8, abs=0.51)


def test_plots_are_written_and_equal_facts_give_equal_bytes(tmp_path: Path) -> None:
    """PNG, SVG and PDF of both kinds of picture; SVG parses and names its curves."""
    pytest.importorskip("matplotlib")
    for kind in ("png", "svg", "pdf"):
        for name, draw in (
            ("schedule", lambda path: plot_schedule(learning_rate(), path)),
            ("activations", lambda path: plot_activations(activations(6, off=0.24), path)),
        ):
            first, second = tmp_path / f"{name}1.{kind}", tmp_path / f"{name}2.{kind}"
            draw(first)
            draw(second)
            assert first.read_bytes() == second.read_bytes()
            assert first.stat().st_size > 2000
            if kind == "svg":
                ElementTree.parse(first)


def test_plot_draws_the_numbers_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of the picture hold the curve's own values."""
    pytest.importorskip("matplotlib")
    from sparkling_cli.report import plots

    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    rate = learning_rate()
    plot_schedule(rate, tmp_path / "x.png")
    left = kept[0].axes[0]
    lines = {line.get_label(): line for line in left.get_lines()}
    assert list(lines["old entries"].get_ydata()) == list(rate.old)
    drawn = [(x, y) for x, y in lines["new entries"].get_xydata() if y == y]
    assert drawn == [(s, v) for s, v in zip(rate.steps, rate.new, strict=True) if v is not None]


def test_curves_of_several_expansions_have_names_and_a_legend_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by the step of its expansion; the legend covers no panel, so no line."""
    pytest.importorskip("matplotlib")
    from sparkling_cli.report import plots

    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    rate = learning_rate()
    first = rate.steps[1]
    earlier = tuple(None if step < first else 1e-3 for step in rate.steps)
    plot_schedule(rate.model_copy(update={"earlier": (earlier,)}), tmp_path / "x.png")
    figure = kept[0]
    names = [line.get_label() for line in figure.axes[0].get_lines()]
    assert names[:3] == ["old entries", f"new at step {first:,}", f"new at step {rate.expansion_step:,}"]
    figure.savefig(tmp_path / "x.png")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names[:3]
    assert not any(legend.get_window_extent().overlaps(panel.get_window_extent()) for panel in figure.axes)


def test_blocks_have_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks of the panels over blocks, few blocks too."""
    pytest.importorskip("matplotlib")
    from sparkling_cli.report import plots

    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    plot_activations(activations(3, off=0.24), tmp_path / "x.png")
    shown = [panel for panel in kept[0].axes if panel.get_visible()]
    assert shown
    for panel in shown:
        assert all(float(tick).is_integer() for tick in panel.get_xticks()), panel.get_title()


def test_an_unknown_kind_of_picture_is_refused(tmp_path: Path) -> None:
    """The message names the kinds that can be written."""
    with pytest.raises(OutputError) as caught:
        plot_schedule(learning_rate(), tmp_path / "x.gif")
    assert ".svg" in str(caught.value)
