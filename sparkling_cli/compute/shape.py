"""How many parameters a model has, and how many of them work on one token.

Everything follows from the layouts: a tensor's shape from its dims and the axes' sizes, the number of
such tensors from the axes in its name. A tensor belongs to *one expert of many* when an expert axis is
stacked in it (``experts | ...``, ``experts -> ffn``, ``(experts ffn) <- hidden``) or stored in its name
(``{experts}``, ``experts.{index_2}``); of those a token uses ``used/size``. Everything else, the router,
shared experts and embeddings included, is active. Buffers are no parameters.

The convention is the paper's (it reproduces Table 2): every parameter counts once, embeddings and norms
too; a tied output head is the embedding itself and is not counted again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import Product, Role, axis_names
from sparkling_cli.layout.model import ModelLayout, TensorPattern, entries_of
from sparkling_cli.widening.geometry import Growth, grown_layout

if TYPE_CHECKING:
    from sparkling_cli.formats.model import Checkpoint

#: Config keys that say how many experts work on one token. Each is what one or more model families of
#: transformers, or a trainer, call it; the meaning is the same, so no architecture is named.
EXPERTS_PER_TOKEN_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
    "expert_top_k",
    "router_top_k",
    "n_expert_per_token",
    "moe_router_topk",
    "top_k",
)


#: A list of experts in a name: the axis is called by its place, not by what it counts.
_NUMBERED = re.compile(r"(?:^|\.)experts\.\{(\w+)")


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one model.

    Attributes:
        total: all of them.
        active: those that work on one token (N of Eq. 29).
        embedding: those of tensors indexed by vocabulary entry, a tied head once; part of both.
    """

    total: int
    active: int
    embedding: int = 0


@dataclass(frozen=True)
class ModelShape:
    """What counting needs of a model.

    Attributes:
        layout: of the model.
        used: expert axis -> how many of its entries work on one token.
    """

    layout: ModelLayout
    used: Mapping[str, int] = field(default_factory=dict)

    def grown(self, growth: Mapping[str, Growth]) -> ModelShape:
        """The same model with wider axes, and more layers."""
        more = growth.get("experts_per_token")
        used = self.used if more is None else dict.fromkeys(self.used, more.target)
        return ModelShape(grown_layout(self.layout, growth), used)

    def count(self) -> ParameterCount:
        """Total and active parameters.

        Raises:
            LayoutError: an axis has no size.
        """
        total = embedding = 0
        active = Fraction(0)
        sizes, parameters = self.layout.sizes, _parameters(self.layout)
        counted = [(pattern, entries_of(pattern, sizes)) for pattern in parameters]
        again = _counted_twice(self.layout.tied, parameters)
        for pattern, entries in (*counted, *((p, -prod(p.dims.shape(sizes))) for p in again)):
            total += entries
            active += entries * self._share(pattern)
            if "vocab" in pattern.dims.axes():
                embedding += entries
        return ParameterCount(total, round(active), embedding)

    def _share(self, pattern: TensorPattern) -> Fraction:
        """The share of a pattern's entries that works on one token."""
        share = Fraction(1)
        for axis in expert_axes(pattern) & set(self.used):
            size = self.layout.sizes[axis]
            share *= Fraction(min(self.used[axis], size), size)
        return share


def _parameters(layout: ModelLayout) -> list[TensorPattern]:
    return [pattern for pattern in layout.tensors if pattern.name not in layout.buffers]


def _counted_twice(
    tied: Iterable[Iterable[str]], parameters: Iterable[TensorPattern]
) -> Iterator[TensorPattern]:
    """The pattern of every name in a tied group but the first, where the layout lists it."""
    for group in tied:
        listed = [p for name in group for p in parameters if p.template.matches(name)]
        yield from listed[1:]


def experts_per_token(config: Mapping[str, Any]) -> int | None:
    """How many experts work on one token, if the config (or a config nested in it) says so."""
    for key in EXPERTS_PER_TOKEN_KEYS:
        value = config.get(key)
        # some families give one number per layer; equal ones are as good as one
        if isinstance(value, (list, tuple)) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    for value in config.values():
        if isinstance(value, Mapping):
            found = experts_per_token(value)
            if found is not None:
                return found
    return None


def shape_of(
    layout: ModelLayout, config: Mapping[str, Any] | None = None, *, top_k: int | None = None
) -> ModelShape:
    """What counting needs, from a layout and the config that it belongs to.

    Args:
        layout: of the model.
        config: where the number of experts per token stands; not needed without experts.
        top_k: that number, if it is known otherwise.

    Raises:
        LayoutError: the layout has experts, and nothing says how many of them work on one token.
    """
    routed = {axis for pattern in _parameters(layout) for axis in expert_axes(pattern)}
    if not routed:
        return ModelShape(layout)
    used = top_k if top_k is not None else experts_per_token(config or {})
    if used is None:
        raise LayoutError(
            f"{layout.name} has routed experts, but the config does not say how many work on one token",
            hint="give the number by --experts-per-token",
        )
    return ModelShape(layout, dict.fromkeys(sorted(routed), used))


def counted_as_stored(layout: ModelLayout, checkpoint: Checkpoint) -> ModelLayout:
    """The layout for counting: names that it ties and that a checkpoint has as two tensors count as two.

    A config may say that the head is tied where the file has another one, which transformers then loads.

    Args:
        layout: of the checkpoint.
        checkpoint: two tensors of one group are read where it has two, as far as they are the same.
    """

    def is_one(group: Sequence[str]) -> bool:
        keys = list(dict.fromkeys(checkpoint.weights[name] for name in group if name in checkpoint.weights))
        return all(checkpoint.alike(keys[0], other) for other in keys[1:])

    return replace(layout, tied=tuple(filter(is_one, layout.tied)))


def expert_axes(pattern: TensorPattern) -> set[str]:
    """Axes along which a tensor repeats for every routed expert; none for a router, with a row for each."""
    found = {axis for axis in pattern.template.axes if _routed(axis)} | set(_NUMBERED.findall(pattern.name))
    dims = pattern.dims.dims
    for dim in dims:
        beside = len(dims) > 1 and dim.role in (Role.BIAS, Role.SCALE)
        if dim.role in (Role.STACK, Role.IN) or beside or isinstance(dim.expr, Product):
            found.update(axis for axis in axis_names(dim.expr) if _routed(axis))
    return found


def _routed(axis: str) -> bool:
    return axis.endswith("experts") and "shared" not in axis
