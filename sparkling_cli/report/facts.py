"""A plan as plain data: what ``expand --dry-run --json`` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.names import skeletons

if TYPE_CHECKING:
    from sparkling_cli.plan.model import Expansion, Plan, Recipe


def plan_facts(expansion: Expansion) -> dict[str, Any]:
    """The whole plan: its summary, and tensors by kind."""
    return {**summary_facts(expansion), "kinds": list(tensor_kinds(expansion.plan))}


def summary_facts(expansion: Expansion) -> dict[str, Any]:
    """Axes, parameters, bytes to write against free space, config changes, notes."""
    from sparkling_cli.execute.room import free_bytes
    from sparkling_cli.plan.resolve import whole_heads

    plan, totals, destination = expansion.plan, expansion.totals, expansion.destination
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
        "spec": plan.spec.as_data(),
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
    names = skeletons([row.name for row in plan.rows])
    kinds: Counter[tuple[str, Recipe]] = Counter(
        (name, row.recipe) for name, row in zip(names, plan.rows, strict=True)
    )
    for (name, recipe), count in kinds.items():
        yield {
            "name": name,
            "slot": recipe.slot,
            "count": count,
            "before": list(recipe.before),
            "after": list(recipe.shape),
            "dtype": recipe.dtype,
            "scale": list(recipe.scales),
            "fill": [fill.name.lower() for fill in recipe.fills],
            "zero": recipe.zero,
        }
