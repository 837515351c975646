"""Which parts of a producer are linear: ``up`` and ``v``, against ``gate``, ``q`` and ``k``.

Negating a part's rows together with the consumer's columns leaves the logits as they are exactly if
the consumer's input is linear in that part. Zero fill needs to know: the other parts stay copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from sparkling_cli.layout.expr import Axis, Dim, Expr, Fixed, Product, Role, Sum, TensorLayout, size_of
from sparkling_cli.layout.names import block_of
from sparkling_cli.models.families import Family
from sparkling_cli.models.parity import LogitParity
from sparkling_cli.models.search import Choice


@dataclass(frozen=True)
class Part:
    """Rows of one family's producing dim that belong together."""

    family: int
    dim: int
    start: int
    stop: int
    step: int = 1
    """interleaved parts: entries ``start, start+step, ...``"""


def label(
    parity: LogitParity, families: Sequence[Family], layouts: Sequence[TensorLayout], axes: Sequence[str]
) -> list[TensorLayout]:
    """The layouts with ``gate``/``up`` and ``q``/``k``/``v`` written where they can be told apart."""
    result = list(layouts)
    for axis in axes:
        for group in _groups(families, result, axis):
            _label_group(parity, families, result, group, axis)
    return result


def _groups(
    families: Sequence[Family], layouts: Sequence[TensorLayout], axis: str
) -> Iterator[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """(producing dims, consuming dims) of the axis, block by block."""
    blocks: dict[tuple[str, ...], tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
    for i, (family, layout) in enumerate(zip(families, layouts, strict=True)):
        for d, dim in enumerate(layout.dims):
            if axis not in _axes(dim.expr):
                continue
            block = blocks.setdefault(tuple(sorted({block_of(n) for n in family.names})), ([], []))
            if dim.role in (Role.OUT, Role.BIAS):
                block[0].append((i, d))
            elif dim.role is Role.IN:
                block[1].append((i, d))
    for outs, ins in blocks.values():
        if outs and ins:
            yield outs, ins


def _axes(expr: Expr) -> set[str]:
    from sparkling_cli.layout.expr import axis_names

    return set(axis_names(expr))


def _label_group(
    parity: LogitParity,
    families: Sequence[Family],
    layouts: list[TensorLayout],
    group: tuple[list[tuple[int, int]], list[tuple[int, int]]],
    axis: str,
) -> None:
    outs, ins = group
    sizes = parity.found.sizes
    modules: dict[str, list[tuple[int, int]]] = {}
    for i, d in outs:
        owner = families[i].names[0].removesuffix("_bias").removesuffix(".bias").removesuffix(".weight")
        modules.setdefault(owner, []).append((i, d))
    parts: list[tuple[str, int, list[Part]]] = []
    for owner, dims in modules.items():
        count = part_count(layouts[dims[0][0]].dims[dims[0][1]].expr)
        for k in range(count):
            spans = [span(i, d, layouts[i].dims[d].expr, k, sizes) for i, d in dims]
            parts.append((owner, k, [s for s in spans if s is not None]))
    if len(parts) < 2 or len(parts) > 6:
        return
    consumers = [Part(i, d, 0, families[i].shape[d]) for i, d in ins]
    linear = [rows_keep(parity, families, [*p, *consumers]) for _, _, p in parts]
    attention = parity.found.axes[axis].kind in ("heads", "kv_heads", "q_per_kv", "head_dim")
    names = _names(linear, attention, parts, layouts, modules)
    if names is None:
        return
    for owner, dims in modules.items():
        own = [n for (o, _, _), n in zip(parts, names, strict=True) if o == owner]
        for i, d in dims:
            layouts[i] = _labelled(layouts[i], d, own)


def part_count(expr: Expr) -> int:
    """How many parts a fused producing dim has; 1 if it is not fused."""
    if isinstance(expr, Product):
        for factor in expr.factors:
            if isinstance(factor, Fixed) and factor.size in (2, 3):
                return factor.size
            if isinstance(factor, Sum):
                return len(factor.parts)
    return len(expr.parts) if isinstance(expr, Sum) else 1


def span(i: int, d: int, expr: Expr, k: int, sizes: Mapping[str, int]) -> Part | None:
    """Entries of part ``k``; None where parts do not lie as one block or stride."""
    total = size_of(expr, sizes)
    if isinstance(expr, Sum):
        widths = [size_of(p, sizes) for p in expr.parts]
        return Part(i, d, sum(widths[:k]), sum(widths[: k + 1]))
    if isinstance(expr, Product):
        for at, factor in enumerate(expr.factors):
            inner = prod(size_of(behind, sizes) for behind in expr.factors[at + 1 :])
            if isinstance(factor, Fixed) and factor.size in (2, 3):
                return Part(i, d, k * inner, total, factor.size * inner)
            if isinstance(factor, Sum):
                widths = [size_of(p, sizes) * inner for p in factor.parts]
                start = sum(widths[:k])
                if at == 0:
                    return Part(i, d, start, start + widths[k])
                return Part(i, d, start, start + widths[k], -sum(widths))
    return Part(i, d, 0, total)


def _entries(part: Part, total: int) -> list[int]:
    if part.step < 0:  # a block inside every outer group
        group = -part.step
        return [g + j for g in range(0, total, group) for j in range(part.start, part.stop)]
    if part.step > 1:
        return [s + j for s in range(part.start, total, part.step) for j in range(_block(part))]
    return list(range(part.start, part.stop))


def _block(part: Part) -> int:
    for count in (2, 3):
        if part.start % (part.step // count) == 0 and part.step % count == 0:
            inner = part.step // count
            if part.start in (0, inner, 2 * inner):
                return inner
    return 1


def rows_keep(parity: LogitParity, families: Sequence[Family], parts: Sequence[Part]) -> bool:
    """Whether negating all these entries at once leaves the logits as they are."""
    import torch

    state = {k: v.clone() for k, v in parity.state.items()}
    for part in parts:
        index = torch.tensor(_entries(part, families[part.family].shape[part.dim]))
        for name in families[part.family].names:
            state[name].index_copy_(part.dim, index, -state[name].index_select(part.dim, index))
    return parity.unchanged(state)


def rows_swap(parity: LogitParity, families: Sequence[Family], parts: Sequence[Part]) -> bool:
    """Whether exchanging the first two entries of all these parts at once leaves the logits."""
    import torch

    state = {k: v.clone() for k, v in parity.state.items()}
    for part in parts:
        first, second = _entries(part, families[part.family].shape[part.dim])[:2]
        index, other = torch.tensor([first, second]), torch.tensor([second, first])
        for name in families[part.family].names:
            state[name].index_copy_(part.dim, index, state[name].index_select(part.dim, other))
    return parity.unchanged(state)


def _names(
    linear: Sequence[bool],
    attention: bool,
    parts: Sequence[tuple[str, int, list[Part]]],
    layouts: Sequence[TensorLayout],
    modules: Mapping[str, Sequence[tuple[int, int]]],
) -> list[str] | None:
    """A name for every part; None where the pattern is not one that names exist for."""
    if not attention:
        if len(parts) == 2 and sum(linear) == 1:
            return ["up" if is_linear else "gate" for is_linear in linear]
        return None
    if sum(linear) != 1 or len(parts) < 3:
        return None
    rest = [i for i, is_linear in enumerate(linear) if not is_linear]
    names = ["v" if is_linear else "q" for is_linear in linear]
    grouped = [i for i in rest if "q_per_kv" not in _terms_of(parts[i], layouts, modules)]
    key = grouped[-1] if 0 < len(grouped) < len(rest) else rest[-1]
    names[key] = "k"
    return names


def _terms_of(
    part: tuple[str, int, list[Part]],
    layouts: Sequence[TensorLayout],
    modules: Mapping[str, Sequence[tuple[int, int]]],
) -> set[str]:
    owner, k, _ = part
    i, d = modules[owner][0]
    expr = layouts[i].dims[d].expr
    if isinstance(expr, Product):
        for factor in expr.factors:
            if isinstance(factor, Sum):
                return _axes(factor.parts[k])
    if isinstance(expr, Sum):
        return _axes(expr.parts[k])
    return _axes(expr)


def _labelled(layout: TensorLayout, d: int, names: Sequence[str]) -> TensorLayout:
    dims = list(layout.dims)
    dims[d] = Dim(_with_names(dims[d].expr, names), dims[d].role)
    return TensorLayout(tuple(dims), render(dims))


def _with_names(expr: Expr, names: Sequence[str]) -> Expr:
    from sparkling_cli.layout.expr import PACKINGS

    if len(names) == 1:
        return replace(expr, label=names[0])
    packing = next((n for n, parts in PACKINGS.items() if parts == tuple(names)), None)
    if isinstance(expr, Sum):
        return Sum(tuple(replace(p, label=n) for p, n in zip(expr.parts, names, strict=True)))
    assert isinstance(expr, Product)
    factors: list[Expr] = []
    for factor in expr.factors:
        if isinstance(factor, Sum):
            parts = zip(factor.parts, names, strict=True)
            factors.append(Sum(tuple(replace(p, label=n) for p, n in parts)))
        elif isinstance(factor, Fixed) and factor.size == len(names) and packing:
            factors.append(Axis(packing))
        elif isinstance(factor, Fixed) and factor.size == len(names):
            factors.append(Sum(tuple(Fixed(1, label=n) for n in names)))
        else:
            factors.append(factor)
    return Product(tuple(factors))


def render(dims: Sequence[Dim]) -> str:
    """The text of a layout's dims; the inverse of parsing."""
    stack = [str(d.expr) for d in dims if d.role is Role.STACK]
    rest = [d for d in dims if d.role is not Role.STACK]
    prefix = " ".join(stack) + " | " if stack else ""
    roles = [d.role for d in rest]
    if Role.IN in roles and Role.OUT in roles:
        first = roles[0]
        split = next(i for i, r in enumerate(roles) if r is not first)
        left = " ".join(str(d.expr) for d in rest[:split])
        right = " ".join(str(d.expr) for d in rest[split:])
        return f"{prefix}{left} {'->' if first is Role.IN else '<-'} {right}"
    if not rest:
        return ""
    word = "bias" if roles[0] is Role.BIAS else "scale"
    return f"{prefix}{word} " + " ".join(str(d.expr) for d in rest)


def texts(families: Sequence[Family], choice: Choice) -> list[TensorLayout]:
    """Layouts of the families under a choice, in order."""
    return [f.layout(choice) for f in families]
