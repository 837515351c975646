"""Depth: which tensors make a new layer do nothing yet, found and proved on a tiny model.

New layers are copies of old ones in which some tensors are a constant. Which ones is found by trying: all
that may end a branch are silenced at once, then one after the other is left as it is if the logits still
stay, bit for bit. Zeros in front of a norm also silence a layer, but the first step of training would bring
it up to its full size at once, since a norm divides by the size of its input; there the norm is silenced.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.depth import (
    Order,
    Places,
    appended,
    deeper_config,
    placed,
    spread,
    starred,
)
from sparkling_cli.layout.expr import Axis, Role, TensorLayout, axis_names
from sparkling_cli.layout.keys import Path, get_path, path_of, set_path
from sparkling_cli.models.parity import LogitParity
from sparkling_cli.models.patterns import split
from sparkling_cli.models.shrink import run, tokens
from sparkling_cli.models.sizes import OTHER_MODALITY, kind_of, walk
from sparkling_cli.models.skeleton import build_model

#: A step from silence towards the source, and the largest share of the source's effect that it may have.
_STEP, _SHARE = 1e-2, 0.1
#: Further random weights on which silence is tried, and how many times as many tokens.
_SEEDS, _MORE = (1, 2, 3), 16
_CHANGES = "a layer whose output projections are zero still changes the logits"


@dataclass(frozen=True)
class Depth:
    """What was found out about the number of layers.

    Attributes:
        reason: how it was proved, or why layers cannot be added.
        proved: whether they can be.
        silent: name in the module, with ``*`` for its numbers -> the number in its entries in a new layer.
        stacks: beginnings of names, up to the first number, in which that number counts layers.
        counts: config paths that say how many there are.
        numbered: what a layer is depends on its number: new ones can only stand behind the others.
    """

    reason: str
    proved: bool = False
    silent: Mapping[str, float] = field(default_factory=dict)
    stacks: frozenset[str] = frozenset()
    counts: tuple[Path, ...] = ()
    numbered: bool = False


def find_depth(parity: LogitParity, layouts: Mapping[str, TensorLayout]) -> Depth:
    """Whether, and how, layers can be added to a tiny model without a change of its logits.

    Args:
        parity: the tiny model.
        layouts: of its tensors.
    """
    config = parity.found.config
    counts = count_keys(config)
    if not counts:
        return Depth("no key of its config says how many layers there are")
    before = int(get_path(config, counts[0]))
    reasons = []
    orders = {
        "even": spread(before, 2 * before),
        "end": appended(before, 2 * before),
        "last": placed(before, 2 * before, [before - 1]),
    }
    for name, order in orders.items():
        try:
            deeper = _Deeper(parity, layouts, counts, order)
            silent = _found(deeper, layouts)
            _confirm(parity, layouts, counts, order, silent)
        except Exception as error:  # the class's own code may raise anything
            reasons.append(" ".join(str(error).split())[:200] or type(error).__name__)
            continue
        reason = "new layers leave the logits of a tiny random model as they are, bit for bit"
        return Depth(reason, True, silent, deeper.stacks, counts, name != "even")
    return Depth(reasons[0])


def _confirm(
    parity: LogitParity,
    layouts: Mapping[str, TensorLayout],
    counts: Sequence[Path],
    order: Order,
    silent: Mapping[str, float],
) -> None:
    """The same with other random weights and more tokens: a router chooses other experts then.

    Raises:
        LayoutError: the logits change.
    """
    for seed in _SEEDS:
        other = LogitParity(parity.found, factory=parity.factory, seed=seed)
        other.ids = torch.cat([tokens(parity.found.config, seed=number) for number in range(_MORE)])
        other.logits = run(other.model, other.ids).to(torch.float64)
        if not _Deeper(other, layouts, counts, order).same(silent):
            raise LayoutError(_CHANGES)


def count_keys(config: Mapping[str, Any]) -> tuple[Path, ...]:
    """Config paths that say how many layers there are, beside the size of the vocabulary."""
    text = {p[:-1] for p, _ in walk(config) if kind_of(p[-1]) == "vocab"}
    found = {
        path: value
        for path, value in walk(config)
        if kind_of(path[-1]) == "layers"
        and type(value) is int
        and value > 1
        and (path[:-1] in text or not text)
        and not OTHER_MODALITY.search(".".join(path[:-1]))
    }
    decoder = {path: value for path, value in found.items() if not path[-1].startswith("encoder")} or found
    most = max(decoder.values(), default=0)
    return tuple(path for path, value in decoder.items() if value == most)


class _Deeper:
    """The tiny model with more layers, each with the weights of its source.

    Attributes:
        stacks: see :class:`Depth`.
        sources: name -> the name that its weights come from.
        new: names of the new layers' tensors.
        kinds: name of such a tensor -> the name for its like in all layers.
    """

    def __init__(
        self,
        parity: LogitParity,
        layouts: Mapping[str, TensorLayout],
        counts: Sequence[Path],
        order: Order,
    ) -> None:
        self.parity = parity
        config = copy.deepcopy(parity.found.config)
        dotted = {".".join(path) for path in counts}
        for key, value in deeper_config(config, dotted, order).items():
            set_path(config, path_of(key), value)
        for path in counts:
            set_path(config, path, len(order))
        self.model: nn.Module = build_model(config, meta=False, factory=parity.factory).to(parity.dtype)
        self.state = self.model.state_dict()
        before, after = _indices(parity.state), _indices(self.state)
        self.stacks = frozenset(stack for stack in before if before[stack] != after.get(stack))
        if not self.stacks:
            raise LayoutError("twice as many of them add no tensor")
        self.places = Places(tuple(self.stacks), order)
        self.sources = {name: self._source(name) for name in self.state}
        self._check_whole()
        tied = {id(t): n for n, t in parity.model.named_parameters(remove_duplicate=False)}
        shared = [n for n, t in parity.model.named_parameters(remove_duplicate=False) if tied[id(t)] != n]
        if any(name.startswith(tuple(self.stacks)) for name in shared):
            raise LayoutError("some of its layers share their weights")
        self.new = [name for name in self.state if self.places.old(self.sources[name]) != name]
        texts: dict[str, set[str]] = {}
        for name in self.new:
            texts.setdefault(split(name)[0], set()).add(layouts[self.sources[name]].text)
        apart = {key for key, found in texts.items() if len(found) > 1}
        self.kinds = {n: starred(n) if split(n)[0] in apart else split(n)[0] for n in self.new}
        self.load({})

    def _check_whole(self) -> None:
        """Every copy of a layer has all that the layer has.

        Raises:
            LayoutError: one lacks something.
        """
        for name in self.parity.state:
            for target in self.places.targets(name):
                if target not in self.state:
                    layer = split(target)[1][0]
                    raise LayoutError(f"layer {layer} of the deeper model has nothing like {name}")

    def _source(self, name: str) -> str:
        own, known = self.places.source(name), self.parity.state
        if own not in known or known[own].shape != self.state[name].shape:
            raise LayoutError(f"{name} of the deeper model is not like {own} of this one")
        return own

    def load(self, silent: Mapping[str, float], step: float = 0.0) -> None:
        """Give every tensor its source's entries; to silent ones of new layers the number, and a step."""
        fresh = set(self.new)
        with torch.no_grad():
            for name, tensor in self.state.items():
                source = self.parity.state[self.sources[name]]
                value = silent.get(self.kinds[name]) if name in fresh else None
                tensor.copy_(source if value is None else value + step * (source - value))

    def logits(self, silent: Mapping[str, float], step: float = 0.0) -> torch.Tensor:
        """Of the tokens that the tiny model was run on."""
        self.load(silent, step)
        return run(self.model, self.parity.ids).to(torch.float64)

    def same(self, silent: Mapping[str, float]) -> bool:
        """Whether the logits are those of the tiny model, bit for bit."""
        return torch.equal(self.logits(silent), self.parity.logits)

    def smooth(self, silent: Mapping[str, float]) -> bool:
        """Whether a small step away from silence has a small effect."""
        whole = (self.logits({}) - self.parity.logits).abs().max()
        part = (self.logits(silent, _STEP) - self.parity.logits).abs().max()
        return bool(part <= _SHARE * whole)

    def least(self, silent: Mapping[str, float]) -> dict[str, float]:
        """The same without what need not be silenced, looked at in its order."""
        kept = dict(silent)
        for name in silent:
            fewer = {other: value for other, value in kept.items() if other != name}
            if self.same(fewer):
                kept = fewer
        return kept


