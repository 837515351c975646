"""What was found out about adding layers to a tiny model, in the layout of the real one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.depth import LAYERS, starred
from sparkling_cli.layout.keys import Path, get_path, lookup
from sparkling_cli.layout.model import AxisInfo, ModelLayout
from sparkling_cli.models.depth import Depth
from sparkling_cli.models.disk import DiskTensor
from sparkling_cli.models.patterns import split
from sparkling_cli.models.prove import Findings
from sparkling_cli.models.skeleton import ConfigDict

#: the number of a stack that is no layer of the model: of another modality's tower, for one
_OTHER = "index_1"
_FIRST = re.compile(rf"\{{{LAYERS}(?P<only>=[^}}]*)?\}}")


def with_depth(
    layout: ModelLayout,
    findings: Findings,
    config: Mapping[str, Any],
    real: ConfigDict,
    prefix: Path,
) -> ModelLayout:
    """The layout with the axis ``layers``, proved or refused with the reason.

    Args:
        layout: of the real model, in which the first number of every name is called so.
        findings: on the tiny model.
        config: of the checkpoint.
        real: of the language model, defaults filled in.
        prefix: where that stands in ``config``.
    """
    if LAYERS not in layout.axes:
        return layout
    try:
        return _with_depth(layout, findings, config, real, prefix)
    except LayoutError as error:
        info = replace(layout.axes[LAYERS], reason=error.message)
        return replace(layout, axes={**layout.axes, LAYERS: info})


def _with_depth(
    layout: ModelLayout, findings: Findings, config: Mapping[str, Any], real: ConfigDict, prefix: Path
) -> ModelLayout:
    depth = findings.depth
    if not depth.proved:
        raise LayoutError(depth.reason)
    silent, stacks = dict(depth.silent), set(depth.stacks)
    for tensor in findings.disk or ():
        _add_disk_name(tensor, depth, silent, stacks)
    if any(split(item.tensor)[1] for item in layout.compensations):
        raise LayoutError("its last layer carries a factor of its own")
    layout = _others_apart(layout, stacks)
    keys = {".".join((*prefix, *path)): get_path(real, path) for path in depth.counts}
    known = {key: value for key, value in keys.items() if lookup(config, key) is not None}
    counts = known or dict(list(keys.items())[:1])
    size = layout.axes[LAYERS].size
    if set(counts.values()) != {size}:
        said = ", ".join(f"{key} = {value}" for key, value in counts.items())
        raise LayoutError(f"the config says {said}, the names have {size}")
    return replace(
        layout,
        axes={**layout.axes, LAYERS: AxisInfo(size, True, depth.reason)},
        config={**layout.config, **dict.fromkeys(counts, LAYERS)},
        silent=silent,
        numbered=depth.numbered,
    )


def _add_disk_name(tensor: DiskTensor, depth: Depth, silent: dict[str, float], stacks: set[str]) -> None:
    """What holds for a tensor in the module holds for those on disk that it is made of.

    Raises:
        LayoutError: on disk some tensor is fused with others, of which not all are silenced alike.
    """
    sources = (tensor.source, *tensor.others)
    values = {depth.silent.get(split(one)[0], depth.silent.get(starred(one))) for one in sources}
    if len(values) > 1:
        raise LayoutError(
            f"{tensor.name!r} on disk is made of tensors of which a new layer's are not all silent"
        )
    value = values.pop()
    name = split(tensor.name)[0]
    if value is not None:
        silent[name if split(tensor.source)[0] in depth.silent else starred(tensor.name)] = value
    if split(tensor.source)[0].partition("*")[0] in depth.stacks:
        stacks.add(name.partition("*")[0])


def _others_apart(layout: ModelLayout, stacks: Iterable[str]) -> ModelLayout:
    """The layout with another name for the numbers that count something else than layers."""
    own = set(stacks)

    def named(text: str) -> str:
        match = _FIRST.search(text)
        if match is None or text[: match.start()] in own:
            return text
        return f"{text[: match.start()]}{{{_OTHER}{match['only'] or ''}}}{text[match.end() :]}"

    renamed = layout.renamed(named)
    if renamed.tensors == layout.tensors:
        return layout
    size = layout.axes[LAYERS].size
    sizes = {axis: _size(renamed, axis, size) for axis in (LAYERS, _OTHER)}
    axes = {**layout.axes, LAYERS: replace(layout.axes[LAYERS], size=sizes[LAYERS])}
    axes[_OTHER] = AxisInfo(sizes[_OTHER], reason="stored in the tensors' names")
    return replace(renamed, axes=axes)


def _size(layout: ModelLayout, axis: str, most: int) -> int:
    """Entries of an axis in names, of which some patterns may have all there are."""
    found = [
        most if only is None else max(only) + 1
        for pattern in layout.tensors
        for name, only in pattern.template.placeholders
        if name == axis
    ]
    return max(found, default=0)
