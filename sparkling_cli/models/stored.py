"""What a checkpoint's files hold beside the tensors of the class, and under which prefix.

transformers loads such files without complaint: names with or without the base model's prefix, buffers that
older versions saved, layers that predict further tokens and that only training has. A layout is fitted to
them here, so that what comes after it knows every tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sparkling_cli.layout.expr import TensorLayout
from sparkling_cli.layout.model import ModelLayout, TensorPattern
from sparkling_cli.layout.names import skeleton
from sparkling_cli.layout.parse import parse_layout
from sparkling_cli.models.patterns import patterns_of, template

if TYPE_CHECKING:
    from torch import nn

    from sparkling_cli.formats.model import Checkpoint

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

#: Buffers that older versions of transformers saved and that follow from the config: causal masks, the number
#: that they are filled with, rotary frequencies, position numbers.
_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rope\.inv_freq|position_ids|(attn|attention|crossattention)\.masked_bias)$"
)
_MASK = re.compile(r"(^|\.)(attn|attention|crossattention)\.bias$")
#: Layers that predict further tokens, by the name that their trainers give them.
_PREDICTION = re.compile(r"(^|[._])mtp([._]|$)|(^|\.)nextn")
#: In the name of such a layer's own embedding; its other matrix on the vocabulary is a head.
_LOOKED_UP = "embed"


def buffers_in(shapes: Mapping[str, Shape]) -> set[str]:
    """Stored tensors that are buffers which follow from the config, by their names and shapes."""
    ends = ("inv_freq", "position_ids", "bias")  # of tens of thousands, few
    return {name for name in shapes if name.endswith(ends) and _is_buffer(name, shapes[name])}


def _is_buffer(name: str, shape: Shape) -> bool:
    mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return bool(_BUFFER.search(name) or (mask and _MASK.search(name)))


def ignored_by(model: nn.Module) -> tuple[str, ...]:
    """Patterns (regular expressions) of names that a class leaves aside when it loads a checkpoint."""
    found = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        found.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        found.add(r"(^|\.)position_ids$")
    return tuple(sorted(found))


def prefixed(names: Iterable[str], known: Callable[[str], bool], prefixes: Iterable[str]) -> dict[str, str]:
    """Names that a class knows under another prefix: name in the file -> name in the class.

    Args:
        names: in the file.
        known: whether the class has a tensor of that name.
        prefixes: of the base model, with their dot, to be added or taken off.
    """
    unknown = [name for name in names if not known(name)]
    best: dict[str, str] = {}
    for prefix in prefixes:
        added = {name: prefix + name for name in unknown}
        removed = {name: name.removeprefix(prefix) for name in unknown if name.startswith(prefix)}
        for renamed in (added, removed):
            found = {name: other for name, other in renamed.items() if known(other)}
            if len(found) > len(best):
                best = found
    return best


def fitted_to(shapes: Shapes, layout: ModelLayout) -> ModelLayout:
    """The layout with the names of a checkpoint's files, and with what they hold beside the class's tensors.

    Names that nothing explains stay without a pattern: the plan refuses them.

    Args:
        shapes: name -> shape of every weight in the files.
        layout: of the class.
    """
    if all(layout.disk_table.look_up(layout.canonical_names(shapes))) or all(map(layout.has, shapes)):
        return layout
    bases = {p.name.partition(".")[0] + "." for p in layout.disk_table.patterns if "." in p.name}
    renamed = prefixed(shapes, layout.has, sorted(bases))
    if renamed:
        layout = _with_names(layout, renamed)
    rest = {name: shape for name, shape in shapes.items() if not layout.has(name)}
    return _with_extra(layout, rest)


def without_strays(checkpoint: Checkpoint, layout: ModelLayout) -> Checkpoint:
    """The checkpoint with those weights among the further tensors that the layout does not know.

    Args:
        checkpoint: the source, or an output.
        layout: of the model, fitted to it.
    """
    if all(layout.disk_table.look_up(layout.canonical_names(checkpoint.weights))):
        return checkpoint
    loose = checkpoint.loose
    return checkpoint.without_weights([n for n in checkpoint.weights if n in loose and not layout.has(n)])


def _with_names(layout: ModelLayout, renamed: Mapping[str, str]) -> ModelLayout:
    """The layout with the file's names on disk."""
    name, other = next(iter(renamed.items()))
    added = other.removesuffix(name) if other.endswith(name) else ""
    removed = "" if added else name.removesuffix(other)
    classes = {skeleton(name) for name in renamed.values()}

    def in_file(pattern: str) -> str:
        if TensorPattern(pattern, "").template.key not in classes:
            return pattern
        return pattern.removeprefix(added) if added else removed + pattern

    disk = tuple(TensorPattern(in_file(p.name), p.layout) for p in layout.disk_table.patterns)
    parts = dict(layout.assembly) if layout.disk is not None else {p.name: (p.name,) for p in layout.tensors}
    if layout.disk is not None:
        parts |= {p.name: (p.name,) for p in layout.tensors if p.name in {d.name for d in layout.disk}}
    assembly = {module: tuple(map(in_file, own)) for module, own in parts.items()}
    others = [replace(c, tensor=in_file(c.tensor)) for c in layout.compensations if c.tensor]
    compensations = tuple(dict.fromkeys((*layout.compensations, *others)))
    groups = [tuple(map(in_file, group)) for group in layout.tied]
    tied = tuple(dict.fromkeys((*layout.tied, *groups)))
    silent = {**layout.silent, **{in_file(name): value for name, value in layout.silent.items()}}
    return replace(
        layout, disk=disk, assembly=assembly, compensations=compensations, tied=tied, silent=silent
    )


