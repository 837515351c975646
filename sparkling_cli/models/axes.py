"""The axes of a tiny model: which config keys size it, grouped into axes that can grow.

Found by doubling every integer of the config on the meta device and looking at which shapes move.
Names come from hints (``sizes``); what moves is measured; what a dim that moves may mean says ``terms``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from sparkling_cli.layout.keys import Path, get_path
from sparkling_cli.models.shrink import Shapes, changed, moved_dims, tried_shapes
from sparkling_cli.models.shrink import shapes as shapes_of
from sparkling_cli.models.sizes import OTHER_MODALITY, kind_of, tower_outputs, walk
from sparkling_cli.models.skeleton import ConfigDict, ModelFactory

#: Config path -> names of the axes (and numbers) whose product is its value.
Terms = dict[Path, tuple[str, ...]]
#: Kinds whose keys size nothing that could be an axis.
_IGNORED = frozenset({"token", "layers", "shared_layers", "multiple", "top_k", "window", "groups"})
#: The axis that says how many experts work on one token: no tensor has it.
PER_TOKEN = "experts_per_token"
#: Of keys that say how many of something are chosen, those that choose experts.
_CHOOSES_EXPERTS = re.compile(r"expert|^moe|^top_?k$")
#: Kinds of axes that are never widened, with the reason.
FROZEN: Mapping[str, str] = {
    "vocab": "a table of tokens beside the vocabulary",
    "positions": "the number of positions is not a width",
    "experts": "a count of experts beside another one",
    "shared_experts": "the number of shared experts is not a width",
    "qk_rope": "rotary frequencies would move",
    "head_dim": "attention is scaled by it, and rotary frequencies, where there are any, would move",
}


@dataclass(frozen=True)
class TinyAxis:
    """One axis of the tiny model.

    Attributes:
        kind: what its keys' names hint at, or None.
        size: entries in the tiny model.
    """

    kind: str | None
    size: int


@dataclass(frozen=True)
class TinyAxes:
    """Axes of a tiny config, and how a config is made from axis sizes.

    Attributes:
        config: the tiny config.
        axes: by name.
        terms: of every config path that sizes something; it is a key of the last axis in it.
        shapes: of every tensor of the tiny model's state dict.
        moved: axis -> shapes with that axis doubled (absent: the class refuses that).
        refused: axis -> what the class raised.
        coupled: axes that only grow together with hidden.
        blocks: how many blocks with a share of the heads there are: a number, or the axis of a key.
    """

    config: ConfigDict
    axes: dict[str, TinyAxis]
    terms: Terms
    shapes: Shapes
    moved: dict[str, Shapes] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    coupled: tuple[str, ...] = ()
    blocks: str = "1"

    @property
    def sizes(self) -> dict[str, int]:
        """Axis sizes of the tiny model."""
        return {name: axis.size for name, axis in self.axes.items()}

    def keys(self, axis: str) -> list[Path]:
        """Config paths that hold an axis; none of one that follows from others."""
        return [path for path, names in self.terms.items() if names[-1] == axis]

    def resized(self, factors: Mapping[str, int]) -> ConfigDict:
        """The tiny config with some axes multiplied."""
        values = {
            path: prod(int(n) if n.isdigit() else self.axes[n].size * factors.get(n, 1) for n in names)
            for path, names in self.terms.items()
            if any(name in factors for name in names)
        }
        return changed(self.config, values)


def find_axes(config: ConfigDict, *, factory: ModelFactory | None = None) -> TinyAxes:
    """Measure which keys of a tiny config size its tensors, and name the axes."""
    base = shapes_of(config, factory)
    sizing: dict[Path, int] = {}
    weights: dict[Path, int] = {}
    idle: set[Path] = set()
    for path, value in _integers(config):
        shapes = tried_shapes(changed(config, {path: 2 * value}), factory)
        # A key that cannot move alone (heads that must divide hidden) may still be half of an axis.
        if isinstance(shapes, str) or shapes != base or kind_of(path[-1]) in ("heads", "kv_heads"):
            sizing[path] = value
            weights[path] = 0 if isinstance(shapes, str) else len(moved_dims(base, shapes))
            if shapes == base:
                idle.add(path)
    _drop_unread(sizing, idle)
    axes, terms = _grouped(_without_towers(_text_first(sizing, weights), config), idle)
    _with_towers(axes, terms, config)
    _with_totals(terms, config)
    found = TinyAxes(config, axes, terms, base)
    for name in list(axes):
        shapes = tried_shapes(found.resized({name: 2}), factory)
        if isinstance(shapes, str):
            found.refused[name] = shapes
        else:
            found.moved[name] = shapes
            _rebase(found, name)
    _add_per_token(found)
    return coupled(found, factory)


def chooses_experts(key: str) -> bool:
    """Whether a config key says how many experts work on a token."""
    return kind_of(key) == "top_k" and _CHOOSES_EXPERTS.search(key) is not None


def _add_per_token(found: TinyAxes) -> None:
    """The number of experts that work on a token, where a key beside the number of experts says it."""
    if "experts" not in found.axes:
        return
    beside = found.keys("experts")[0][:-1]
    counts: dict[Path, int] = {}
    for path, value in walk(found.config):
        value = value[0] if isinstance(value, list) and value and len(set(map(repr, value))) == 1 else value
        if path[:-1] == beside and chooses_experts(path[-1]) and type(value) is int and value > 0:
            counts[path] = value
    if len(set(counts.values())) == 1:
        found.axes[PER_TOKEN] = TinyAxis("top_k", next(iter(counts.values())))
        found.terms.update(dict.fromkeys(counts, (PER_TOKEN,)))


def _drop_unread(sizing: dict[Path, int], idle: set[Path]) -> None:
    """Forget counts of heads that no tensor reads.

    Counts of key/value heads that move nothing and are not those of queries; counts of heads that move
    nothing where another count beside them does (a key that an older version of the class had).
    """
    for path in [p for p in idle if kind_of(p[-1]) == "heads"]:
        if any(p[:-1] == path[:-1] and kind_of(p[-1]) == "heads" and p not in idle for p in sizing):
            del sizing[path]
            idle.discard(path)
    for path in [p for p in idle if kind_of(p[-1]) == "kv_heads"]:
        beside = [p for p in sizing if p[:-1] == path[:-1] and kind_of(p[-1]) == "heads"]
        if all(sizing[p] != sizing[path] for p in beside):
            del sizing[path]
            idle.discard(path)


def _rebase(found: TinyAxes, name: str) -> None:
    """Count an axis in the largest unit that every dim of it is a multiple of.

    Some classes give the width before a gate halves it: the axis is then half as long as its key says.
    """
    axis, shapes, keys = found.axes[name], found.moved[name], found.keys(name)
    if len(keys) != 1 or axis.kind not in ("ffn", "expert_ffn", "shared_ffn"):
        return
    steps = {b - a for a, b in moved_dims(found.shapes, shapes).values()}
    halves = all(2 * step % axis.size == 0 for step in steps)
    if not halves or all(step % axis.size == 0 for step in steps):
        return
    found.axes[name] = TinyAxis(axis.kind, axis.size // 2)
    found.terms[keys[0]] = ("2", name)


def _text_first(sizing: Mapping[Path, int], weights: Mapping[Path, int]) -> dict[Path, int]:
    """Keys of the part of the config that holds the vocabulary first; wide-reaching keys first."""
    text = {p[:-1] for p in sizing if kind_of(p[-1]) == "vocab"}
    order = sorted(sizing, key=lambda p: (p[:-1] not in text, -weights[p]))
    return {p: sizing[p] for p in order}


def _without_towers(sizing: Mapping[Path, int], config: ConfigDict) -> dict[Path, int]:
    """The keys, text first, but for widths of what enters the text from a tower: they are hidden's own."""
    hidden = next((value for path, value in sizing.items() if kind_of(path[-1]) == "hidden"), 0)
    outputs = [path for path in tower_outputs(config, hidden) if kind_of(path[-1]) != "hidden"]
    return {path: value for path, value in sizing.items() if path not in outputs}


