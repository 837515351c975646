"""Measurements as rich tables: the worst first, readable at a glance in 80 columns.

Colours are rich's own business: none without a terminal or under NO_COLOR.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparkling_cli.layout.names import skeleton
from sparkling_cli.report.sparkline import sparkline
from sparkling_cli.report.wrap import wrapped
from sparkling_cli.results.numbers import ROUNDING, nbytes, percent, significant

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

    from sparkling_cli.results.account import Account
    from sparkling_cli.results.base import Verdict
    from sparkling_cli.results.measured import (
        Activations,
        Inspection,
        LayerActivation,
        LayerStat,
        Measurement,
        Symmetry,
        TensorStat,
        Weights,
    )

#: Rows of a table of layers, unless everything is asked for.
ROWS = 12
#: Of linear layers behind a table of functions: they are not what is judged.
FEW = 5
_DEPTH = "residual stream by depth: "
_STYLES = {"good": "green", "note": "yellow", "attention": "red"}
_MARKS = {"good": "ok", "note": "note", "attention": "LOOK"}


def facts_line(found: Inspection) -> Text:
    """What a checkpoint is, in a line."""
    words = [found.format]
    if found.model_type:
        words.append(found.model_type)
    words.append(f"{found.parameters:,} parameters in {', '.join(found.dtypes)}")
    if found.state_tensors:
        words.append(f"{found.optimizer or 'optimizer'} state in {found.state_tensors} tensors")
    else:
        words.append("no optimizer state")
    if found.step is not None:
        words.append(f"step {found.step}")
    return Text(", ".join(words), style="bold")


def change_tables(found: Activations, *, rows: int | None = ROWS) -> list[Table]:
    """What two models do on the same tokens: functions of the blocks first, then linear layers.

    Args:
        found: the comparison.
        rows: at most, and what is unchanged to rounding in one; None for everything.
    """
    tables = []
    if found.functions:
        tables.append(
            _ratios(
                "r = RMS(f(Norm h))/RMS(h) of what blocks add",
                ("~function", ">RMS(h)", ">RMS(f)"),
                sorted(found.functions, key=lambda entry: -entry.moved),
                rows,
                f"functions of blocks, worst first; RMS(h), RMS(f): after{_stream_caption(found)}",
                judged=True,
            )
        )
    if found.layers and (rows is None or not found.functions or found.worst(1)[0].far()):
        tables.append(
            _ratios(
                "r = RMS(y)/RMS(x) of linear layers on the same tokens",
                ("~layer", ">RMS(x)", ">RMS(y)"),
                found.worst(),
                FEW if rows is not None and found.functions else rows,
                "linear layers, worst first; RMS(x), RMS(y): after"
                + ("" if found.functions else _stream_caption(found)),
                judged=not found.functions,
            )
        )
    return tables


def _ratios(
    title: str,
    columns: tuple[str, str, str],
    entries: Sequence[LayerActivation],
    rows: int | None,
    caption: str,
    *,
    judged: bool,
) -> Table:
    """Ratios before and after, the worst first; coloured where the verdict is about them."""
    changed = [entry for entry in entries if rows is None or entry.moved >= ROUNDING]
    shown = changed[:rows]
    titles = (*columns, ">r before", ">r after", ">change")
    counted = f"{len(shown)} of {len(entries)} {caption}" if shown else caption.partition("\n")[2]
    table = table_of(*titles, title=title, caption=counted)
    prefix = _common_prefix([entry.name for entry in entries])
    for entry in shown:
        style = ("red" if entry.far() else "yellow" if entry.far(0.5) else "green") if judged else "default"
        change = "from 0" if entry.r_before == 0 and entry.moved else percent(entry.deviation, signed=True)
        table.add_row(
            escape(entry.name.removeprefix(prefix)),
            significant(entry.x_after, 4),
            significant(entry.y_after, 4),
            significant(entry.r_before, 4),
            significant(entry.r_after, 4),
            Text(change, style=style),
        )
    if len(changed) < len(entries):
        count = len(entries) - len(changed)
        name = f"all {count}" if not changed else f"{count} others"
        table.add_row(name, "", "", "", "", Text("unchanged", style="green" if judged else "default"))
    return table


def measurement_table(found: Measurement) -> Table:
    """One model's functions and linear layers, one row per kind, with a sparkline of r over depth."""
    kinds: dict[str, list[LayerStat]] = {}
    for layer in (*found.functions, *found.layers):
        kinds.setdefault(skeleton(layer.name), []).append(layer)
    functions = {skeleton(function.name) for function in found.functions}
    table = table_of(
        *("~layers", ">n", ">RMS(x)", ">RMS(y)", ">r min", ">r max", "|r by depth"),
        title="RMS of activations per function of a block and kind of linear layer",
        caption=_stream_line(found),
    )
    prefix = _common_prefix(list(kinds))
    for kind, layers in kinds.items():
        ratios = [layer.r for layer in layers]
        known = [r for r in ratios if r is not None]
        table.add_row(
            Text(kind.removeprefix(prefix), style="bold" if kind in functions else "default"),
            str(len(layers)),
            significant(_mean([layer.x_rms for layer in layers]), 4),
            significant(_mean([layer.y_rms for layer in layers]), 4),
            significant(min(known, default=None), 4),
            significant(max(known, default=None), 4),
            sparkline(ratios, logarithmic=True),
        )
    return table


