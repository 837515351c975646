"""A user's own model whose config has names of its own: what each number sizes is measured, not read.

Every number is doubled on the meta device. What moves the width of an embedding table is the residual
stream, what moves its length the vocabulary or the positions, what adds tensors the number of layers;
what else moves alone is an inner width. The config is then handed on under usual names, and the factory
is called with its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.keys import Path, get_path
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.models.shrink import Shapes, changed, moved_dims, run, shrink, tokens, tried_shapes
from sparkling_cli.models.shrink import shapes as shapes_of
from sparkling_cli.models.sizes import kind_of, walk
from sparkling_cli.models.skeleton import ConfigDict, ModelFactory, build_model

#: The usual name of a key, for each kind that is looked for.
_USUAL: Mapping[str, str] = {
    "layers": "num_hidden_layers",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
}
#: Kinds without which no small model of the class can be made.
_NEEDED = ("vocab", "hidden")
_HINT = (
    "name the keys as usual (vocab_size, hidden_size, intermediate_size, num_attention_heads, head_dim, "
    "num_hidden_layers), or write a layout file (docs: layout language) and pass it by --layout"
)


@dataclass(frozen=True)
class Renamed:
    """A config under usual names.

    Attributes:
        config: the config, some keys renamed.
        factory: takes such configs.
        own: usual path -> the user's path.
        paired: keys that size the same dims together, under their own names.
    """

    config: ConfigDict
    factory: ModelFactory
    own: Mapping[Path, Path]
    paired: tuple[frozenset[str], ...]

    def restore(self, layout: ModelLayout) -> ModelLayout:
        """The layout with the user's own keys; of a product's two factors the proved one is ``heads`` too."""
        own = {".".join(usual): ".".join(path) for usual, path in self.own.items()}
        aliases = dict(layout.aliases)
        for pair in self.paired:
            proved = [name for name in pair if name in layout.axes and layout.axes[name].widenable]
            if len(proved) == 1 and "heads" not in layout.axes:
                aliases.setdefault("heads", proved[0])
        config = {own.get(key, key): term for key, term in layout.config.items()}
        return replace(layout, config=config, aliases=aliases)


def usual_names(config: Mapping[str, Any], factory: ModelFactory) -> Renamed:
    """Find what the numbers with unknown names size, and name them as usual.

    Raises:
        LayoutError: the vocabulary or the residual stream is none of the numbers; says what each moves.
    """
    plain = copy.deepcopy(dict(config))
    unknown = [
        (path, value)
        for path, value in walk(plain)
        if type(value) is int and value > 0 and kind_of(path[-1]) is None
    ]
    named = {kind_of(path[-1]) for path, value in walk(plain) if value is not None}
    if not unknown:
        return Renamed(plain, factory, {}, ())
    moves = _moves(plain, factory, unknown)
    kinds = _kinds(plain, factory, moves, named)
    missing = [kind for kind in _NEEDED if kind not in named and kind not in kinds]
    if missing:
        tried = "; ".join(f"{'.'.join(path)} {_described(moved)}" for path, moved in moves.items())
        raise LayoutError(
            f"no number in this model's config is its {' or '.join(missing)}. Doubled one by one: {tried}",
            hint=_HINT,
        )
    found = _renamed(plain, factory, kinds, _pairs(moves))
    if "heads" in named or not any(not moved for moved in moves.values()):
        return found
    heads = _silent_heads(found, [path for path, moved in moves.items() if not moved])
    return found if heads is None else _renamed(plain, factory, {**kinds, "heads": heads}, _pairs(moves))


@dataclass(frozen=True)
class _Moved:
    """What doubling a number does: dims that grow, tensors that come, or what the class raises."""

    dims: frozenset[tuple[str, int]] = frozenset()
    added: int = 0
    refused: str = ""

    def __bool__(self) -> bool:
        return bool(self.dims or self.added or self.refused)


def _moves(
    config: ConfigDict, factory: ModelFactory, unknown: Sequence[tuple[Path, int]]
) -> dict[Path, _Moved]:
    base = shapes_of(config, factory)
    tried = ((path, tried_shapes(changed(config, {path: 2 * value}), factory)) for path, value in unknown)
    return {path: _difference(base, other) for path, other in tried}


def _difference(base: Shapes, other: Shapes | str) -> _Moved:
    if isinstance(other, str):
        return _Moved(refused=" ".join(other.split())[:100])
    if not base.keys() <= other.keys():
        return _Moved(refused="other tensors")
    return _Moved(frozenset(moved_dims(base, other)), len(other) - len(base))


def _described(moved: _Moved) -> str:
    if moved.refused:
        return f"is refused ({moved.refused})"
    if moved.added:
        return f"adds {moved.added} tensors"
    names = sorted({name for name, _ in moved.dims})
    return f"moves {len(names)} tensors, e.g. {names[0]}" if names else "moves nothing"


def _kinds(
    config: ConfigDict, factory: ModelFactory, moves: Mapping[Path, _Moved], named: set[str | None]
) -> dict[str, Path]:
    """Kind -> key, for kinds that no key has by its name."""
    model = build_model(config, factory=factory)
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    heads = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    wide = [p for p, m in moves.items() if any((t, 1) in m.dims for t in tables)]
    long = [p for p, m in moves.items() if p not in wide and any((t, 0) in m.dims for t in tables)]
    # The vocabulary also moves the head's rows; without a head of its own it is the longest table.
    long.sort(key=lambda p: (not any((h, 0) in moves[p].dims for h in heads), -get_path(config, p)))
    inner = [p for p, m in moves.items() if m.dims and not m.added and p not in wide and p not in long]
    alone = [p for p in inner if not any(moves[p].dims & moves[q].dims for q in inner if q != p)]
    found = {
        "layers": sorted((p for p, m in moves.items() if m.added), key=lambda p: -moves[p].added),
        "hidden": sorted(wide, key=lambda p: -len(moves[p].dims)),
        "vocab": long[:1],
        "positions": long[:1] if "vocab" in named else long[1:2],
        "ffn": alone if len(alone) == 1 and not named & {"ffn", "expert_ffn"} else [],
    }
    return {kind: paths[0] for kind, paths in found.items() if paths and kind not in named}


def _pairs(moves: Mapping[Path, _Moved]) -> tuple[frozenset[str], ...]:
    """Keys that move exactly the same dims, two by two: factors of one product."""
    paths = [p for p, m in moves.items() if m.dims and not m.added]
    groups: dict[frozenset[tuple[str, int]], list[Path]] = {}
    for path in paths:
        groups.setdefault(moves[path].dims, []).append(path)
    return tuple(frozenset(p[-1] for p in group) for group in groups.values() if len(group) == 2)


def _renamed(
    config: ConfigDict, factory: ModelFactory, kinds: Mapping[str, Path], paired: tuple[frozenset[str], ...]
) -> Renamed:
    own = {(*path[:-1], _USUAL[kind]): path for kind, path in kinds.items()}
    moved = copy.deepcopy(config)
    for usual, path in own.items():
        inner = moved if len(path) == 1 else get_path(moved, path[:-1])
        inner[usual[-1]] = inner.pop(path[-1])

    def build(given: ConfigDict) -> Any:
        back = copy.deepcopy(given)
        for usual, path in own.items():
            inner = back if len(path) == 1 else get_path(back, path[:-1])
            inner[path[-1]] = inner.pop(usual[-1])
        return factory(back)

    return Renamed(moved, build, own, paired)


def _silent_heads(found: Renamed, idle: Sequence[Path]) -> Path | None:
    """The one number that sizes nothing, divides the residual stream, and changes the logits."""
    hidden = next(v for p, v in walk(found.config) if kind_of(p[-1]) == "hidden")
    try:
        tiny = shrink(found.config, factory=found.factory)
    except LayoutError:
        return None
    model = build_model(tiny, meta=False, factory=found.factory)
    before = run(model, tokens(tiny))
    candidates = []
    for path in idle:
        value = get_path(tiny, path)
        if not isinstance(value, int) or hidden % value:
            continue
        try:
            other = build_model(changed(tiny, {path: 2 * value}), meta=False, factory=found.factory)
            other.load_state_dict(model.state_dict())
            if not torch.equal(run(other, tokens(tiny)), before):
                candidates.append(path)
        except Exception:  # a number that cannot be doubled here may still be a count of heads
            candidates.append(path)
    return candidates[0] if len(candidates) == 1 else None
