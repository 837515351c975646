"""A plan as plain data: what ``expand --dry-run --json`` prints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.names import skeletons
from sparkling_cli.widening.geometry import scale_range

if TYPE_CHECKING:
    from sparkling_cli.plan.model import Plan, Row
    from sparkling_cli.prepared import Prepared


def plan_facts(prepared: Prepared, destination: Path) -> dict[str, Any]:
    """The whole plan: its summary, and tensors by kind."""
    return {**summary_facts(prepared, destination), "kinds": list(tensor_kinds(prepared.plan))}


def summary_facts(prepared: Prepared, destination: Path) -> dict[str, Any]:
    """Axes, parameters, bytes to write against free space, config changes, notes."""
    from sparkling_cli.execute.room import free_bytes
    from sparkling_cli.plan.resolve import whole_heads

    plan, totals = prepared.plan, prepared.totals
    heads = whole_heads(dict(plan.growth), plan.layout)
    grown = {**plan.growth, **({} if heads is None else {"heads": heads})}
    return {
        "source": str(plan.source.root),
        "destination": str(destination),
        "format": plan.source.format,
        "model": plan.layout.name,
        "axes": {name: {"before": g.source, "after": g.target} for name, g in grown.items()},
        "parameters": {"before": totals.parameters_before, "after": totals.parameters_after},
        "active_parameters": active_parameters(plan),
        "bytes": {
            "before": totals.bytes_before,
            "after": totals.bytes_after,
            "to_write": totals.bytes_to_write,
            "free": free_bytes(destination.absolute().parent),
        },
        "tensors": totals.tensors,
        "widened": totals.widened,
        "config": dict(plan.config),
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "spec": dict(plan.spec),
    }


def active_parameters(plan: Plan) -> dict[str, int] | None:
    """Parameters that work on one token, before and after; None where the top-k is not known."""
    from sparkling_cli.compute.shape import shape_of

    try:
        shape = shape_of(plan.layout, plan.source.config)
    except LayoutError:
        return None
    before, after = shape.count().active, shape.grown(plan.growth).count().active
    return {"before": before, "after": after}


def tensor_kinds(plan: Plan) -> Iterator[dict[str, Any]]:
    """Tensors that differ only in their indices, one entry for all: shapes, factor, fills, count."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row, name in zip(plan.rows, skeletons([row.name for row in plan.rows]), strict=True):
        key = (name, row.slot, row.shape, row.scale, row.offset, id(row.view))
        groups.setdefault(key, []).append(row)
    for (name, *_), rows in groups.items():
        row = rows[0]
        low, high = scale_range(row.view)
        yield {
            "name": name,
            "slot": row.slot,
            "count": len(rows),
            "before": list(row.source.shape),
            "after": list(row.shape),
            "dtype": row.dtype,
            "scale": [row.scale * low, row.scale * high],
            "fill": sorted({run.fill.name.lower() for dim in row.view for run in dim.runs if run.new}),
            "zero": row.zero,
        }