def _integers(config: Mapping[str, Any]) -> list[tuple[Path, int]]:
    found = []
    text = {p[:-1] for p, _ in walk(config) if kind_of(p[-1]) == "vocab"}
    for path, value in walk(config):
        if kind_of(path[-1]) in _IGNORED:
            continue
        # In a composite config only the part with the vocabulary is widened.
        if path[:-1] not in text and (() not in text or OTHER_MODALITY.search(".".join(path[:-1]))):
            continue
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if type(value) is int and value > 0:
            found.append((path, value))
    return found


def _with_towers(axes: Mapping[str, TinyAxis], terms: Terms, config: ConfigDict) -> None:
    """Count the keys that repeat hidden as the width of a tower's output among hidden's own."""
    hidden = axes.get("hidden")
    if hidden is not None:
        paths = [path for path in tower_outputs(config, hidden.size) if path not in terms]
        terms.update(dict.fromkeys(paths, ("hidden",)))


def _with_totals(terms: Terms, config: ConfigDict) -> None:
    """Count a number that is a list's for every layer (``num_attention_heads_per_layer``) among its keys."""
    for path, names in list(terms.items()):
        total = (*path[:-1], path[-1].removesuffix("_per_layer"))
        listed = get_path(config, path)
        if total not in terms and isinstance(listed, list) and get_path(config, total) == listed[0]:
            terms[total] = names