def _found(deeper: _Deeper, layouts: Mapping[str, TensorLayout]) -> dict[str, float]:
    """The tensors to silence.

    Raises:
        LayoutError: there are none with which the logits stay.
    """
    parameters = {name for name, _ in deeper.model.named_parameters()}
    names = dict.fromkeys(deeper.kinds[name] for name in deeper.new if name in parameters)
    ends, scales = _candidates(names, deeper, layouts)
    first = deeper.least(dict.fromkeys(ends, 0.0)) if deeper.same(dict.fromkeys(ends, 0.0)) else None
    if first is not None and deeper.smooth(first):
        return first
    for value in (0.0, -1.0):  # -1: of norms that multiply by 1 + w
        every = {**dict.fromkeys(ends, 0.0), **dict.fromkeys(scales, value)}
        if deeper.same(every):
            chosen = deeper.least(every)
            if deeper.smooth(chosen):
                return chosen
    if first is None:
        raise LayoutError(_CHANGES)
    return first


def _candidates(
    names: Iterable[str], deeper: _Deeper, layouts: Mapping[str, TensorLayout]
) -> tuple[list[str], list[str]]:
    """What may end a branch of a layer, the likeliest last: what makes hidden, and what scales it.

    What makes hidden alone comes behind what makes a multiple of it: an inner matrix is tried before the one
    that follows it.
    """
    of = {deeper.kinds[name]: layouts[deeper.sources[name]] for name in deeper.new}
    plain: list[str] = []
    inner: list[str] = []
    scales: list[str] = []
    for name in names:
        own = [dim for dim in of[name].dims if "hidden" in axis_names(dim.expr)]
        made = [dim for dim in own if dim.role in (Role.OUT, Role.BIAS)]
        if any(isinstance(dim.expr, Axis) for dim in made):
            plain.append(name)
        elif made:
            inner.append(name)
        elif own and all(dim.role is Role.SCALE for dim in own):
            scales.append(name)
    return ([*inner, *plain], scales) if plain else _by_shape(names, deeper)


def _by_shape(names: Iterable[str], deeper: _Deeper) -> tuple[list[str], list[str]]:
    """The same where hidden is not proved: what has as many rows as hidden, as modules have matrices."""
    hidden = deeper.parity.found.sizes.get("hidden")
    example = {kind: name for name, kind in deeper.kinds.items()}
    ends, scales = [], []
    for name in names:
        shape = deeper.state[example[name]].shape
        beside = example[name].rpartition(".")[0] + ".weight"
        matrix = beside in deeper.state and deeper.state[beside].ndim > 1
        if hidden in shape[-2:-1] or (shape[-1:] == (hidden,) and len(shape) == 1 and matrix):
            ends.append(name)
        elif tuple(shape) == (hidden,):
            scales.append(name)
    return ends, scales


def _indices(names: Iterable[str]) -> dict[str, set[int]]:
    """Beginning of names, up to the first number -> that number in all of them."""
    found: dict[str, set[int]] = {}
    for key, numbers in map(split, names):
        if numbers:
            found.setdefault(key.partition("*")[0], set()).add(numbers[0])
    return found
