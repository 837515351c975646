"""Pictures for slides and papers, by matplotlib (extra ``plot``): PNG, SVG or PDF by the file's name.

Before and old are dashed with hollow circles, after and new solid with squares, as in the HTML report.
Equal facts give equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import MissingDependencyError, OutputError
from sparkling_cli.report.figures import kinds
from sparkling_cli.results.expansion import LearningRate
from sparkling_cli.results.measured import DEVIATION_LIMIT, Activations, LayerActivation, Measurement
from sparkling_cli.results.numbers import moved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".pdf")
OLD: dict[str, Any] = {"color": "#46617f", "linestyle": "--", "marker": "o", "markerfacecolor": "white"}
NEW: dict[str, Any] = {"color": "#b4450f", "linestyle": "-", "marker": "s"}
#: Lines of earlier expansions, the oldest first.
EARLIER = (":", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKS_UP_TO = 40


def plot_schedule(rate: LearningRate, path: Path) -> None:
    """Learning rates of old and new entries over the run, like the paper's Fig. 8.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written, or its kind is not known.
    """
    figure, (left, right) = _figure(path, 1, 2, (9.0, 3.4))
    plain = {"marker": None}
    left.plot(rate.steps, rate.old, label="old entries", **{**OLD, **plain})
    for curve, linestyle in zip(rate.earlier, cycle(EARLIER), strict=False):
        label = f"new at step {_start(rate, curve):,}"
        _line(left, rate.steps, curve, {**NEW, **plain, "linestyle": linestyle, "label": label})
    label = f"new at step {rate.expansion_step:,}" if rate.earlier else "new entries"
    _line(left, rate.steps, rate.new, {**NEW, **plain, "label": label})
    left.axvline(rate.expansion_step, color="0.4", linewidth=0.8, linestyle=":")
    left.set(xlabel="step", ylabel="learning rate", ylim=(0, None), title=f"{rate.baseline}, re-warmed")
    # beside the curves: inside the panel some schedule would always pass below it
    figure.legend(loc="outside lower left", ncols=4, frameon=False)
    ratios = [
        new / old if new is not None and old > 0 else None
        for old, new in zip(rate.old, rate.new, strict=True)
    ]
    _line(right, rate.steps, ratios, {**NEW, **plain})
    right.set(xlabel="step", ylabel="new / old", title=f"rho = {rate.rho:g}, {rate.rewarmup_steps:,} steps")
    _save(figure, path)


def plot_activations(measured: Activations, path: Path) -> None:
    """The residual stream, and r of every function of the blocks and kind of linear layer, before and after.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written, or its kind is not known.
    """
    count = bool(measured.residual) + len(kinds(measured.functions)) + len(kinds(measured.layers))
    figure, flat = _panels(path, count)
    if measured.residual:
        panel = flat.pop(0)
        points = [p for p in measured.residual if p.layer is not None]
        _pair(panel, [p.layer for p in points], [p.before for p in points], [p.after for p in points])
        panel.set(title="residual stream", ylabel="RMS")
        _whole_blocks(panel)
        panel.legend(frameon=False, fontsize=8)
    for entries, label in ((measured.functions, "RMS(f)/RMS(h)"), (measured.layers, "RMS(y)/RMS(x)")):
        for kind in kinds(entries):
            chosen = [e for e in entries if e.role == kind and e.layer is not None]
            _kind(flat.pop(0), kind, chosen, label, marked=entries is measured.functions)
    _save(figure, path)


def plot_measurement(measured: Measurement, path: Path) -> None:
    """One model alone: the residual stream, and r of every function and kind of linear layer over the blocks.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written, or its kind is not known.
    """
    from sparkling_cli.diagnostics.measurement import split_name

    found: dict[tuple[str, str], list[tuple[int, float | None]]] = {}
    series = [("RMS", "residual stream", place.name, place.rms) for place in measured.stream]
    series += [("RMS(f)/RMS(h)", "", function.name, function.r) for function in measured.functions]
    series += [("RMS(y)/RMS(x)", "", layer.name, layer.r) for layer in measured.layers]
    for label, title, name, value in series:
        block, kind = split_name(name)
        if block is not None:
            found.setdefault((label, title or kind), []).append((block, value))
    figure, flat = _panels(path, len(found))
    for panel, ((label, title), points) in zip(flat, found.items(), strict=True):
        marks = {"markersize": 3} if len(points) <= MARKS_UP_TO else {"marker": None}
        _line(panel, [block for block, _ in points], [value for _, value in points], {**NEW, **marks})
        panel.set(title=title, ylabel=label, xlabel="block")
        _whole_blocks(panel)
    _save(figure, path)


def _panels(path: Path, count: int) -> tuple[Figure, list[Any]]:
    """A figure with so many panels, three in a row."""
    columns = min(3, max(count, 1))
    rows = max(1, ceil(count / columns))
    figure, axes = _figure(path, rows, columns, (3.6 * columns, 2.5 * rows))
    for panel in axes[count:]:
        panel.set_visible(False)
    return figure, list(axes[:count])


def _kind(panel: Axes, kind: str, entries: Sequence[LayerActivation], label: str, *, marked: bool) -> None:
    blocks = [e.layer for e in entries]
    _pair(panel, blocks, [e.r_before for e in entries], [e.r_after for e in entries])
    for entry in entries if marked else ():
        if entry.moved > DEVIATION_LIMIT and entry.r_after is not None:
            panel.annotate(
                moved(entry.deviation),
                (entry.layer or 0, entry.r_after),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
                fontsize=7,
            )
    panel.set(title=kind, ylabel=label, xlabel="block")
    _whole_blocks(panel)


def _whole_blocks(panel: Axes) -> None:
    """Ticks at whole numbers: there is no block 0.5."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _start(rate: LearningRate, curve: Sequence[float | None]) -> int:
    """The first step of a curve: that of its expansion."""
    return next((step for step, value in zip(rate.steps, curve, strict=True) if value is not None), 0)


def _pair(
    panel: Axes, x: Sequence[int | None], before: Sequence[float | None], after: Sequence[float | None]
) -> None:
    marks = {} if len(x) <= MARKS_UP_TO else {"marker": None}
    _line(panel, x, before, {**OLD, **marks, "label": "before", "markersize": 6})
    _line(panel, x, after, {**NEW, **marks, "label": "after", "markersize": 3})


def _line(panel: Axes, x: Sequence[Any], y: Sequence[float | None], style: dict[str, Any]) -> None:
    panel.plot(x, [float("nan") if v is None else v for v in y], linewidth=1.4, **style)


def _figure(path: Path, rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    check_kind(path)
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "plots need matplotlib", hint="pip install '.[plot]' in the clone, or pip install matplotlib"
        ) from None
    with rc_context({"font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(True, axis="y", color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, list(panels.flat)


def check_kind(path: Path) -> None:
    """The file's name says a kind that can be written.

    Raises:
        OutputError: it does not.
    """
    if path.suffix.lower() not in KINDS:
        raise OutputError(
            f"--plot {path}: cannot write {path.suffix or 'a file without ending'}",
            hint=f"end the name in {', '.join(KINDS)}",
        )


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
