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
from sparkling_cli.report.model import DEVIATION_LIMIT, Activations, LayerActivation, LearningRate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparkling_cli.diagnostics.measurement import Measurement

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
    """Ratios r = RMS(y)/RMS(x) of every role over the blocks, and the residual stream, before and after.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written, or its kind is not known.
    """
    roles = list(dict.fromkeys(e.role for e in measured.layers if e.layer is not None))
    panels = len(roles) + bool(measured.residual)
    columns = min(3, max(panels, 1))
    rows = max(1, ceil(panels / columns))
    figure, axes = _figure(path, rows, columns, (3.6 * columns, 2.5 * rows))
    flat: list[Any] = list(axes)
    if measured.residual:
        panel = flat.pop(0)
        x = [p.layer for p in measured.residual]
        _pair(panel, x, [p.before for p in measured.residual], [p.after for p in measured.residual])
        panel.set(title="residual stream", ylabel="RMS")
        _whole_blocks(panel)
        panel.legend(frameon=False, fontsize=8)
    for role in roles:
        _role(flat.pop(0), role, [e for e in measured.layers if e.role == role and e.layer is not None])
    for panel in flat:
        panel.set_visible(False)
    _save(figure, path)


def plot_measurement(measured: Measurement, path: Path) -> None:
    """One model alone: r of every kind of linear layer over the blocks, and the residual stream.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the file cannot be written, or its kind is not known.
    """
    from sparkling_cli.report.convert import finite, split_name

    kinds: dict[str, list[tuple[int, float | None]]] = {}
    for place in measured.stream:
        block, _ = split_name(place.name)
        if block is not None:
            kinds.setdefault("residual stream", []).append((block, finite(place.rms)))
    for layer in measured.layers:
        block, role = split_name(layer.name)
        if block is not None:
            kinds.setdefault(role, []).append((block, finite(layer.ratio)))
    columns = min(3, max(len(kinds), 1))
    rows = max(1, ceil(len(kinds) / columns))
    figure, axes = _figure(path, rows, columns, (3.6 * columns, 2.5 * rows))
    for panel in axes[len(kinds) :]:
        panel.set_visible(False)
    for panel, (kind, points) in zip(axes, kinds.items(), strict=False):
        marks = {"markersize": 3} if len(points) <= MARKS_UP_TO else {"marker": None}
        _line(panel, [block for block, _ in points], [value for _, value in points], {**NEW, **marks})
        label = "RMS" if kind == "residual stream" else "RMS(y)/RMS(x)"
        panel.set(title=kind, ylabel=label, xlabel="block")
        _whole_blocks(panel)
    _save(figure, path)


def _role(panel: Axes, role: str, entries: Sequence[LayerActivation]) -> None:
    blocks = [e.layer for e in entries]
    _pair(panel, blocks, [e.r_before for e in entries], [e.r_after for e in entries])
    for entry in entries:
        if entry.moved > DEVIATION_LIMIT and entry.r_after is not None and entry.deviation is not None:
            panel.annotate(
                f"{entry.deviation:+.0%}",
                (entry.layer or 0, entry.r_after),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
                fontsize=7,
            )
    panel.set(title=role, ylabel="RMS(y)/RMS(x)", xlabel="block")
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
