"""Plans and results for people: one screen each."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from sparkling_cli.report.resume import MODULE, call

if TYPE_CHECKING:
    from rich.table import Table

    from sparkling_cli.api import ExpansionResult
    from sparkling_cli.cli.console import Output
    from sparkling_cli.plan.model import Expansion


def show_plan(output: Output, expansion: Expansion, facts: dict[str, Any]) -> None:
    """The whole plan; with ``--verbose`` every kind of tensor, state included.

    Args:
        output: where to.
        expansion: the plan.
        facts: what ``plan_facts`` says of them.
    """
    from rich.text import Text

    destination, states = expansion.destination, expansion.plan.source.states
    output.show(_summary(facts))
    output.show(_kinds(facts["kinds"], everything=output.verbose))
    for key, value in facts["config"].items():
        output.show(f"config  {key} = {value}")
    output.show(Text(f"output  {destination}"), whole=True)
    output.show(f"optimizer state  {facts['spec']['optimizer'] if states else 'none'}")
    output.show(Text(_rewarmup(expansion)))
    _remarks(output, facts)
    room = facts["bytes"]["free"] - facts["bytes"]["to_write"]
    if room < 0:
        output.warn(f"{_size(-room)} more space is needed at {destination.absolute().parent}")
    output.show("Nothing was written (--dry-run).")


def _rewarmup(expansion: Expansion) -> str:
    if expansion.rewarmup is None:
        return f"re-warmup  none: {expansion.rewarmup_missing}"
    stage = expansion.rewarmup.stages[-1]
    return (
        f"re-warmup  of new entries in {stage.steps:,} steps from step {stage.expansion_step:,}, "
        f"to {stage.rho:g} x {stage.eta_e:.3e} = {stage.curve.peak:.3e}"
    )


def show_result(output: Output, result: ExpansionResult) -> None:
    """What was done, the worst layers, the verdict, and where to go on."""
    from rich.text import Text

    from sparkling_cli.report.facts import summary_facts
    from sparkling_cli.report.tables import activation_table, verdict_lines
    from sparkling_cli.storage.sidecar import REPORT_HTML, sidecar_root

    facts = summary_facts(result.expansion)
    output.show(_summary(facts))
    if result.report is not None:
        if result.report.activations is not None:
            output.show(activation_table(result.report.activations))
        for line in verdict_lines(result.report.verdict):
            output.show(line)
    _remarks(output, facts | {"warnings": []})
    where = shlex.quote(str(result.destination))
    source = shlex.quote(str(result.expansion.plan.source.root))
    output.show(Text(f"written  {where}"), whole=True)
    page = f"{sidecar_root(result.destination)}/{REPORT_HTML}"
    output.show(Text(f"report   {page}"), whole=True)
    output.show(Text(f"check    sparkling verify {source} {where}"), whole=True)
    if result.report is not None:
        for words in _train_on(result, str(result.destination)):
            output.show(Text(words), whole=True)


def _train_on(result: ExpansionResult, where: str) -> list[str]:
    """How the training side takes the output up: by its format, if there is a schedule."""
    plan = result.expansion.plan
    if result.report is None or result.report.learning_rate is None:
        if not plan.source.states:
            return []
        return [
            "no re-warmup was written: expand again with --schedule, --peak-lr and --total-steps to get one"
        ]
    return [f"train on with {call(plan.source.format, where, f'{MODULE}.')}"]


def _summary(facts: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(show_header=True, box=None, pad_edge=False)
    for title in ("", "before", "after", ""):
        table.add_column(title, justify="left" if not title else "right")
    for name, sizes in facts["axes"].items():
        ratio = sizes["after"] / sizes["before"]
        table.add_row(name, str(sizes["before"]), str(sizes["after"]), f"{ratio:.4g}x")
    rows = [("parameters", facts["parameters"])]
    active = facts["active_parameters"]
    if active is not None and active != facts["parameters"]:
        rows.append(("active parameters", active))
    for title, counts in rows:
        ratio = counts["after"] / counts["before"]
        table.add_row(title, _count(counts["before"]), _count(counts["after"]), f"{ratio:.4g}x")
    sizes = facts["bytes"]
    table.add_row("checkpoint", _size(sizes["before"]), _size(sizes["after"]), f"{_size(sizes['free'])} free")
    return table


def _kinds(kinds: list[dict[str, Any]], *, everything: bool) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("tensor", "count", "before", "after", "scale", "new"):
        table.add_column(title, justify="right" if title in ("count", "scale") else "left", overflow="fold")
    for kind in kinds:
        changed = kind["before"] != kind["after"] or kind["scale"] != [1.0, 1.0]
        if not everything and (kind["slot"] or not changed):
            continue
        low, high = kind["scale"]
        scale = f"{low:.4g}" if low == high else f"{low:.4g}..{high:.4g}"
        name = f"{kind['name']} [{kind['slot']}]" if kind["slot"] else kind["name"]
        table.add_row(
            name.replace("[", r"\["),
            str(kind["count"]),
            "x".join(map(str, kind["before"])),
            "x".join(map(str, kind["after"])),
            scale,
            ", ".join(kind["fill"]),
        )
    return table


def _remarks(output: Output, facts: dict[str, Any]) -> None:
    for note in facts["notes"]:
        output.note(f"note: {note}")
    for warning in facts["warnings"]:
        output.warn(warning)


def _count(number: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _size(count: int) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count} B"
