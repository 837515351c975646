"""Hypotheses about every tensor: what its dims are, in which direction it maps.

Module types give the direction of Linear, Conv1D, Embedding and convolution weights. Raw parameters
get every direction; fused dims get every order (``terms``). A hypothesis is one option per variable.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import TensorLayout
from sparkling_cli.layout.names import skeleton
from sparkling_cli.layout.parse import parse_layout
from sparkling_cli.models.axes import TinyAxes, grows
from sparkling_cli.models.readings import attention_terms
from sparkling_cli.models.shrink import moved_dims
from sparkling_cli.models.terms import candidates, grouped_candidates

#: A variable: ("term", module, size, moves) or ("direction", tensor).
Variable = tuple[object, ...]
Options = dict[Variable, tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """All tensors of one name skeleton whose dims answer alike.

    Attributes:
        names: their names in the tiny model.
        shape: their shape in the tiny model.
        moves: per dim, axis -> entries that doubling the axis adds.
        direction: the variable that holds the direction.
        terms: per dim, the variable that holds its term.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    moves: tuple[Mapping[str, int], ...]
    direction: Variable
    terms: tuple[Variable, ...]

    def text(self, choice: Mapping[Variable, str]) -> str:
        """The layout under one option per variable."""
        return choice[self.direction].format(*(choice[t] for t in self.terms))

    def layout(self, choice: Mapping[Variable, str]) -> TensorLayout:
        """The parsed layout under one option per variable."""
        return parse_layout(self.text(choice))

    def involves(self, axis: str) -> bool:
        """Whether growing the axis changes this tensor's shape."""
        return any(axis in m for m in self.moves)


@dataclass(frozen=True)
class Hypotheses:
    """Every family with the options of every variable, the likeliest option first."""

    families: tuple[Family, ...]
    options: Options
    unexplained: Mapping[str, Mapping[str, str]]
    """tensor -> axis -> why no term fits the dim that the axis moves"""


