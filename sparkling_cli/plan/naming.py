"""Weights under the names that the output shall have.

transformers keeps some classes under other names on disk than in the module (experts apart on disk,
fused in the module). A directory that a Trainer resumes from is written under module names: resuming
skips the conversion, and would leave what it does not find at random initialization.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from sparkling_cli.errors import LayoutError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.model import ModelLayout, TensorPattern
from sparkling_cli.storage.tensors import Extent, StoredTensor
from sparkling_cli.widening.parts import stream_of


class Weight(NamedTuple):
    """One output weight before widening.

    Attributes:
        key: key in the output.
        name: name in the output.
        module: name in the module where that is known, else ``name``.
        stored: where its bytes are now.
        pattern: its layout.
        stream: name of its random numbers, under the module's names: tied names share one, and what is
            fused in the module has the name of its part there (see ``widening.parts``).
    """

    key: str
    name: str
    module: str
    stored: StoredTensor
    pattern: TensorPattern
    stream: str


def weights_of(
    checkpoint: Checkpoint, layout: ModelLayout, names: str, *, random: bool = True
) -> tuple[tuple[Weight, ...], bool]:
    """All weights, and whether they are renamed from disk names to module names.

    Args:
        checkpoint: the source.
        layout: its layout.
        names: ``disk``, ``module`` or ``auto`` (module names when there is optimizer state).
        random: whether random streams are needed; without them ``stream`` is the weight's own name.

    Raises:
        LayoutError: a weight has no layout, a pattern no weight, or a fused tensor lacks a part.
    """
    on_disk = _has_disk_names(checkpoint, layout)
    patterns = layout.check_shapes(checkpoint.shapes, on_disk=on_disk)
    rename = on_disk and layout.disk is not None
    rename = rename and (names == "module" or (names == "auto" and bool(checkpoint.states)))
    if rename and names == "module" and not layout.assembly:
        raise LayoutError(
            f"the layout {layout.name!r} does not say which tensors on disk make up which of the module, so "
            "weights cannot be written under the module's names",
            hint="use --names disk, or give a layout file with an [assembly] table (--layout)",
        )
    if rename and layout.assembly:  # without one the format itself keeps both kinds of names
        _check_assembled(layout)
        return _assembled(checkpoint, layout, patterns), True
    part_of = _parts(layout) if on_disk and random else {}
    module_patterns = {pattern.name: pattern for pattern in layout.tensors}
    weights = []
    seen: set[str] = set()
    for (name, key), pattern in zip(checkpoint.weights.items(), patterns, strict=True):
        if key in seen:  # a tied name that shares its bytes with an earlier one
            continue
        seen.add(key)
        canonical = stream = layout.canonical(name)
        if pattern.name in part_of:
            module, place = part_of[pattern.name]
            target, unit = _target_name(name, pattern, module_patterns[module])
            alone = len(layout.assembly[module]) == 1
            stream = stream_of(target, unit if alone else (*unit, place))
        weights.append(Weight(key, name, canonical, checkpoint.tensors[key], pattern, stream))
    return tuple(weights), False


def _parts(layout: ModelLayout) -> dict[str, tuple[str, int]]:
    """Pattern on disk -> the module's pattern that it is a part of, and its place among the parts."""
    return {
        disk: (module, place) for module, parts in layout.assembly.items() for place, disk in enumerate(parts)
    }


def _has_disk_names(checkpoint: Checkpoint, layout: ModelLayout) -> bool:
    """Whether the source's names are those on disk, where these are others than the module's."""
    if layout.disk is None:
        return False
    names = layout.canonical_names(checkpoint.weights)
    try:
        layout.disk_table.find_all(names)
    except LayoutError:
        first = next((name for name in names if not layout.disk_table.has(name)), None)
        return first is None or not layout.module_table.has(first)
    return True


