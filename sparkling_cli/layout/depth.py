"""Depth: a deeper model is a list of layers, each of which is read from a layer of the shallower one.

The first layer that is read from a source is the old one, every further one is new. From this list (an
*order*) follow the names in the output, the lists and numbers of a config that say something layer by layer,
and the layout of the deeper model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.keys import lookup
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.layout.names import NUMBER, renumbered, skeleton

#: Target layer -> the layer that it is read from.
Order = tuple[int, ...]
#: The axis in names that counts layers.
LAYERS = "layers"

#: Numbers that say how many of the first layers are of a kind of their own.
FIRST = re.compile(r"first_k_dense|num_dense_layers|_layer_start_index$")
#: The same, of classes in which the number may mean nothing; where it does, and the first layers are not the
#: first ones any more, the class is given a list of kinds instead (``models.kinds``).
_MAYBEFIRST = re.compile(r"^max_window_layers$")
#: The number of the last layer of a kind.
_LAST = re.compile(r"_layer_end_index$")
#: Numbers that say how many of the last layers are of a kind of their own.
_BEHIND = re.compile(r"^num_kv_shared_layers$")
#: Lists of layers' numbers.
_INDICES = re.compile(r"idx|indices|_layers$|layer_ids")
#: Lists that have something for each layer under a name that looks like one of numbers.
_EACH = re.compile(r"no_rope_layers$")
#: Lists of as many entries as there are layers by chance: tables of rotary frequencies, tokens, names, files.
_OTHERS = re.compile(
    r"rope_(scaling|parameters)|token|architectures|section|label|languages|limit$|range$|(ssm|mlp)_multipliers$|"
    r"_path$"
)
#: A text with a letter for each layer.
_LETTERS = re.compile(r"pattern$")


def spread(before: int, after: int) -> Order:
    """Every layer followed by its copies, these as evenly as can be: 0 0 1 1 2 2."""
    return tuple(target * before // after for target in range(after))


def appended(before: int, after: int) -> Order:
    """All layers, and behind them the last ones once more, in their order: 0 1 2 0 1 2."""
    return (*range(before), *((target - after) % before for target in range(before, after)))


def placed(before: int, after: int, at: Sequence[int]) -> Order:
    """New layers behind certain ones, as evenly as can be, the first of these first."""
    each, more = divmod(after - before, len(at))
    counts = {layer: each + (place < more) for place, layer in enumerate(at)}
    return tuple(layer for layer in range(before) for _ in range(1 + counts.get(layer, 0)))


def ordered(before: int, after: int, mode: str, at: str | Sequence[int]) -> Order:
    """The order that a spec's ``layer_mode`` and ``at`` give."""
    if mode == "stack" or at == "end":
        return appended(before, after)
    return spread(before, after) if isinstance(at, str) else placed(before, after, sorted(set(at)))


def new_layers(order: Order) -> tuple[bool, ...]:
    """For every target layer, whether it is new."""
    first = {source: target for target, source in reversed(list(enumerate(order)))}
    return tuple(first[source] != target for target, source in enumerate(order))


def places_of(order: Order) -> dict[int, tuple[int, ...]]:
    """Source layer -> the target layers that are read from it, the old one first."""
    found: dict[int, list[int]] = {}
    for target, source in enumerate(order):
        found.setdefault(source, []).append(target)
    return {source: tuple(targets) for source, targets in found.items()}


def starred(name: str) -> str:
    """A name with ``*`` for its first number, the layer's."""
    return NUMBER.sub("*", name, count=1)


def silent_value(layout: ModelLayout, name: str) -> float | None:
    """The number in all entries of a tensor of a layer that adds nothing; None where they are as they are."""
    return layout.silent.get(skeleton(name), layout.silent.get(starred(name)))


@dataclass(frozen=True)
class Places:
    """Where what belongs to a layer is in the deeper model.

    Attributes:
        stacks: beginnings of names, up to the layer's number.
        order: of the deeper model.
    """

    stacks: tuple[str, ...]
    order: Order

    @classmethod
    def of(cls, layout: ModelLayout, order: Order) -> Places:
        """Of a model's modules and parameters."""
        names = (p.name for p in layout.tensors if LAYERS in p.template.axes)
        return cls(tuple(dict.fromkeys(name.partition(f"{{{LAYERS}")[0] for name in names)), order)

    def source(self, name: str) -> str:
        """The name in the shallower model of what is called so in the deeper one."""
        stack, number, rest = self._parts(name)
        return f"{stack}{self.order[number]}{rest}" if stack else name

    def targets(self, name: str) -> list[str]:
        """The names in the deeper model of what is called so in the shallower one, the old one's first."""
        stack, number, rest = self._parts(name)
        found = [target for target, source in enumerate(self.order) if source == number]
        return [f"{stack}{target}{rest}" for target in found] if stack else [name]

    def old(self, name: str) -> str:
        """The first of these; the name itself where there is none."""
        return next(iter(self.targets(name)), name)

    def behind(self, name: str) -> str | None:
        """For a name in the deeper model that is of a new layer, that of the old one last before it."""
        stack, number, rest = self._parts(name)
        if not stack or number >= len(self.order) or not new_layers(self.order)[number]:
            return None
        return f"{stack}{max(t for t in range(number) if not new_layers(self.order)[t])}{rest}"

    def _parts(self, name: str) -> tuple[str, int, str]:
        for stack in self.stacks:
            number, dot, rest = name.removeprefix(stack).partition(".")
            if name.startswith(stack) and number.isdigit():
                return stack, int(number), dot + rest
        return "", -1, name