def _grouped(sizing: Mapping[Path, int], idle: set[Path]) -> tuple[dict[str, TinyAxis], Terms]:
    axes: dict[str, TinyAxis] = {}
    terms: Terms = {}

    def add(wanted: str, kind: str | None, size: int, path: Path, keys: Iterable[Path]) -> str:
        name = _fresh(axes, wanted, path)
        axes[name] = TinyAxis(kind, size)
        terms.update(dict.fromkeys(keys, (name,)))
        return name

    for path, value in sizing.items():
        heads = _partner(path, sizing) if kind_of(path[-1]) == "kv_heads" else None
        if heads is not None and heads not in terms:
            if sizing[heads] == value:
                add("heads", "heads", value, heads, (heads, path))
            else:
                name = add("kv_heads", "kv_heads", value, path, (path,))
                wanted = "q_per_kv" if name == "kv_heads" else f"{name}_q_per_kv"
                terms[heads] = (name, add(wanted, "q_per_kv", sizing[heads] // value, path, ()))
    for path in sorted(sizing, key=lambda p: kind_of(p[-1]) != "hidden"):
        kind, value = kind_of(path[-1]), sizing[path]
        keys = [path]
        if kind in ("hidden", "vocab"):  # further keys, and tables of the same tokens
            beside = (p for p in sizing if p[:-1] == path[:-1] and kind_of(p[-1]) == kind)
            keys = [p for p in beside if sizing[p] == value]
        elif kind == "heads" and path in idle:
            # Counts that size nothing by themselves cannot be told apart: they grow as one.
            keys = sorted(p for p in idle if sizing[p] == value and p not in terms)
        if path not in terms:
            add(kind if kind in _NAMED else path[-1], kind, value, path, keys)
    return axes, terms


#: Kinds whose name is the axis's name; other axes are named after their config key.
_NAMED = frozenset(
    {
        "hidden",
        "ffn",
        "expert_ffn",
        "shared_ffn",
        "heads",
        "kv_heads",
        "head_dim",
        "vocab",
        "experts",
        "v_dim",
    }
    | {"kv_lora", "q_lora", "qk_nope", "qk_rope"}
)


def _partner(kv: Path, sizing: Mapping[Path, int]) -> Path | None:
    """The query-head key that belongs to a kv-head key: the nearest name, in the same config."""
    found = [
        p for p in sizing if p[:-1] == kv[:-1] and kind_of(p[-1]) == "heads" and sizing[p] % sizing[kv] == 0
    ]
    return max(found, key=lambda p: _alike(p[-1], kv[-1]), default=None)


def _alike(a: str, b: str) -> tuple[int, int]:
    """Common prefix, then words in common; ``num_attention_heads`` before ``swa_...``."""
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    return common, len(set(a.split("_")) & set(b.split("_")))


def _fresh(axes: Mapping[str, TinyAxis], name: str, path: Path) -> str:
    for candidate in (name, path[-1], "_".join(path)):
        clean = "".join(c if c.isalnum() else "_" for c in candidate).strip("_")
        if clean and clean not in axes:
            return clean
    return "_".join(path) + "_" + str(len(axes))


def coupled(found: TinyAxes, factory: ModelFactory | None, *, always: bool = False) -> TinyAxes:
    """Find head counts without a head_dim of their own: hidden and heads grow together only.

    Args:
        found: the axes.
        factory: the user's own model.
        always: also where more heads make some tensor larger (a bias for each).
    """
    if "hidden" not in found.axes:
        return found
    single = "kv_heads" in found.axes and found.axes["kv_heads"].size == 1
    # One key/value head cannot be doubled along: its group of queries is.
    options = ("heads", "q_per_kv") if single else ("heads", "kv_heads")
    counts = [n for n in options if n in found.axes and (always or not grows(found, n))]
    if not counts:
        return found
    if counts == ["heads"] and not single and "kv_heads" in found.axes:
        counts.append("kv_heads")  # a group's heads stand side by side: there are as many more groups
    together = with_hidden(found, counts, factory)
    if together is None:
        return found
    own = ("heads",) if "heads" in found.axes else ("kv_heads", "q_per_kv")
    heads = prod(found.axes[n].size for n in own if n in found.axes)
    axes = dict(found.axes)
    if "head_dim" not in axes and axes["hidden"].size % heads == 0:
        axes["head_dim"] = TinyAxis("head_dim", axes["hidden"].size // heads)
    return replace(together, axes=axes)


def with_hidden(found: TinyAxes, others: Sequence[str], factory: ModelFactory | None) -> TinyAxes | None:
    """The axes where hidden grows together with others; None if the class refuses that."""
    shapes = tried_shapes(found.resized(dict.fromkeys(("hidden", *others), 2)), factory)
    if isinstance(shapes, str):
        return None
    return replace(found, moved={**found.moved, "hidden": shapes}, coupled=tuple(others))


def grows(found: TinyAxes, name: str) -> bool:
    """Whether doubling the axis makes some tensors larger and none smaller."""
    shapes = found.moved.get(name, {})
    steps = [b - a for a, b in moved_dims(found.shapes, shapes).values()]
    return shapes.keys() == found.shapes.keys() and min(steps, default=0) > 0
