"""Which numbers a chart shows: from the report's facts to charts, without any drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from markupsafe import Markup

from sparkling_cli.diagnostics.measurement import split_name
from sparkling_cli.report import charts
from sparkling_cli.report.charts import Bar, Chart, Note, Part, Series
from sparkling_cli.results.expansion import AxisChange, Compute, LearningRate, OptimizerSummary, Size
from sparkling_cli.results.measured import Activations, LayerActivation, Measurement
from sparkling_cli.results.numbers import count, moved, percent, significant

#: Offenders named in one chart.
NAMED_AT_MOST = 3


def residual(measured: Activations) -> Chart | None:
    """RMS of the residual stream behind every block; None without measurements."""
    points = [point for point in measured.residual if point.layer is not None]
    if not points:
        return None
    values = [v for p in points for v in (p.before, p.after) if v is not None and v > 0]
    spread = max(values) / min(values) if values else 1.0
    return Chart(
        title="RMS of the residual stream behind each layer, before and after",
        description=f"{len(points)} layers; before {_ends([p.before for p in points])}, "
        f"after {_ends([p.after for p in points])}.",
        series=_both((p.layer, p.before, p.after) for p in points),
        x_label="layer",
        y_label="RMS",
        log=spread > 30,
    )


def divergence(measured: Activations) -> Chart | None:
    """How far the residual stream behind every block differs; None where it does not."""
    points = measured.diverging
    if not points:
        return None
    return Chart(
        title="How far the residual stream behind each layer differs",
        description=f"{len(points)} layers; {_ends([p.difference for p in points])} of its RMS before.",
        series=(Series("difference", "after", _finite((p.layer, p.difference) for p in points)),),
        x_label="layer",
        y_label="RMS of the change / RMS before",
        zero=True,
    )


def ratios(
    entries: Sequence[LayerActivation], ratio: str, *, named: bool
) -> Iterator[tuple[str, Chart, str]]:
    """Per kind of function or linear layer: its name, its ratio over the layers, how far it moved in words.

    Where there are several of a kind in one layer (experts), the one that moved most is drawn.

    Args:
        entries: functions, or linear layers.
        ratio: the label of the ratio.
        named: whether those that moved by more than the limit are marked.
    """
    for kind in dict.fromkeys(entry.role for entry in entries if entry.layer is not None):
        worst: dict[int, LayerActivation] = {}
        for entry in entries:
            if entry.role != kind or entry.layer is None:
                continue
            if entry.layer not in worst or entry.moved > worst[entry.layer].moved:
                worst[entry.layer] = entry
        chosen = [worst[layer] for layer in sorted(worst)]
        farthest = sorted(chosen, key=lambda e: -e.moved)
        words = f"r moved by at most {_share(farthest[0])}"
        marked = [e for e in farthest if e.far()][: NAMED_AT_MOST if named else 0]
        chart = Chart(
            title=f"{kind}: {ratio} per layer, before and after",
            description=f"{len(chosen)} layers; {words}.",
            series=_both((e.layer, e.r_before, e.r_after) for e in chosen),
            x_label="layer",
            y_label=ratio,
            notes=tuple(
                Note(float(e.layer or 0), e.r_after, moved(e.deviation, e.r_before, e.r_after))
                for e in marked
                if e.r_after is not None
            ),
        )
        yield kind, chart, words


def of_one_model(measured: Measurement) -> Iterator[tuple[str, Chart]]:
    """One model alone: the residual stream, and r per kind of function and linear layer, with their names."""
    found: dict[tuple[str, str], list[tuple[int | None, float | None]]] = {}
    series = [("RMS", "residual stream", place.name, place.rms) for place in measured.stream]
    series += [("RMS(f)/RMS(h)", "", function.name, function.r) for function in measured.functions]
    series += [("RMS(y)/RMS(x)", "", layer.name, layer.r) for layer in measured.layers]
    for label, title, name, value in series:
        block, kind = split_name(name)
        if block is not None:
            found.setdefault((label, title or kind), []).append((block, value))
    for (label, kind), points in found.items():
        lines = (Series(kind, "after", _finite(points)),)
        yield kind, Chart(f"{kind}: {label} per layer", f"{len(points)} layers.", lines, "layer", label)


def _both(points: Iterable[tuple[int | None, float | None, float | None]]) -> tuple[Series, Series]:
    """A number over the blocks, before and after."""
    rows = list(points)
    before = Series("before", "before", _finite((block, value) for block, value, _ in rows))
    return before, Series("after", "after", _finite((block, value) for block, _, value in rows))


def _finite(points: Iterable[tuple[int | None, float | None]]) -> tuple[tuple[float, float], ...]:
    """What can be drawn; a value that is not finite is a gap."""
    return tuple((float(x), y) for x, y in points if x is not None and y is not None)


def _ends(values: list[float | None]) -> str:
    return f"from {significant(values[0], 4)} to {significant(values[-1], 4)}"


def _share(entry: LayerActivation) -> str:
    """How far r moved, for a caption."""
    return "rounding" if entry.moved < 5e-5 else percent(entry.moved)


def learning_rate(rate: LearningRate) -> Chart:
    """Both curves over the whole run, like the paper's Fig. 8."""
    old = tuple((float(s), v) for s, v in zip(rate.steps, rate.old, strict=True))
    new = tuple((float(s), v) for s, v in zip(rate.steps, rate.new, strict=True) if v is not None)
    peak = max(new, key=lambda point: point[1], default=None)
    return Chart(
        title="Learning rate of old and new entries over the run",
        description=f"Old entries: {rate.baseline}. New entries from step {rate.expansion_step}: up to "
        f"{significant(rate.peak_new, 4)}, then down to {significant(rate.minimum, 4)} at step "
        f"{rate.total_steps}.",
        series=(
            Series("old entries", "before", old),
            *(
                Series(_born(rate, curve), "earlier", _finite(zip(rate.steps, curve, strict=True)))
                for curve in rate.earlier
            ),
            Series(_born(rate, rate.new) if rate.earlier else "new entries", "after", new),
        ),
        x_label="step",
        y_label="learning rate",
        notes=(Note(peak[0], peak[1], f"peak {significant(peak[1])}"),) if peak else (),
        vertical=(float(rate.expansion_step), f"expansion, step {rate.expansion_step:,}"),
        zero=True,
    )


