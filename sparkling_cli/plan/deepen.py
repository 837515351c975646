"""A source as it is read for a deeper model: with tensors, and state, that are read for several layers.

Experts whose parameters have names of their own grow in the same way.

Everything behind it (recipes, rows, output files, verification) knows no difference: each tensor of the
output has one in this source, under its own name.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

from sparkling_cli.errors import CheckpointError, SpecError
from sparkling_cli.formats.detect import format_of
from sparkling_cli.formats.model import Checkpoint, Deepening, Pairs
from sparkling_cli.layout.depth import LAYERS, Order, new_layers
from sparkling_cli.layout.model import ModelLayout, PatternTable, TensorPattern
from sparkling_cli.layout.names import NameTemplate
from sparkling_cli.widening.geometry import Growth

#: Axis that names count, and grows -> the entry that each one is read from.
Orders = Mapping[str, Order]


def named_axes(layout: ModelLayout, growing: Container[str], form: str) -> list[str]:
    """Axes that grow and are counted in the names of parameters, the innermost first.

    Args:
        layout: of either model.
        growing: the axes that grow.
        form: the source's format: where it has no place for further parameters these are layers alone.
    """
    deep = {
        axis: place for p in layout.tensors for place, axis in enumerate(p.template.axes) if axis in growing
    }
    found = sorted(deep, key=lambda axis: -deep[axis])
    return [axis for axis in found if axis == LAYERS or isinstance(format_of(form), Deepening)]


def orders_of(layout: ModelLayout, growth: Mapping[str, Growth], form: str) -> dict[str, Order]:
    """The orders of these axes.

    Raises:
        SpecError: they differ from layer to layer.
    """
    axes = named_axes(layout, growth, form)
    apart = next((axis for axis in axes if growth[axis].by_layer), None)
    if apart is not None:
        raise SpecError(
            f"copies: each entry of {apart} has parameters under names of its own in {layout.name}, so "
            "layers cannot differ here",
            hint='give numbers for all layers, under "all"',
        )
    return {axis: growth[axis].order or growth[axis].sources for axis in axes}


def deeper_source(
    checkpoint: Checkpoint,
    layout: ModelLayout,
    orders: Orders,
    groups: Sequence[Pairs] | None = None,
) -> Checkpoint:
    """The source with the names and numbers of a model of more layers, or more experts of their own names.

    Args:
        checkpoint: the source, its states named.
        layout: of the source.
        orders: of the output's model.
        groups: of the optimizer, where they are known: see :class:`~sparkling_cli.formats.model.Deepening`.

    Raises:
        CheckpointError: a format whose files cannot hold more parameters, or further copies of the weights.
    """
    form = format_of(checkpoint.format)
    if not isinstance(form, Deepening):
        raise CheckpointError(
            f"{checkpoint.root.name}: the number of layers does not grow in a checkpoint of format "
            f"{checkpoint.format!r}",
            hint="expand the directory of transformers' Trainer, a torch file of weights and optimizer, or a "
            "directory of torch.distributed.checkpoint",
        )
    table, module = layout.disk_table, layout.module_table
    names = [layout.canonical(name) for name in checkpoint.weights]
    if not all(map(table.has, names)):
        table = module
    weights = _longer(checkpoint.weights, table, orders)
    held = (i for i in checkpoint.further if not i.left_out and (i.stored is None or 0 not in i.stored.shape))
    copy = next((item for item in held if _of_one(item.name, table, orders)), None)
    if copy is not None:
        what = " and ".join(axis.removesuffix("s") for axis in sorted(orders))
        raise CheckpointError(
            f"{copy.name} is of one {what}: what new {' and '.join(sorted(orders))} get of it is not known",
            hint=f"take it out of a copy of the checkpoint: {copy.file or checkpoint.root.name}",
        )
    groups = groups or [
        _longer([layout.canonical(str(param)) for param in group.get("params", ())], module, orders)
        for group in checkpoint.param_groups
    ]
    return form.deeper(checkpoint, weights, groups)


def is_new(pattern: TensorPattern, name: str, orders: Orders) -> bool:
    """Whether a tensor of the output's model is of a new layer, or of whatever else the orders are of."""
    at = pattern.template.at(name) or {}
    return any(new_layers(orders[axis])[index] for axis, index in at.items() if axis in orders)


def copies_on_disk(
    name: str, pattern: TensorPattern, growth: Mapping[str, Growth], orders: Orders
) -> Iterator[str]:
    """Names of the copies of a tensor whose name counts an axis that grows, where the module's does not."""
    template = pattern.template
    for axis in (axis for axis in template.axes if axis in growth and axis not in orders):
        own = template.at(name) or {}
        for index in growth[axis].copies.get(own[axis], ()):
            yield template.fill({**own, axis: index})


def _of_one(name: str, table: PatternTable, orders: Orders) -> bool:
    """Whether the name of a further tensor ends in that of one of a layer; in front of it stands its file."""
    name = name.rpartition(":")[2].strip()
    while name:
        if table.has(name):
            return not orders.keys().isdisjoint(table.find(name).template.axes)
        name = name.partition(".")[2]
    return False


def _longer(names: Iterable[str], table: PatternTable, orders: Orders) -> Pairs:
    """Tensors in a model's order, as the output's model has them: stack by stack, each as its source's."""
    pairs: Pairs = [(name, name) for name in names]
    for axis, order in orders.items():
        runs = groupby(pairs, partial(_stack, table, axis))
        pairs = [pair for stack, run in runs for pair in (_deeper(run, table, axis, order) if stack else run)]
    return pairs


def _stack(table: PatternTable, axis: str, pair: tuple[str, str]) -> str:
    """What stands before the number of the layer in a name, with the numbers in it; "" without one."""
    template = table.find(pair[0]).template
    own = template.at(pair[0]) or {}
    return template.partly({**own, axis: -1}).partition(".-1")[0] if axis in own else ""


def _deeper(
    run: Iterable[tuple[str, str]], table: PatternTable, axis: str, order: Order
) -> Iterator[tuple[str, str]]:
    """The tensors of one stack, layer by layer."""
    layers: dict[int, list[tuple[NameTemplate, dict[str, int], str]]] = {}
    for name, source in run:
        template = table.find(name).template
        own = template.at(name) or {}
        layers.setdefault(own[axis], []).append((template, own, source))
    for target, number in enumerate(order):
        for template, own, source in layers.get(number, ()):
            yield template.fill({**own, axis: target}), source
