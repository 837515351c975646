"""A source as it is read for a deeper model: with tensors, and state, that are read for several layers.

Everything behind it (recipes, rows, output files, verification) knows no difference: each tensor of the
output has one in this source, under its own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import format_of
from sparkling_cli.formats.model import Checkpoint, Deepening
from sparkling_cli.layout.depth import LAYERS, Order, names_of, new_layers
from sparkling_cli.layout.model import ModelLayout, PatternTable, TensorPattern


def deeper_source(
    checkpoint: Checkpoint,
    layout: ModelLayout,
    order: Order,
    groups: Sequence[Sequence[tuple[str, str]]] | None = None,
) -> Checkpoint:
    """The source with the names and numbers of the deeper model.

    Args:
        checkpoint: the source, its states named.
        layout: of the source.
        order: of the deeper model.
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
    weights = list(_sequence(list(checkpoint.weights), table, order))
    copy = next((i for i in checkpoint.further if not i.left_out and _of_layer(i.name, table)), None)
    if copy is not None:
        raise CheckpointError(
            f"{copy.name} is of one layer: what new layers get of it is not known",
            hint=f"take it out of a copy of the checkpoint: {copy.file or checkpoint.root.name}",
        )
    groups = groups or [
        list(_sequence([layout.canonical(str(param)) for param in group.get("params", ())], module, order))
        for group in checkpoint.param_groups
    ]
    return form.deeper(checkpoint, weights, groups)


def is_new(pattern: TensorPattern, name: str, order: Order) -> bool:
    """Whether a tensor of the deeper model is of a new layer."""
    index = _layer(pattern, name)
    return index is not None and new_layers(order)[index]


def _layer(pattern: TensorPattern, name: str) -> int | None:
    axes, indices = pattern.template.axes, pattern.template.indices(name)
    return indices[axes.index(LAYERS)] if LAYERS in axes and indices is not None else None


def _of_layer(name: str, table: PatternTable) -> bool:
    """Whether the name of a further tensor ends in that of a layer's; in front of it stands its file."""
    name = name.rpartition(":")[2].strip()
    while name:
        if table.has(name):
            return LAYERS in table.find(name).template.axes
        name = name.partition(".")[2]
    return False


def _sequence(names: Sequence[str], table: PatternTable, order: Order) -> Iterator[tuple[str, str]]:
    """Tensors in a model's order, as the deeper model has them: layer by layer, each as its source's.

    Yields:
        The name of each, and of the one that it comes from.
    """

    def place(name: str) -> tuple[str, int | None]:
        pattern = table.find(name)
        index = _layer(pattern, name)
        return ("" if index is None else pattern.name.partition(f"{{{LAYERS}")[0]), index

    for (stack, _), found in groupby(names, lambda name: (place(name)[0], place(name)[1] is None)):
        run = list(found)
        yield from _stack(run, table, order) if stack else zip(run, run, strict=True)


def _stack(run: Iterable[str], table: PatternTable, order: Order) -> Iterator[tuple[str, str]]:
    layers: dict[int, list[str]] = {}
    for name in run:
        layers.setdefault(_layer(table.find(name), name) or 0, []).append(name)
    seen: dict[int, int] = {}
    for source in order:
        copy = seen[source] = seen.get(source, -1) + 1
        for name in layers.get(source, ()):
            yield names_of(table.find(name).template, name, order)[copy], name
