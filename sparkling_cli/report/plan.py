"""A plan as a result: what ``expand --dry-run`` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.names import skeletons
from sparkling_cli.results.base import Count
from sparkling_cli.results.plan import Bytes, ExpansionPlan, Fill, TensorKind

if TYPE_CHECKING:
    from sparkling_cli.compute.shape import ParameterCount
    from sparkling_cli.plan.model import Expansion, Plan, Recipe


def plan_result(expansion: Expansion) -> ExpansionPlan:
    """Axes, parameters, bytes to write against free space, config changes, notes, tensors by kind."""
    from sparkling_cli.execute.disk_space import free_bytes
    from sparkling_cli.plan.resolve import whole_heads

    plan, destination = expansion.plan, expansion.destination
    before, after, known = parameter_counts(plan)
    heads = whole_heads(dict(plan.growth), plan.layout)
    grown = {**plan.growth, **({} if heads is None else {"heads": heads})}
    return ExpansionPlan(
        source=str(plan.source.root),
        destination=str(destination),
        format=plan.source.format,
        model=plan.layout.name,
        axes={name: Count(before=g.source, after=g.target) for name, g in grown.items()},
        parameters=Count(before=before.total, after=after.total),
        active_parameters=Count(before=before.active, after=after.active) if known else None,
        embedding_parameters=Count(before=before.embedding, after=after.embedding),
        bytes=Bytes(
            before=sum(plan.nbytes(after=False)),
            after=sum(plan.nbytes(after=True)),
            to_write=expansion.bytes_to_write,
            free=free_bytes(destination.absolute().parent),
        ),
        tensors=len(plan.rows),
        widened=sum(row.grows for row in plan.rows),
        config=dict(plan.config),
        kinds=tuple(tensor_kinds(plan)),
        account=plan.account,
        notes=plan.notes,
        warnings=plan.warnings,
        spec=plan.spec.as_data(),
    )


def parameter_counts(plan: Plan) -> tuple[ParameterCount, ParameterCount, bool]:
    """Parameters before and after, and whether it is known how many of them work on one token."""
    from sparkling_cli.compute.shape import counted_as_stored, shape_of

    layout = counted_as_stored(plan.layout, plan.source)
    try:
        shape, known = shape_of(layout, plan.source.config), True
    except LayoutError:
        shape, known = shape_of(layout, top_k=1), False
    return shape.count(), shape.grown(plan.growth).count(), known


def tensor_kinds(plan: Plan) -> Iterator[TensorKind]:
    """Tensors that differ only in their indices, one entry for all: shapes, factor, fills, count."""
    names = skeletons([row.name for row in plan.rows])
    kinds: Counter[tuple[str, Recipe]] = Counter(
        (name, row.recipe) for name, row in zip(names, plan.rows, strict=True)
    )
    for (name, recipe), count in kinds.items():
        yield TensorKind(
            name=name,
            slot=recipe.slot,
            count=count,
            before=recipe.before,
            after=recipe.shape,
            dtype=recipe.dtype,
            scale=recipe.scales,
            fill=fills(recipe),
            zero=recipe.zero,
        )


def fills(recipe: Recipe) -> tuple[Fill, ...]:
    """How new entries are filled, by name."""
    return tuple(fill.name.lower() for fill in recipe.fills)  # type: ignore[misc]
