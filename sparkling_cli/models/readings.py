"""Other readings of a tiny model's heads, for classes whose heads, or hidden, the usual one does not explain.

Heads may lie in blocks that each have a share of them (groups of an output projection, pairs that are
subtracted, devices of the first training run): then it is the share that grows. And where positions say how
many heads there are, hidden can grow with the size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from sparkling_cli.layout.model import Compensation
from sparkling_cli.models.axes import TinyAxes, coupled, with_hidden
from sparkling_cli.models.shrink import moved_dims
from sparkling_cli.models.skeleton import ModelFactory

#: Numbers of blocks that no key of a config says.
_BLOCKS = (2, 4)


def usual(found: TinyAxes) -> TinyAxes:
    """The axes with heads in as many blocks as a key of the config says there are, where one does."""
    for name, axis in found.axes.items():
        halves = axis.kind == "blocks" and _halves(found, name)
        if halves and "heads" in found.axes and found.axes["heads"].size % axis.size == 0:
            return _in_blocks(found, name, axis.size)
    return found


def _halves(found: TinyAxes, axis: str) -> bool:
    """Whether some dim is divided by the axis."""
    return any(a == 2 * b for a, b in moved_dims(found.shapes, found.moved.get(axis, {})).values())


def further(found: TinyAxes, factory: ModelFactory | None) -> Iterator[TinyAxes]:
    """Other readings of the same keys, for a class whose heads the usual one does not explain."""
    along = tuple(_divisors(found)) if not found.coupled and "hidden" in found.axes else ()
    together = with_hidden(found, along, factory) if along else None
    if together is not None:
        yield together
    if found.blocks != "1" or "heads" not in found.axes or "kv_heads" in found.axes:
        return
    if not found.coupled and "head_dim" not in found.axes:
        together = coupled(found, factory, always=True)
        if together.coupled:
            yield together
        return
    for number in _BLOCKS:
        if found.axes["heads"].size % number == 0:
            yield _in_blocks(found, str(number), number)
    if found.coupled == ("heads",) and "head_dim" in found.axes and not found.keys("head_dim"):
        larger = with_hidden(found, ("head_dim",), factory)
        if larger is not None:
            yield larger


def _divisors(found: TinyAxes) -> Iterator[str]:
    """Axes that may have to grow with hidden: counts that a width is divided by, and multiples of hidden."""
    hidden = found.axes["hidden"]
    for name, axis in found.axes.items():
        multiple = axis.kind == "hidden" and name != "hidden" and axis.size % hidden.size == 0
        alike = found.moved.get(name, {}).keys() == found.shapes.keys()
        if multiple or (axis.kind is None and alike and _halves(found, name)):
            yield name


def _in_blocks(found: TinyAxes, blocks: str, number: int) -> TinyAxes:
    heads = found.axes["heads"]
    axes = {**found.axes, "heads": replace(heads, size=heads.size // number)}
    terms = {path: (blocks, *names) if "heads" in names else names for path, names in found.terms.items()}
    return replace(found, axes=axes, terms=terms, blocks=blocks)


def attention_terms(found: TinyAxes, times: int) -> list[str]:
    """Terms of ``times`` hidden entries that are an attention's own, where its heads are read otherwise."""
    if found.coupled == ("head_dim",):
        outer = ""
    elif found.blocks != "1" and found.coupled == ("heads",):
        outer = f"{found.blocks} "
    else:
        return []
    if times == 1:
        return [f"({outer}heads head_dim)"]
    inside = [f"({outer}heads {times} head_dim)", f"({outer}{times} heads head_dim)"]
    return [*inside, f"({times} {outer}heads head_dim)"] if outer else inside


def head_scales(found: TinyAxes, attention: Sequence[tuple[str, bool]]) -> list[tuple[Compensation, ...]]:
    """Factors that keep an attention whose heads grow; the first where its scale is ``1 / sqrt(head_dim)``.

    The products of queries and keys have more summands. What makes both, and values beside them, is made
    smaller by the same factor, and what uses the values up larger.

    Args:
        found: the axes.
        attention: tensors that make queries, keys and values as one, and (True) those that use values up.
    """
    if found.coupled != ("head_dim",) or not attention:
        return [()]
    return [
        tuple(Compensation("hidden", name, power=p if uses else -p) for name, uses in attention)
        for p in (0.25, 0.5)
    ]
