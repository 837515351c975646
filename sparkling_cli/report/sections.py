"""The sections of the report page, one function each: facts in, HTML out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape

from sparkling_cli.compute.quantity import format_bytes, format_count
from sparkling_cli.report import charts, figures
from sparkling_cli.report.drawing import BLOCKS_AT_MOST, axes_drawing, tensor_block
from sparkling_cli.report.model import DEVIATION_LIMIT, Activations, LayerActivation, ReportData
from sparkling_cli.report.resume import snippet
from sparkling_cli.report.svg import sig, signed

#: Rows of the table of layers, with and without offenders; all of them are in report.json.
ROWS_AT_MOST, ROWS_WHEN_CALM = 12, 5

WIDE, NARROW = 900.0, 350.0


def _section(title: str, *body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(body)}</section>"


def _paragraph(words: str, class_: str = "") -> str:
    return f"<p{f' class={json.dumps(class_)}' if class_ else ''}>{escape(words)}</p>"


def _figure(caption: str, drawing: str, more: str = "") -> str:
    small = f" <small>{escape(more)}</small>" if more else ""
    return f"<figure><figcaption>{escape(caption)}{small}</figcaption>{drawing}</figure>"


def _table(heads: Iterable[tuple[str, bool]], rows: Iterable[tuple[bool, list[str]]], caption: str) -> str:
    """A table; heads are (words, numeric), rows (highlighted, cells already escaped).

    On a phone every row becomes a card, whose cells name their own column.
    """
    kinds = list(heads)
    head = "".join(f'<th scope="col"{" class=n" if n else ""}>{escape(w)}</th>' for w, n in kinds)
    body = []
    for highlighted, cells in rows:
        filled = "".join(
            f'<td class="{"n" if numeric else "name"}" data-label="{escape(words)}">{cell}</td>'
            for (words, numeric), cell in zip(kinds, cells, strict=True)
        )
        body.append(f"<tr{' class=off' if highlighted else ''}>{filled}</tr>")
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def breakable(name: str) -> str:
    """A dotted name, escaped, that may break behind its dots."""
    return escape(name).replace(".", ".<wbr>")


def _code(words: str) -> str:
    return f"<code>{breakable(words)}</code>"


def legend(before: str, after: str) -> str:
    """What the two kinds of lines and marks mean."""
    old = '<svg viewBox="0 0 38 14" aria-hidden="true"><path class="line before" d="M1 7L37 7"/>'
    old += '<circle class="mark before" cx="19" cy="7" r="4.2"/></svg>'
    new = '<svg viewBox="0 0 38 14" aria-hidden="true"><path class="line after" d="M1 7L37 7"/>'
    new += '<rect class="mark after" x="16.4" y="4.4" width="5.2" height="5.2"/></svg>'
    return f'<ul class="legend"><li>{old}{escape(before)}</li><li>{new}{escape(after)}</li></ul>'


def tiles(data: ReportData) -> str:
    """The few numbers that everybody asks for."""
    before, after = data.before, data.after
    found = [("Parameters", *_change(before.parameters, after.parameters))]
    if before.active is not None and after.active is not None and before.active != before.parameters:
        found.append(("Active parameters", *_change(before.active, after.active)))
    size_before = before.weight_bytes + before.state_bytes
    size_after = after.weight_bytes + after.state_bytes
    found.append(
        ("Checkpoint", f"{format_bytes(size_after)}", f"from {format_bytes(size_before)}, weights and state")
    )
    measured = data.activations
    if measured is not None:
        if measured.loss_before is not None and measured.loss_after is not None:
            moved = measured.loss_after - measured.loss_before
            found.append(("Loss", signed(moved), f"{measured.loss_before:.4f} → {measured.loss_after:.4f}"))
        if measured.logit_change is not None:
            found.append(("Logits", sig(measured.logit_change, 2), "RMS of the change / RMS before"))
        if measured.layers:
            worst = measured.worst(1)[0]
            found.append(("Signal ratio, farthest", _moved(worst.deviation), f"in {worst.name}"))
    if data.compute is not None:
        found.append(("Compute saved", f"{data.compute.saved:.0%}", "against the wide model from scratch"))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{breakable(words)}</small></dd></div>"
        for name, value, words in found
    )
    return f'<dl class="tiles">{cells}</dl>'


def _change(before: int, after: int) -> tuple[str, str]:
    return format_count(after), f"from {format_count(before)}, ×{sig(after / before)}"


def _moved(deviation: float | None) -> str:
    if deviation is None:
        return "not finite"
    if abs(deviation) < 5e-6:
        return "unchanged"
    return f"{deviation:+.1%}" if abs(deviation) >= 1e-3 else f"{deviation:+.3%}"


def _value(value: float | None) -> str:
    return "not finite" if value is None else sig(value)


def widened(data: ReportData) -> str:
    """The axes and the tensors that they run through."""
    # matrices first: a norm's drawing says little
    drawn = sorted(data.tensors, key=lambda change: change.role == "elementwise")[:BLOCKS_AT_MOST]
    blocks = "".join(
        f'<div class="block-cell">{tensor_block(change)}<code>{breakable(_short(change.name))}</code></div>'
        for change in drawn
    )
    rows = [
        (
            False,
            [
                _code(t.name),
                _code(t.layout),
                f"{escape(_shape(t.before))} → {escape(_shape(t.after))}",
                f"{t.count:,}",
                escape(t.role),
                escape(_range(t.scale)),
                escape(", ".join(t.fill)),
            ],
        )
        for t in data.tensors
    ]
    heads = [("tensor", False), ("layout", False), ("shape", True), ("tensors", True), ("side", False),
             ("factor", True), ("new entries", False)]  # fmt: skip
    return _section(
        "What was widened",
        _paragraph(
            "Solid is what the source had, hatched is new. Old entries keep their places, new ones follow."
        ),
        axes_drawing(data.axes, WIDE, "wide"),
        axes_drawing(data.axes, NARROW, "narrow"),
        f'<div class="blocks">{blocks}</div>' if blocks else "",
        _table(heads, rows, "Tensors with a grown axis. Fan-in tensors carry the factor on old entries too."),
    )


def _short(name: str) -> str:
    """The end of a name, enough to know the tensor."""
    parts = [part for part in name.split(".") if not part.startswith("{") and part != "weight"]
    return ".".join(parts[-2:])


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _range(scale: tuple[float, float]) -> str:
    low, high = scale
    return sig(low, 4) if low == high else f"{sig(low, 4)} to {sig(high, 4)}"


def activations(data: ReportData) -> str:
    """RMS before and after, layer by layer, the worst by name."""
    measured = data.activations
    title = "Signal: activations before and after"
    if measured is None:
        return _section(title, _paragraph(f"Not measured: {data.activations_missing}.", "missing"))
    where = f"Measured on {measured.data} ({measured.tokens:,} tokens)."
    if measured.random_tokens:
        where += " These are random tokens: ratios can be compared, the loss means little."
    body = [_paragraph(where), legend("before", "after")]
    body.append(f'<div class="many">{_activation_figures(measured)}</div>')
    body.append(_layers_table(measured))
    return _section(title, *body)


def _activation_figures(measured: Activations) -> str:
    drawn = []
    residual = figures.residual(measured)
    if residual is not None:
        drawn.append(
            _figure("Residual stream", charts.draw(residual, NARROW, 200.0), "RMS behind each block")
        )
    for role, chart, words in figures.roles(measured):
        drawn.append(_figure(role, charts.draw(chart, NARROW, 200.0), words))
    return "".join(drawn)


def _layers_table(measured: Activations) -> str:
    def row(entry: LayerActivation) -> tuple[bool, list[str]]:
        off = entry.moved > DEVIATION_LIMIT
        sign = " !" if off else ""
        return off, [
            _code(entry.name), _value(entry.x_before), _value(entry.x_after),
            _value(entry.y_before), _value(entry.y_after),
            _value(entry.r_before), _value(entry.r_after), f"{_moved(entry.deviation)}{sign}",
        ]  # fmt: skip

    heads = [("linear layer", False), ("RMS(x) before", True), ("RMS(x) after", True),
             ("RMS(y) before", True), ("RMS(y) after", True), ("r before", True), ("r after", True),
             ("r moved", True)]  # fmt: skip
    off = len(measured.offenders)
    rows = min(ROWS_AT_MOST if off else ROWS_WHEN_CALM, len(measured.layers))
    words = "none" if off == 0 else str(off)
    caption = (
        f"The {rows} layers whose r = RMS(y)/RMS(x) moved most, of "
        f"{len(measured.layers)}; {words} moved by more than {DEVIATION_LIMIT:.0%}."
    )
    return _table(heads, map(row, measured.worst(rows)), caption)


def learning_rate(data: ReportData) -> str:
    """Old and new entries' learning rates."""
    rate = data.learning_rate
    title = "Learning rate of old and new entries"
    if rate is None:
        return _section(title, _paragraph(f"No schedule: {data.learning_rate_missing}.", "missing"))
    chart = figures.learning_rate(rate)
    peak = f"{sig(rate.peak_new)} = {rate.rho:g} × {sig(rate.rate_at_expansion)}"
    words = (
        f"Old entries stay on the {rate.baseline} schedule. From step {rate.expansion_step:,} on, new "
        f"entries warm up over {rate.rewarmup_steps:,} steps to {peak} and decay to {sig(rate.minimum)} at "
        f"step {rate.total_steps:,} (Eq. 27-28)."
    )
    if rate.bias_correction == "fresh":
        words += " Their first updates carry the bias correction of a fresh Adam."
    zoom = figures.learning_rate_zoom(rate)
    body = [
        _paragraph(words),
        legend("old entries", "new entries"),
        _paragraph("Dotted: entries of earlier expansions.") if rate.earlier else "",
        charts.draw(chart, WIDE, 290.0, "wide"),
        charts.draw(chart, NARROW, 250.0, "narrow"),
    ]
    if zoom is not None:
        drawing = charts.draw(zoom, WIDE, 200.0, "wide") + charts.draw(zoom, NARROW, 200.0, "narrow")
        words = "factor on the update of new entries; 1 would be no difference"
        body.append(_figure("New / old", drawing, words))
    body.append(
        "<p>Every step is in <code>rewarmup.json</code> and <code>rewarmup.csv</code> beside this page. The "
        "training side applies it, with the output's path:</p>"
        f"<pre>{escape(snippet(data.provenance.format, data.destination))}</pre>"
    )
    return _section(title, *body)


