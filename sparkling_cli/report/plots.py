"""Pictures for slides and papers, by matplotlib (extra ``plot``): PNG, SVG or PDF by the file's name.

They are the charts of the HTML report (``figures``), drawn by another library: before and old are dashed with
hollow circles, after and new solid with squares. Equal facts give equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import MissingDependencyError, OutputError
from sparkling_cli.report import figures
from sparkling_cli.report.charts import MARKS_UP_TO, Chart
from sparkling_cli.results.expansion import LearningRate
from sparkling_cli.results.measured import Activations, Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".pdf")
_NEW = {"color": "#b4450f", "marker": "s", "markersize": 3}
#: How a series of a chart is drawn, by its kind.
STYLES: dict[str, dict[str, Any]] = {
    "before": {
        "color": "#46617f", "linestyle": "--", "marker": "o", "markerfacecolor": "white", "markersize": 6
    },
    "after": {**_NEW, "linestyle": "-"},
    "earlier": _NEW,
}  # fmt: skip
#: Lines of earlier expansions, the oldest first.
EARLIER = (":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def plot_schedule(rate: LearningRate, path: Path) -> None:
    """Learning rates of old and new entries over the run, like the paper's Fig. 8, and their ratio.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written, or its kind is not known.
    """
    ratio = figures.learning_rate_ratio(rate)
    charts = [(f"{rate.baseline}, re-warmed", figures.learning_rate(rate))]
    if ratio is not None:
        charts.append((f"rho = {rate.rho:g}, {rate.rewarmup_steps:,} steps", ratio))
    figure, panels = _draw(path, charts, columns=2, size=(4.5, 3.4))
    # beside the curves: inside the panel some schedule would always pass below it
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False)
    _save(figure, path)


def plot_activations(measured: Activations, path: Path) -> None:
    """The residual stream, and r of every function of the blocks and kind of linear layer, before and after.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written, or its kind is not known.
    """
    residual = figures.residual(measured)
    charts = [] if residual is None else [("residual stream", residual)]
    for entries, ratio in ((measured.functions, "RMS(f)/RMS(h)"), (measured.layers, "RMS(y)/RMS(x)")):
        named = entries is measured.functions or not measured.functions
        charts += [(kind, chart) for kind, chart, _ in figures.ratios(entries, ratio, named=named)]
    figure, panels = _draw(path, charts)
    if panels:
        panels[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_measurement(measured: Measurement, path: Path) -> None:
    """One model alone: the residual stream, and r of every function and kind of linear layer over the blocks.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written, or its kind is not known.
    """
    figure, _ = _draw(path, list(figures.of_one_model(measured)))
    _save(figure, path)


def _draw(
    path: Path,
    charts: Sequence[tuple[str, Chart]],
    *,
    columns: int = 3,
    size: tuple[float, float] = (3.6, 2.5),
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per chart, each under its name.

    Args:
        path: of the file, which says its kind.
        charts: with their names.
        columns: panels beside each other, at most.
        size: of one panel, in inches.
    """
    if path.suffix.lower() not in KINDS:
        raise OutputError(
            f"--plot {path}: cannot write {path.suffix or 'a file without ending'}",
            hint=f"end the name in {', '.join(KINDS)}",
        )
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise MissingDependencyError(
            "plots need matplotlib", hint="pip install '.[plot]' in the clone, or pip install matplotlib"
        ) from None
    columns = min(columns, max(len(charts), 1))
    rows = max(1, ceil(len(charts) / columns))
    with rc_context({"font.size": 9}):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        panels = [*figure.subplots(rows, columns, squeeze=False).flat]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(True, axis="y", color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    for panel in panels[len(charts) :]:
        panel.set_visible(False)
    for panel, (name, chart) in zip(panels, charts, strict=False):
        lines = cycle(EARLIER)
        for series in chart.series:
            style = STYLES[series.kind] if series.kind != "earlier" else {**_NEW, "linestyle": next(lines)}
            style = style if len(series.points) <= MARKS_UP_TO else {**style, "marker": None}
            x, y = zip(*series.points, strict=True) if series.points else ((), ())
            panel.plot(x, y, linewidth=1.4, label=series.name, **style)
        for note in chart.notes:
            place: dict[str, Any] = {
                "textcoords": "offset points",
                "xytext": (0, 6),
                "ha": "center",
                "fontsize": 7,
            }
            panel.annotate(note.words, (note.x, note.y), **place)
        if chart.vertical is not None:
            panel.axvline(chart.vertical[0], color="0.4", linewidth=0.8, linestyle=":")
        if chart.log:
            panel.set_yscale("log")
        elif chart.zero:
            panel.set_ylim(0, None)
        if chart.whole_x:  # there is no block 0.5
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.set(title=name, xlabel=chart.x_label, ylabel=chart.y_label)
    return figure, panels[: len(charts)]


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import rc_context

    kind = path.suffix.lower()
    # no date and no random ids: equal facts give equal bytes
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[kind]
    try:
        with rc_context({"svg.hashsalt": "sparkling"}):
            figure.savefig(path, dpi=160, metadata=metadata)
    except OSError as error:
        raise OutputError(f"cannot write the plot {path}: {error.strerror or error}") from None