def hypotheses(found: TinyAxes, model: nn.Module) -> Hypotheses:
    """All hypotheses about the tensors of a (meta) model."""
    kinds = {name: axis.kind for name, axis in found.axes.items()}
    tied = _tied_heads(model)
    grouped: dict[tuple[object, ...], list[str]] = {}
    moves: dict[str, tuple[dict[str, int], ...]] = {}
    growing = {
        axis: moved_dims(found.shapes, shapes)
        for axis, shapes in found.moved.items()
        if axis not in found.coupled and grows(found, axis)
    }
    for name, shape in found.shapes.items():
        moves[name] = tuple(
            {axis: dims[name, i][1] - n for axis, dims in growing.items() if (name, i) in dims}
            for i, n in enumerate(shape)
        )
        key: tuple[object, ...] = (
            skeleton(name),
            shape,
            tuple(tuple(sorted(m.items())) for m in moves[name]),
        )
        grouped.setdefault(key, []).append(name)
    hidden = found.sizes.get("hidden", 0)
    fused = any(shape == (3 * hidden, hidden) for shape in found.shapes.values())
    options: Options = {}
    unexplained: dict[str, dict[str, str]] = {}
    families = []
    for key, names in grouped.items():
        name, shape = names[0], found.shapes[names[0]]
        terms = []
        attention = _attention_dims(found, name, moves[name], fused)
        for i, (n, moved) in enumerate(zip(shape, moves[name], strict=True)):
            place = (n, tuple(sorted(moved.items())), *attention[i : i + 1])
            variable: Variable = ("term", skeleton(name).rpartition(".")[0], *place)
            if variable not in options:
                own = attention_terms(found, n // found.sizes["hidden"]) if True in place[2:] else []
                fits = own + _parsed_candidates(n, moved, found, kinds)
                options[variable] = tuple(fits or [str(n)])
            if options[variable] == (str(n),):
                for axis in moved:
                    adds = ", ".join(f"{other} adds {entries}" for other, entries in moved.items())
                    why = f"in a tiny model its dim of {n} is no product or sum of axes: twice {adds}"
                    unexplained.setdefault(name, {})[axis] = why
            terms.append(variable)
        direction: Variable = ("direction", *key)
        options[direction] = directions(model, name, shape, _stacked(moves[name], kinds), tied=name in tied)
        families.append(Family(tuple(names), shape, moves[name], direction, tuple(terms)))
    return Hypotheses(tuple(families), options, unexplained)


def _attention_dims(
    found: TinyAxes, name: str, moves: Sequence[Mapping[str, int]], fused: bool
) -> tuple[bool, ...]:
    """Which dims of a tensor may be an attention's own, of those that hidden sizes; () if it is no matter.

    They are rows of what makes queries, keys and values, and columns of what uses the values up, which is
    square; where three are not made as one (``fused``), rows of square ones too.
    """
    if not attention_terms(found, 1):
        return ()
    hidden, shape = found.sizes["hidden"], found.shapes[name]
    matrix = found.shapes.get(f"{name.rpartition('.')[0]}.weight", shape)
    if matrix not in ((hidden, hidden), (3 * hidden, hidden)) or any(set(m) != {"hidden"} for m in moves):
        return (False,) * len(shape)
    square = matrix == (hidden, hidden)
    return (not square or not fused, square)[: len(shape)]


def _parsed_candidates(
    n: int, moved: Mapping[str, int], found: TinyAxes, kinds: Mapping[str, str | None]
) -> list[str]:
    texts = candidates(n, moved, found.sizes, kinds, found.blocks)
    if found.coupled and "hidden" in moved and set(moved) <= {"hidden", "kv_heads"}:
        texts += grouped_candidates(n, found.sizes)
    if moved.get("hidden") == n and not texts:
        rest = {axis: entries for axis, entries in moved.items() if axis != "hidden"}
        for axis in found.coupled:  # of hidden only because the two grow together
            texts += candidates(n, {axis: n, **rest}, found.sizes, kinds, found.blocks)
    if moved.get("hidden") == n and len(moved) > 1:
        for axis in (a for a in found.coupled if found.axes[a].kind is None):  # the product is divided by it
            texts = [f"({axis} {n // found.sizes[axis]})"]
    fits = []
    for text in texts:
        try:
            parsed = parse_layout(f"scale {text}")
            if parsed.shape(found.sizes) == (n,):
                fits.append(text)
        except LayoutError:
            continue
    return list(dict.fromkeys(fits))


def _tied_heads(model: nn.Module) -> frozenset[str]:
    """Names of linear weights that share their storage with an embedding."""
    owners: dict[int, list[str]] = {}
    embeddings: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{name}" if module_name else name)
            if isinstance(module, torch.nn.Embedding):
                embeddings.add(id(parameter))
    return frozenset(n for key in embeddings for n in owners[key] if len(owners[key]) > 1)


def directions(
    model: nn.Module, name: str, shape: tuple[int, ...], stacked: bool, *, tied: bool
) -> tuple[str, ...]:
    """Direction templates for a tensor, the likeliest first; ``{i}`` stands for dim i.

    ``stacked``: the leading dim counts experts.
    """
    if not shape:
        return ("",)
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name) if owner_name else model
    matrix = getattr(owner, "weight", None)
    if tied:
        return ("{0} -> {1}",)
    if len(shape) == 1:
        follows = leaf.endswith("bias") and matrix is not None and matrix.ndim >= 2
        return ("bias {0}",) if follows else ("scale {0}",)
    if len(shape) == 2 and leaf == "weight":
        if isinstance(owner, torch.nn.Linear):
            return ("{0} <- {1}",)
        if isinstance(owner, torch.nn.Embedding) or type(owner).__name__ == "Conv1D":
            return ("{0} -> {1}",)
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    if isinstance(owner, convolutions) and leaf == "weight":
        taps = " ".join(f"{{{i}}}" for i in range(2, len(shape)))
        return (f"scale {{0}} {{1}} {taps}",) if shape[1] == 1 else (f"{{0}} <- {{1}} {taps}",)
    return _raw_directions(leaf, shape, stacked)


def _stacked(moves: tuple[Mapping[str, int], ...], kinds: Mapping[str, str | None]) -> bool:
    """Whether the leading dim counts experts, routed or shared."""
    return bool(moves and moves[0]) and all(kinds[a] in ("experts", "shared_experts") for a in moves[0])


def _raw_directions(leaf: str, shape: tuple[int, ...], stacked: bool) -> tuple[str, ...]:
    """Every direction of a raw parameter; a leading dim of experts may be a stack."""
    found: dict[str, None] = {}
    starts = [1, 0] if stacked and len(shape) > 2 else [0, 1] if stacked else [0]
    for start in starts:
        stack = " ".join(f"{{{i}}}" for i in range(start))
        prefix = f"{stack} | " if stack else ""
        dims = [f"{{{i}}}" for i in range(start, len(shape))]
        for split, arrow in itertools.product(range(1, len(dims)), ("<-", "->")):
            text = f"{' '.join(dims[:split])} {arrow} {' '.join(dims[split:])}"
            found[prefix + text] = None
        word = "bias" if "bias" in leaf else "scale"
        found[f"{prefix}{word} {' '.join(dims)}"] = None
    return tuple(found)