def weight_table(report: Weights) -> Table:
    """RMS of weights and of each kind of optimizer state per name, with a sparkline over depth."""
    slots = report.slots
    names: dict[str, dict[str, list[TensorStat]]] = {}
    for stat in report.tensors:
        names.setdefault(stat.role, {}).setdefault(stat.slot, []).append(stat)
    titles = ("~tensors", ">layers", ">weights", "|by depth", *(f">{slot}" for slot in slots))
    table = table_of(*titles, title="RMS of weights" + (" and optimizer state" if slots else ""))
    prefix = _common_prefix(list(names))
    for name, by_slot in names.items():
        weights = by_slot.get("", [])
        first = weights or next(iter(by_slot.values()))
        table.add_row(
            escape(name.removeprefix(prefix).removesuffix(".weight")),
            str(len(first)) if first[0].layer is not None else "",
            _cell(weights),
            sparkline([stat.rms for stat in weights], logarithmic=True) if len(weights) > 1 else "",
            *(_cell(by_slot.get(slot, [])) for slot in slots),
        )
    return table


def symmetry_table(found: Symmetry, *, rows: int | None = ROWS) -> Table:
    """How far new channels have moved from their sources, the most locked layers first."""
    layers = sorted(found.layers, key=lambda row: (-(row.locked or 0.0), row.distance or 0.0))
    shown = layers if rows is None else layers[:rows]
    caption = (
        f"{len(shown)} of {len(layers)} layers and axes, most locked first\n"
        f"all new channels: distance {significant(found.distance, 4)}, "
        f"cosine {significant(found.cosine, 4)}, {percent(found.locked)} still locked to their sources"
    )
    title = "new channels against the channels that they were copied from"
    columns = (">layer", "axis", ">channels", ">distance", ">cosine", ">locked")
    table = table_of(*columns, title=title, caption=caption)
    for row in shown:
        share = row.locked or 0.0
        style = "red" if share > 0.5 else "yellow" if share > 0.05 else "green"
        place = "-" if row.layer is None else str(row.layer)
        values = (str(row.channels), significant(row.distance, 4), significant(row.cosine, 4))
        table.add_row(place, escape(row.axis), *values, Text(percent(row.locked), style=style))
    return table


def account_table(account: Account, *, everything: bool = False) -> Table:
    """Every tensor of the source by kind and by what becomes of it; the last row is the source's sum."""
    caption = "every tensor of every file of the source"
    if account.entries and not everything:
        caption += "; --verbose lists those that are neither weights nor state"
    table = table_of("tensors", "become", ">count", ">before", ">after", title="account", caption=caption)
    for line in account.lines:
        sizes = (f"{line.tensors:,}", nbytes(line.bytes_before), nbytes(line.bytes_after))
        table.add_row(line.kind.value, line.fate.value, *sizes)
    table.add_section()
    table.add_row(
        "all", "", f"{account.tensors:,}", nbytes(account.bytes_before), nbytes(account.bytes_after)
    )
    for entry in account.entries if everything else ():
        shape = "x".join(map(str, entry.shape)) or "scalar"
        table.add_row(escape(entry.name), entry.fate.value, "1", f"{entry.dtype} {shape}", "")
    return table


