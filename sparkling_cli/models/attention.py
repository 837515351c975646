"""Attention inside classes whose head_dim is hidden / heads: which dims are heads, not residual stream.

There hidden and heads grow together, by the same runs, so sizes cannot tell them apart and logits need
not. Function can: the output projection's input is linear in the values, whatever lies between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparkling_cli.layout.expr import Axis, Expr, Fixed, Product, Role, TensorLayout
from sparkling_cli.layout.names import block_of
from sparkling_cli.models.families import Family, Options, Variable
from sparkling_cli.models.labels import keeps, label, parts_of
from sparkling_cli.models.parity import LogitParity

_HIDDEN = Axis("hidden")
_HEADS: tuple[Expr, ...] = (Axis("heads"), Axis("head_dim"))
#: (family, dim)
Place = tuple[int, int]


def split_heads(
    parity: LogitParity, families: Sequence[Family], layouts: Sequence[TensorLayout]
) -> list[TensorLayout]:
    """The layouts with ``(heads head_dim)`` where attention's own dims were called ``hidden``."""
    result = list(layouts)
    found = parity.found
    if found.coupled != ("heads",) or "head_dim" not in found.axes or found.blocks != "1":
        return result
    blocks: dict[tuple[str, ...], list[int]] = {}
    for i, family in enumerate(families):
        blocks.setdefault(tuple(sorted({block_of(n) for n in family.names})), []).append(i)
    for members in blocks.values():
        producers = _producers(families, result, members)
        for i in members:
            place = _consumer(result[i], i)
            if place is not None:
                others = {o: p for o, p in producers.items() if all(i != f for f, _ in p)}
                _split_block(parity, families, result, others, place)
    return result


def split_fused(
    parity: LogitParity, families: Sequence[Family], options: Options, choice: Mapping[Variable, str]
) -> dict[Variable, str]:
    """Of terms that grow alike, where heads become larger, those that tell values from the rest."""
    found: dict[Variable, str] = {}
    if "head_dim" not in parity.found.coupled:
        return found
    for variable in {term for family in families for term in family.terms}:
        for option in (
            options[variable] if len(options[variable]) > 1 and "head_dim" in choice[variable] else ()
        ):
            tried = [family for family in families if variable in family.terms]
            layouts = label(
                parity, families, [f.layout({**choice, variable: option}) for f in families], ["head_dim"]
            )
            own = [lay for f, lay in zip(families, layouts, strict=True) if f in tried]
            if any("qkv" in lay.text or "v:" in lay.text for lay in own):
                found[variable] = option
                break
    return found


def _producers(
    families: Sequence[Family], layouts: Sequence[TensorLayout], members: Sequence[int]
) -> dict[str, list[Place]]:
    """Module -> its dims (weight and bias) that may hold heads."""
    found: dict[str, list[Place]] = {}
    for i in members:
        for d, dim in enumerate(layouts[i].dims):
            if dim.role in (Role.OUT, Role.BIAS) and _alternatives(dim.expr):
                found.setdefault(families[i].names[0].rpartition(".")[0], []).append((i, d))
    return found


def _consumer(layout: TensorLayout, i: int) -> Place | None:
    """The input dim of a square projection of the residual stream."""
    if len(layout.dims) != 2 or any(d.expr != _HIDDEN for d in layout.dims):
        return None
    return next(((i, d) for d, dim in enumerate(layout.dims) if dim.role is Role.IN), None)


def _alternatives(expr: Expr) -> list[Expr]:
    """What a dim called ``hidden`` may be if it holds heads."""
    if expr == _HIDDEN:
        return [Product(_HEADS)]
    if not isinstance(expr, Product) or len(expr.factors) != 2 or _HIDDEN not in expr.factors:
        return []
    at = expr.factors.index(_HIDDEN)
    count = expr.factors[1 - at]
    if not isinstance(count, Fixed) or count.size != 3:
        return []
    if at == 1:
        return [Product((count, *_HEADS))]
    return [Product((_HEADS[0], count, _HEADS[1])), Product((*_HEADS, count))]


def _split_block(
    parity: LogitParity,
    families: Sequence[Family],
    layouts: list[TensorLayout],
    producers: dict[str, list[Place]],
    consumer: Place,
) -> None:
    """Rewrite the block if some producer's part is linear into the consumer: values and output."""
    i, d = consumer
    whole = (i, d, list(range(families[i].shape[d])))
    for places in producers.values():
        first = layouts[places[0][0]].dims[places[0][1]].expr
        for number, option in enumerate(_alternatives(first)):
            for entries in parts_of(option, parity.found.sizes):
                changed = [*((f, at, entries) for f, at in places), whole]
                # Queries and keys may be negated together too, but not exchanged entry by entry.
                if not keeps(parity, families, changed, exchanged=True) or not keeps(
                    parity, families, changed
                ):
                    continue
                layouts[i] = layouts[i].with_terms({d: Product(_HEADS)})
                for f, at in (p for others in producers.values() for p in others):
                    options = _alternatives(layouts[f].dims[at].expr)
                    layouts[f] = layouts[f].with_terms({at: options[min(number, len(options) - 1)]})
                return
