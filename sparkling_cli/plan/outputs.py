"""From rows to output files: what the format is asked to lay out."""

from __future__ import annotations

from sparkling_cli.formats.detect import format_of
from sparkling_cli.formats.model import Declared, OutputFile, OutputRequest
from sparkling_cli.plan.model import Plan, Row


def lay_out(plan: Plan) -> tuple[OutputFile, ...]:
    """Every output file of a plan, by the source's own format."""
    return format_of(plan.source.format).outputs(plan.source, request_of(plan))


def request_of(plan: Plan) -> OutputRequest:
    """What a format needs to know of a plan."""
    return OutputRequest(tuple(map(_declared, plan.rows)), plan.config, plan.scalars)


def _declared(row: Row) -> Declared:
    return Declared(
        key=row.key,
        name="" if row.slot else row.name,
        dtype=row.dtype,
        shape=row.shape,
        source_file=row.source.extents[0].path if row.source.extents else "",
    )