def deeper_layout(layout: ModelLayout, order: Order) -> ModelLayout:
    """The layout of the deeper model."""
    return _with_layers(layout, len(order), _targets(order))


def shallower_layout(layout: ModelLayout, order: Order) -> ModelLayout:
    """The layout before a model was made deeper: the inverse of :func:`deeper_layout`."""
    return _with_layers(layout, len(set(order)), lambda own: {order[t] for t in own})


def _with_layers(
    layout: ModelLayout, size: int, change: Callable[[Collection[int]], Iterable[int]]
) -> ModelLayout:
    axes = {**layout.axes, LAYERS: replace(layout.axes[LAYERS], size=size)}
    return replace(layout.renamed(lambda text: renumbered(text, LAYERS, change)), axes=axes)


def _targets(order: Order) -> Callable[[Collection[int]], list[int]]:
    """From source layers to the target layers that are read from them."""
    places = places_of(order)
    return lambda own: [target for source in own for target in places.get(source, (source,))]


def deeper_config(config: Mapping[str, Any], counts: Collection[str], order: Order) -> dict[str, Any]:
    """What a config says layer by layer, for the deeper model.

    Args:
        config: of the shallower model.
        counts: dotted keys that give the number of layers; what stands in the same tables, and in tables in
            these that are no config of another model, is about the same layers.
        order: of the deeper model.

    Returns:
        Dotted key -> new value, for all that changes but the counts.

    Raises:
        LayoutError: the first or last layers are of a kind of their own, and would not be so any more.
    """
    found: dict[str, Any] = {}
    for table in {key.rpartition(".")[0] for key in counts}:
        for key, value in _leaves(lookup(config, table) or {}, f"{table}." if table else ""):
            if key not in counts and not _OTHERS.search(key):
                new = _grown(key, value, order)
                if new != value:
                    found[key] = new
    return found


def layer_lists(config: Mapping[str, Any], counts: Collection[str]) -> Iterator[tuple[str, list[Any]]]:
    """Lists that may say something layer by layer, with their dotted keys: see :func:`deeper_config`."""
    for table in {key.rpartition(".")[0] for key in counts}:
        for key, value in _leaves(lookup(config, table) or {}, f"{table}." if table else ""):
            if isinstance(value, list) and value and not _OTHERS.search(key):
                yield key, value


def lists_layers(key: str, value: Any, layers: int) -> bool:
    """Whether a list holds layers' numbers, not one entry per layer."""
    if not isinstance(value, list) or not value or not _INDICES.search(key) or _EACH.search(key):
        return False
    whole = all(type(item) is int and 0 <= item < layers for item in value)
    return whole and sorted(set(value)) == value


def by_number(value: Any) -> bool:
    """Whether this is a table by layers' numbers."""
    named = isinstance(value, Mapping) and bool(value)
    return named and all(isinstance(key, str) and key.isdigit() for key in value)


def table_of(value: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """A table by layers' numbers for the layers of an order."""
    width = max(map(len, value))
    own = {int(number): item for number, item in value.items()}
    return {str(target).zfill(width): own[source] for target, source in enumerate(order) if source in own}


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and not by_number(value):
            if "model_type" not in value:
                yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _grown(dotted: str, value: Any, order: Order) -> Any:
    """A value for the deeper model; the same where it says nothing of single layers."""
    key, before = dotted.rpartition(".")[2], len(set(order))
    if by_number(value):
        return table_of(value, order)
    if isinstance(value, list) and value:
        if lists_layers(key, value, before):
            return [target for target, source in enumerate(order) if source in value]
        return [value[source] for source in order] if len(value) == before > 1 else value
    if isinstance(value, str) and len(value) == before and _LETTERS.search(key):
        return "".join(value[source] for source in order)
    if type(value) is not int:
        return value
    if FIRST.search(key):
        return _first(dotted, value, order) if value > 0 else value
    if _LAST.search(key) and value >= 0:
        return _first(dotted, value + 1, order) - 1
    if _BEHIND.search(key) and value > 0:
        return len(order) - _first(dotted, before - value, order)
    if _MAYBEFIRST.search(key) and 0 < value <= before:
        kinds = [source < value for source in order]
        return sum(kinds) if kinds == sorted(kinds, reverse=True) else value
    return value


def _first(dotted: str, count: int, order: Order) -> int:
    """How many layers the first ones become.

    Raises:
        LayoutError: others stand between them.
    """
    kinds = [source < count for source in order]
    if kinds != sorted(kinds, reverse=True):
        raise LayoutError(
            f"the config sets the first {count} layers apart ({dotted}); in this order they would not be the "
            "first ones any more",
            hint="choose another order: --layer-mode interleave, or --at with layers to put new ones behind",
        )
    return sum(kinds)
