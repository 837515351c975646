"""Measurements as rich tables: the worst first, readable at a glance in 80 columns.

Colours are rich's own business: none without a terminal or under NO_COLOR.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite, log
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparkling_cli.diagnostics.measurement import ActivationReport, Measurement, percent
from sparkling_cli.report.model import DEVIATION_LIMIT, Activations, Verdict

if TYPE_CHECKING:
    from sparkling_cli.diagnostics.symmetry import SymmetryReport
    from sparkling_cli.diagnostics.weights import TensorStat, WeightReport

#: Rows of a table of layers, unless everything is asked for.
ROWS = 12
_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {"good": "green", "note": "yellow", "attention": "red"}
_MARKS = {"good": "ok", "note": "note", "attention": "LOOK"}


def facts_line(facts: Mapping[str, Any]) -> Text:
    """What a checkpoint is, in a line."""
    words = [str(facts["format"])]
    if facts.get("model_type"):
        words.append(str(facts["model_type"]))
    words.append(f"{facts['parameters']:,} parameters in {', '.join(facts['dtypes'])}")
    if facts["state_tensors"]:
        words.append(f"{facts['optimizer'] or 'optimizer'} state in {facts['state_tensors']} tensors")
    else:
        words.append("no optimizer state")
    if facts.get("step") is not None:
        words.append(f"step {facts['step']}")
    return Text(", ".join(words), style="bold")


def activation_table(
    found: Activations | ActivationReport, *, rows: int | None = ROWS, limit: float = DEVIATION_LIMIT
) -> Table:
    """The r = RMS(y)/RMS(x) of linear layers before and after, the largest deviation first (Eq. 3)."""
    layers = sorted(_layers(found), key=lambda layer: -abs(layer[3]))
    shown = layers if rows is None else layers[:rows]
    caption = f"{len(shown)} of {len(layers)} linear layers, worst first" + _stream_caption(found)
    table = _table("r = RMS(y)/RMS(x) on the same tokens", caption)
    table.add_column("layer", overflow="fold")
    for title in ("RMS(x)", "RMS(y)", "r before", "r after", "change"):
        table.add_column(title, justify="right", no_wrap=True)
    prefix = _common_prefix([layer[0] for layer in layers])
    for name, before, after, change, x, y in shown:
        style = "red" if abs(change) > limit else "yellow" if abs(change) > limit / 2 else "green"
        shift = Text(percent(change, signed=True), style=style)
        table.add_row(
            escape(name.removeprefix(prefix)), number(x), number(y), number(before), number(after), shift
        )
    return table


def measurement_table(found: Measurement, *, rows: int | None = None) -> Table:
    """One model's linear layers, in the order of the forward pass, one row per kind of layer.

    Layers of one kind lie in one row with a sparkline of r over depth; ``rows`` limits the kinds.
    """
    kinds: dict[str, list[tuple[float, float, float]]] = {}
    for layer in found.layers:
        kinds.setdefault(_kind(layer.name), []).append((layer.x_rms, layer.y_rms, layer.ratio))
    table = _table("RMS of activations per kind of linear layer", _stream_line(found))
    table.add_column("layers", overflow="fold")
    table.add_column("n", justify="right")
    for title in ("RMS(x)", "RMS(y)", "r min", "r max"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("r by depth", no_wrap=True)
    prefix = _common_prefix(list(kinds))
    for kind, values in list(kinds.items())[:rows]:
        xs, ys, rs = zip(*values, strict=True)
        table.add_row(
            escape(kind.removeprefix(prefix)),
            str(len(values)),
            number(_mean(xs)),
            number(_mean(ys)),
            number(min(rs)),
            number(max(rs)),
            sparkline(rs),
        )
    return table


def weight_table(report: WeightReport, *, slots: Sequence[str] | None = None) -> Table:
    """RMS of weights and of each kind of optimizer state per role, with a sparkline over depth."""
    slots = report.slots if slots is None else slots
    roles: dict[str, dict[str, list[TensorStat]]] = {}
    for stat in report.stats:
        roles.setdefault(stat.role, {}).setdefault(stat.slot, []).append(stat)
    table = _table("RMS of weights" + (" and optimizer state" if slots else "") + " per role")
    table.add_column("role", overflow="fold")
    table.add_column("layers", justify="right")
    table.add_column("weights", justify="right", no_wrap=True)
    table.add_column("by depth", no_wrap=True)
    for slot in slots:
        table.add_column(slot, justify="right", no_wrap=True)
    prefix = _common_prefix(list(roles))
    for role, by_slot in roles.items():
        weights = by_slot.get("", [])
        first = weights or next(iter(by_slot.values()))
        table.add_row(
            escape(role.removeprefix(prefix).removesuffix(".weight")),
            str(len(first)) if first[0].layer is not None else "",
            _cell(weights),
            sparkline([stat.rms for stat in weights]) if len(weights) > 1 else "",
            *(_cell(by_slot.get(slot, [])) for slot in slots),
        )
    return table


def symmetry_table(found: SymmetryReport, *, rows: int | None = ROWS) -> Table:
    """How far new channels have moved from their sources, the most locked layers first."""
    layers = sorted(found.layers, key=lambda row: (-row.locked, row.distance))
    shown = layers if rows is None else layers[:rows]
    caption = (
        f"{len(shown)} of {len(layers)} layers and axes, most locked first\n"
        f"all new channels: distance {number(found.distance)}, cosine {found.cosine:.4f}, "
        f"{percent(found.locked)} still locked to their sources"
    )
    table = _table("new channels against the channels that they were copied from", caption)
    table.add_column("layer", justify="right")
    table.add_column("axis")
    for title in ("channels", "distance", "cosine", "locked"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in shown:
        style = "red" if row.locked > 0.5 else "yellow" if row.locked > 0.05 else "green"
        place = "-" if row.layer is None else str(row.layer)
        locked = Text(percent(row.locked), style=style)
        values = (str(row.channels), number(row.distance), f"{row.cosine:.4f}")
        table.add_row(place, escape(row.axis), *values, locked)
    return table


def verdict_lines(verdict: Verdict) -> list[Text]:
    """The headline and every finding, each marked in words as well as in colour."""
    lines = [Text(verdict.headline, style=f"bold {_STYLES[verdict.level]}")]
    for finding in verdict.findings:
        mark = Text(f"  {_MARKS[finding.level]:<5}", style=_STYLES[finding.level])
        lines.append(mark + Text(finding.text, style="default"))
    return lines


def verdict_line(report: ActivationReport) -> Text:
    """The verdict of a comparison, red when a layer is named."""
    bad = bool(report.offenders) or not report.layers
    return Text(report.verdict, style="bold red" if bad else "bold green")


def sparkline(values: Iterable[float]) -> str:
    """Values as bars of eight heights, by their logarithm where all are positive; `!` is not finite."""
    numbers = list(values)
    finite = [value for value in numbers if isfinite(value)]
    if not finite:
        return "!" * len(numbers)
    curved = all(value > 0 for value in finite)
    heights = [log(value) if curved else value for value in finite]
    low, high = min(heights), max(heights)
    # a span of less than 5% is flat: bars would show noise as a mountain
    flat = high - low < 0.05 * (1.0 if curved else max(abs(low), abs(high), 1e-300))
    bars = []
    for value in numbers:
        if not isfinite(value):
            bars.append("!")
            continue
        height = log(value) if curved else value
        place = 3 if flat else round((height - low) / (high - low) * (len(_BARS) - 1))
        bars.append(_BARS[place])
    return "".join(bars)


def number(value: float | None) -> str:
    """Four significant digits, short: ``1.204``, ``0.0312``, ``2.1e-05``."""
    if value is None or not isfinite(value):
        return "not finite"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.4g}"


def _table(title: str, caption: str = "") -> Table:
    return Table(
        title=title,
        caption=caption or None,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1),
    )


_Layer = tuple[str, float | None, float | None, float, float | None, float | None]


def _layers(found: Activations | ActivationReport) -> list[_Layer]:
    """(name, r before, r after, change, RMS(x) after, RMS(y) after) of every layer."""
    if isinstance(found, ActivationReport):
        return [(c.name, c.before, c.after, c.signed, c.x_after, c.y_after) for c in found.layers]
    return [
        (e.name, e.r_before, e.r_after, inf if e.deviation is None else e.deviation, e.x_after, e.y_after)
        for e in found.layers
    ]


def _stream_caption(found: Activations | ActivationReport) -> str:
    places: Sequence[tuple[float | None, float | None]]
    if isinstance(found, ActivationReport):
        places = [(place.before, place.after) for place in found.stream]
    else:
        places = [(place.before, place.after) for place in found.residual]
    if not places:
        return ""
    before, after = zip(*[(_known(a), _known(b)) for a, b in places], strict=True)
    return f"\nresidual stream by depth: {_ends(before)} before, {_ends(after)} after"


def _stream_line(found: Measurement) -> str:
    words = []
    if found.stream:
        words.append(f"residual stream by depth: {_ends([place.rms for place in found.stream])}")
    words.append(f"RMS of logits {number(found.logits_rms)}")
    if found.loss is not None:
        words.append(f"loss {found.loss:.4f} nats per token")
    return "; ".join(words)


def _ends(values: Sequence[float]) -> str:
    return f"{sparkline(values)} {number(values[0])} to {number(values[-1])}"


def _known(value: float | None) -> float:
    return inf if value is None else value


def _cell(stats: Sequence[TensorStat]) -> Text:
    """RMS over all layers of a role; what is not finite is said in red."""
    if not stats:
        return Text("-")
    bad = sum(stat.nan + stat.inf for stat in stats)
    if bad:
        return Text(f"{bad} not finite", style="bold red")
    entries = sum(stat.entries for stat in stats)
    squares = sum(stat.rms**2 * stat.entries for stat in stats)
    return Text(number((squares / entries) ** 0.5 if entries else 0.0))


def _common_prefix(names: Sequence[str]) -> str:
    """``model.``, where every numbered layer lies below it; nothing if the number is next to it."""
    paths = [name.split(".") for name in names]
    numbered = [path for path in paths if any(part.isdigit() or part == "*" for part in path)]
    first = {path[0] for path in numbered}
    if len(first) != 1 or any(path[1].isdigit() or path[1] == "*" for path in numbered):
        return ""
    return f"{first.pop()}."


def _kind(name: str) -> str:
    """The layer's name with the number of its block taken out."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _mean(values: Sequence[float]) -> float:
    return float((sum(value * value for value in values) / len(values)) ** 0.5)