def _with_extra(layout: ModelLayout, rest: Shapes) -> ModelLayout:
    """The layout with patterns of buffers, and of prediction layers that are made as the others are."""
    ignored = [re.compile(pattern) for pattern in layout.ignored]
    layouts: dict[str, TensorLayout] = {}
    buffers = buffers_in(rest)
    for name, shape in rest.items():
        found: TensorLayout | None = None
        if name in buffers:
            found = parse_layout(f"scale {' '.join(map(str, shape))}" if shape else "")
        elif _PREDICTION.search(name) or any(pattern.search(name) for pattern in ignored):
            found = _in_prediction(name, shape, layout)
        if found is not None:
            layouts[name] = found
    extra = tuple(
        TensorPattern(template(replace(p, whole=(False,) * len(p.whole))), p.layout.text)
        for p in patterns_of(layouts)
    )
    if not extra:
        return layout
    return replace(
        layout,
        tensors=(*layout.tensors, *extra),
        disk=None if layout.disk is None else (*layout.disk, *extra),
        buffers=(*layout.buffers, *(p.name for p in extra)),
    )


def _in_prediction(name: str, shape: Shape, layout: ModelLayout) -> TensorLayout | None:
    """The layout of a tensor of a prediction layer; None where no tensor, or more than one kind, is like it.

    A prediction layer norms the last hidden state and the next token's embedding, joins the two by one matrix
    (DeepSeek-V3, Eq. 21) and has a block, a norm and maybe an embedding and a head of its own.
    """
    suffix = skeleton(name).partition("*")[1:]
    blocks = {
        p.layout: p.dims for p in layout.disk_table.patterns if p.template.key.partition("*")[1:] == suffix
    }
    alike = [dims for dims in blocks.values() if suffix[0] and dims.shape(layout.sizes) == shape]
    if alike:
        return alike[0] if len(alike) == 1 else None
    if not {"hidden", "vocab"} <= layout.sizes.keys():
        return None
    table = "vocab -> hidden" if _LOOKED_UP in name else "vocab <- hidden"
    joining = map(parse_layout, ("scale hidden", "hidden <- (2 hidden)", table))
    return next((dims for dims in joining if dims.shape(layout.sizes) == shape), None)
