"""Real tensors grouped by skeleton and layout, and the name templates that stand for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from sparkling_cli.layout.expr import TensorLayout
from sparkling_cli.layout.names import NUMBER, compress, skeleton

#: the numbers in a name, from left to right
Indices = tuple[int, ...]


@dataclass(frozen=True)
class Pattern:
    """Real tensors of one skeleton and one layout, at every combination of some indices.

    Attributes:
        key: the skeleton.
        layout: of each of them.
        indices: for every number in the name, the values that it has.
        whole: for every number in the name, whether these are all that it has in the model.
    """

    key: str
    layout: TensorLayout
    indices: tuple[frozenset[int], ...]
    whole: tuple[bool, ...]


def patterns_of(layouts: Mapping[str, TensorLayout]) -> list[Pattern]:
    """Patterns that stand for exactly the tensors of a model, from the layout of each."""
    grouped: dict[str, dict[str, tuple[TensorLayout, set[Indices]]]] = {}
    for name, layout in layouts.items():
        key, indices = split(name)
        grouped.setdefault(key, {}).setdefault(layout.text, (layout, set()))[1].add(indices)
    boxes = [
        (key, layout, box)
        for key, own in grouped.items()
        for layout, indices in own.values()
        for box in _boxes(indices)
    ]
    most: dict[int, int] = {}
    for _, _, box in boxes:
        for position, values in enumerate(box):
            most[position] = max(most.get(position, 0), *values)
    return [
        Pattern(key, layout, box, tuple(len(values) == most[i] + 1 for i, values in enumerate(box)))
        for key, layout, box in boxes
    ]


def _boxes(indices: AbstractSet[Indices]) -> list[tuple[frozenset[int], ...]]:
    """Products of index sets that together are these indices, without overlap."""
    if indices == {()}:
        return [()]
    behind: dict[int, set[Indices]] = {}
    for first, *rest in sorted(indices):
        behind.setdefault(first, set()).add(tuple(rest))
    alike: dict[frozenset[Indices], set[int]] = {}
    for first, rests in behind.items():
        alike.setdefault(frozenset(rests), set()).add(first)
    return [(frozenset(firsts), *box) for rests, firsts in alike.items() for box in _boxes(rests)]


def split(name: str) -> tuple[str, Indices]:
    """A name's skeleton and the numbers in it."""
    return skeleton(name), tuple(int(m.group()) for m in NUMBER.finditer(name))


def numbered(key: str, indices: Indices) -> str:
    """The name of a skeleton and its numbers: the inverse of :func:`split`."""
    for index in indices:
        key = key.replace("*", str(index), 1)
    return key


def placeholder(position: int) -> str:
    """What the index at a position of a name is called."""
    return "layers" if position == 0 else f"index_{position + 1}"


def template(pattern: Pattern) -> str:
    """The name template of a pattern, in the module."""
    return fill(pattern.key, [placeholder(i) for i in range(pattern.key.count("*"))], pattern)


def fill(key: str, placeholders: Sequence[str], pattern: Pattern) -> str:
    """A skeleton with named placeholders, restricted where the pattern's tensors are not at all indices."""
    only = {
        placeholder(i): "=" + compress(values)
        for i, (values, whole) in enumerate(zip(pattern.indices, pattern.whole, strict=True))
        if not whole
    }
    result = key
    for place in placeholders:
        result = result.replace("*", "{" + place + only.get(place, "") + "}", 1)
    return result