class _Findings:
    """Findings behind their marks, as wide as the screen; printed as they are (``soft_wrap``)."""

    def __init__(self, verdict: Verdict) -> None:
        self._findings = verdict.findings

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        room = max((len(_MARKS[finding.level]) for finding in self._findings), default=0)
        for finding in self._findings:
            mark, indent = _MARKS[finding.level], " " * (room + 3)
            lines = wrapped(f"{indent}{finding.text}", options.max_width, indent=indent)
            yield Text.assemble((f"  {mark:<{room}} ", _STYLES[finding.level]), lines.removeprefix(indent))


def verdict_lines(verdict: Verdict) -> list[Text | _Findings]:
    """The headline and every finding, each marked in words as well as in colour."""
    return [Text(verdict.headline, style=f"bold {_STYLES[verdict.level]}"), _Findings(verdict)]


def table_of(*columns: str, title: str = "", caption: str = "") -> Table:
    """A table without lines.

    Args:
        columns: their titles; behind ``>`` of numbers and behind ``|`` of drawings, which are never broken,
            behind ``~`` of names, which are not cut.
        title: above it.
        caption: below it.
    """
    table = Table(
        title=title or None,
        caption=caption or None,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1),
        min_width=min(80, max(map(len, caption.splitlines()), default=0)),  # a line of it stays one
    )
    for column in columns:
        mark = column[:1]
        table.add_column(
            column.lstrip(">|~"),
            justify="right" if mark == ">" else "left",
            no_wrap=mark in (">", "|"),
            overflow="fold" if mark == "~" else "ellipsis",
        )
    return table


def _stream_caption(found: Activations) -> str:
    if not found.residual:
        return ""
    before, after = ([getattr(p, when) for p in found.residual] for when in ("before", "after"))
    ends = f"{_ends(before, scale=after)} before\n{' ' * len(_DEPTH)}{_ends(after, scale=before)} after"
    apart = [point.difference for point in found.diverging]
    if apart:
        line = sparkline([0.0, *apart])[1:]
        first, last = percent(apart[0]), percent(apart[-1])
        ends += f"\n{'differs by: ':>{len(_DEPTH)}}{line} first layer {first}, last {last}"
    return f"\n{_DEPTH}{ends}"


def _stream_line(found: Measurement) -> str:
    words = []
    if found.stream:
        words.append(f"{_DEPTH}{_ends([place.rms for place in found.stream])}")
    words.append(f"RMS of logits {significant(found.logits_rms, 4)}")
    if found.loss is not None:
        words.append(f"loss {found.loss:.4f} nats per token")
    return "; ".join(words)


def _ends(values: Sequence[float | None], *, scale: Sequence[float | None] = ()) -> str:
    line = sparkline(values, logarithmic=True, scale=scale)
    return f"{line} {significant(values[0], 4)} to {significant(values[-1], 4)}"


def _cell(stats: Sequence[TensorStat]) -> Text:
    """RMS over all layers of a name; what is not finite is marked in red."""
    if not stats:
        return Text("-")
    bad = sum(stat.nan + stat.inf for stat in stats)
    if bad:
        return Text(f"{bad} not finite", style="bold red")
    entries = sum(stat.entries for stat in stats)
    squares = sum((stat.rms or 0.0) ** 2 * stat.entries for stat in stats)
    return Text(significant((squares / entries) ** 0.5 if entries else 0.0, 4))


def _common_prefix(names: Sequence[str]) -> str:
    """``model.``, where every numbered layer lies below it; nothing if the number is next to it."""
    paths = [name.split(".") for name in names]
    numbered = [path for path in paths if any(part.isdigit() or part == "*" for part in path)]
    first = {path[0] for path in numbered}
    if len(first) != 1 or any(path[1].isdigit() or path[1] == "*" for path in numbered):
        return ""
    return f"{first.pop()}."


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return (sum(value * value for value in known) / len(known)) ** 0.5 if known else None