def _born(rate: LearningRate, curve: Sequence[float | None]) -> str:
    """A curve by the step of its expansion, which is its first."""
    start = next((step for step, value in zip(rate.steps, curve, strict=True) if value is not None), 0)
    return f"new at step {start:,}"


def learning_rate_ratio(rate: LearningRate) -> Chart | None:
    """New over old from the expansion on, where both are above zero."""
    points = tuple(
        (float(step), new / old)
        for step, old, new in zip(rate.steps, rate.old, rate.new, strict=True)
        if new is not None and old > 0
    )
    if len(points) < 2:
        return None
    return Chart(
        title="Learning rate of new entries over that of old ones",
        description=f"From {significant(points[0][1])} at the expansion to {significant(points[-1][1])} at "
        "the end.",
        series=(Series("new / old", "after", points),),
        x_label="step",
        y_label="new / old",
    )


def axes(grown: Sequence[AxisChange]) -> Callable[[float, str], Markup]:
    """A bar per axis, relative to its size before: the entries that were there, and the new ones."""
    rows = []
    for axis in grown:
        new = axis.after - axis.before
        parts = (
            Part(1.0, "old", f"{axis.before:,} kept"),
            Part(new / axis.before, "new", f"{new:,} new"),
        )
        words = f"{axis.before:,} → {axis.after:,}  (×{significant(axis.factor)})"
        rows.append(Bar(axis.axis, parts, words))
    names = ", ".join(f"{axis.axis} from {axis.before} to {axis.after}" for axis in grown)
    return partial(charts.bars, "Axes that grew", f"Widened: {names}.", rows)


def optimizer(summary: OptimizerSummary) -> Callable[[float, str], Markup]:
    """Bars of kept and new entries per kind of state."""
    kind = {"copy": "copied", "drop": "zero"}.get(summary.treatment, "zero")
    rows = []
    for slot in summary.slots:
        fresh = slot.entries - slot.kept
        parts = (
            Part(float(slot.kept), "old", f"{count(slot.kept)} kept"),
            Part(float(fresh), "empty" if kind == "zero" else "new", f"{count(fresh)} {kind}"),
        )
        rows.append(Bar(slot.slot, parts, f"{count(slot.entries)} entries"))
    description = "; ".join(f"{s.slot}: {s.kept} of {s.entries} entries kept" for s in summary.slots)
    return partial(charts.bars, "Optimizer state, kept and new entries", description, rows)


def compute(facts: Compute, before: Size, after: Size) -> Callable[[float, str], Markup]:
    """Bars of training compute: from scratch and progressive, relative to from scratch."""
    wide = after.active or after.parameters
    small = before.active or before.parameters
    first = small / wide * facts.expansion_step / facts.total_steps
    second = 1 - facts.expansion_step / facts.total_steps
    rows = [
        Bar("wide from scratch", (Part(1.0, "large", f"{count(wide)} active, all steps"),), "100%"),
        Bar(
            "this run",
            (
                Part(first, "small", f"{count(small)} active"),
                Part(second, "large", f"{count(wide)} active"),
            ),
            f"{first + second:.1%}",
        ),
    ]
    description = f"This run takes {first + second:.1%} of the compute of the wide model from scratch."
    return partial(charts.bars, "Training compute", description, rows)