def optimizer(data: ReportData) -> str:
    """What became of the optimizer's state."""
    summary = data.optimizer
    title = "Optimizer state"
    if summary is None:
        return _section(title, _paragraph("The source has no optimizer state.", "missing"))
    drawing = figures.optimizer(summary)
    name = f"{summary.name}, " if summary.name else ""
    treatment = {
        "asymmetric": "old entries kept, new entries zero (Eq. 24)",
        "asymmetric-scaled": "old entries kept and scaled like their weights, new entries zero",
        "copy": "old entries kept, new entries copied",
        "drop": "all entries zero, step counters reset",
    }[summary.treatment]
    rows = [
        (
            False,
            [
                _code(s.slot),
                f"{s.tensors:,}",
                f"{s.kept:,}",
                f"{s.entries - s.kept:,}",
                format_bytes(s.bytes),
            ],
        )
        for s in summary.slots
    ]
    heads = [
        ("state", False),
        ("tensors", True),
        ("entries kept", True),
        ("new entries", True),
        ("size", True),
    ]
    return _section(
        title,
        _paragraph(f"{name}{summary.treatment}: {treatment}."),
        drawing(WIDE, "wide"),
        drawing(NARROW, "narrow"),
        _table(heads, rows, "Per kind of state, over all parameters, after the expansion."),
    )


def compute(data: ReportData) -> str:
    """Compute of the run against from scratch."""
    facts = data.compute
    if facts is None:
        return ""
    drawing = figures.compute(facts, data.before, data.after)
    share = facts.expansion_step / facts.total_steps
    words = (
        f"C = 6 N D with N the active parameters (Eq. 29). The small model trains for {share:.0%} of the "
        f"steps and the wide one for the rest: {facts.saved:.1%} less than the wide model from scratch."
    )
    return _section("Compute", _paragraph(words), drawing(WIDE, "wide"), drawing(NARROW, "narrow"))


def made(data: ReportData) -> str:
    """Command, spec and provenance."""
    source = data.provenance
    facts = [
        ("source", f"{source.source} ({source.format}), {source.tensors:,} tensors"),
        ("source digest", f"CRC-32 {source.source_digest}"),
        ("tool", f"{source.tool} {source.version}"),
        ("expansions", "; ".join(source.stages)),
    ]
    cells = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    spec = json.dumps(data.spec, indent=2)
    return _section(
        "How it was made",
        f"<pre>{escape(data.command)}</pre>",
        f'<dl class="facts">{cells}</dl>',
        "<h3>Spec, with all defaults</h3>",
        f"<pre>{escape(spec)}</pre>",
    )