def _check_assembled(layout: ModelLayout) -> None:
    """Every tensor on disk is one of the module's, or a part of one.

    Raises:
        LayoutError: some tensor on disk fuses what the module keeps apart.
    """
    parts = {disk for group in layout.assembly.values() for disk in group}
    known = {pattern.name for pattern in layout.tensors}
    fused = [p.name for p in layout.disk or () if p.name not in parts and p.name not in known]
    if fused:
        raise LayoutError(
            f"{fused[0]!r} on disk is made of several tensors of the module: it cannot be written under the "
            "module's names, under which a Trainer would find it when it resumes",
            hint="use --names disk, and build the model by from_pretrained(OUTPUT) before resuming: one that "
            "is built from the config would keep its random initialization",
        )


def _assembled(
    checkpoint: Checkpoint, layout: ModelLayout, patterns: Sequence[TensorPattern]
) -> tuple[Weight, ...]:
    """Every weight under its module name; fused ones made of their parts on disk."""
    part_of = _parts(layout)
    module_patterns = {pattern.name: pattern for pattern in layout.tensors}
    parts: dict[str, dict[tuple[tuple[int, ...], int], StoredTensor]] = defaultdict(dict)
    owners: dict[str, TensorPattern] = {}
    order: dict[str, Weight | None] = {}
    for (name, key), pattern in zip(checkpoint.weights.items(), patterns, strict=True):
        canonical = layout.canonical(name)
        stored = checkpoint.tensors[key]
        if pattern.name not in part_of:
            own = layout.module_table.find(canonical)
            order[name] = Weight(key, name, canonical, stored, own, canonical)
            continue
        module, place = part_of[pattern.name]
        target, extra = _target_name(name, pattern, module_patterns[module])
        owners[target] = module_patterns[module]
        parts[target][(extra, place)] = stored
        order.setdefault(target, None)
    weights = []
    for name, weight in order.items():
        if weight is None:
            stored = _fused(name, parts[name], len(layout.assembly[owners[name].name]))
            layout.check_one(name, owners[name], stored.shape)
            weight = Weight(name, name, name, stored, owners[name], name)
        weights.append(weight)
    return tuple(weights)


def _target_name(name: str, disk: TensorPattern, module: TensorPattern) -> tuple[str, tuple[int, ...]]:
    """The module name that a part belongs to, and its indices on the stacked axes."""
    indices = disk.template.at(name) or {}
    target = module.template.fill(indices)
    extra = tuple(i for axis, i in indices.items() if axis not in module.template.axes)
    return target, extra


def _fused(name: str, parts: dict[tuple[tuple[int, ...], int], StoredTensor], templates: int) -> StoredTensor:
    """One tensor out of its parts: stacked in front, concatenated behind."""
    stacked = sorted({extra for extra, _ in parts})
    counts = tuple(max(extra[i] for extra in stacked) + 1 for i in range(len(stacked[0])))
    extents: list[Extent] = []
    width = 0
    for extra in stacked:
        offset = 0
        for place in range(templates):
            part = parts.get((extra, place))
            if part is None:
                raise LayoutError(f"{name!r} lacks its part {place} at index {extra}: a shard may be missing")
            extents += [_shifted(extent, extra, offset) for extent in part.extents]
            offset += part.shape[0]
        if width and offset != width:
            raise LayoutError(f"the parts of {name!r} at index {extra} have another size than the others")
        width = offset
    if prod(counts) != len(stacked):
        raise LayoutError(
            f"{name!r} needs {prod(counts)} stacked parts, found {len(stacked)}: a shard may be missing"
        )
    first = next(iter(parts.values()))
    if len({part.dtype for part in parts.values()}) > 1:
        raise LayoutError(f"the parts of {name!r} have different dtypes")
    return StoredTensor(first.dtype, (*counts, width, *first.shape[1:]), tuple(extents))


def _shifted(extent: Extent, extra: tuple[int, ...], offset: int) -> Extent:
    ones = (1,) * len(extra)
    strides = None if extent.strides is None else (0,) * len(extra) + extent.strides
    return extent._replace(
        start=(*extra, extent.start[0] + offset, *extent.start[1:]),
        shape=ones + extent.shape,
        strides=strides,
    )
