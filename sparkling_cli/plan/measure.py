"""What a tensor of a weight's shape is: measured against the weight, on a few thousand entries.

A copy or an average of a weight correlates with it, and has its size. What rounding took from a weight (a
compensation term) does not, but its magnitude follows the weight's, entry by entry. A moment does neither;
where weight decay is part of the gradient, some of the weight is in it, no more than the decay's rate allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, log, prod, sqrt
from operator import mul
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sparkling_cli.formats.optimizer_states import INITIAL, StateKind
from sparkling_cli.storage.tensors import FLOATING, StoredTensor

#: a tensor with at least this correlation with the weight is a copy or an average of it
COPY = 0.9
#: with at most this one it is none; accumulated gradients of a young run reach 0.6
NONE = 0.75
#: a copy that is known as one has at least this correlation; averages were measured down to 0.85
LEAST = 0.5
#: a copy is so many times the weight, at least and at most
SIZE = (0.5, 2.0)
#: a moment that correlates with the weight has at most so much of it, where weight decay is not the cause
MUCH = 0.25
#: correlation of the logarithms of magnitudes, of compensation terms and of everything else
SCALE, NO_SCALE = 0.6, 0.4
#: of which a compensation term follows the first power; squared gradients with weight decay follow the second
FIRST_POWER = (0.5, 1.5)
#: weights of the first step have a size within this factor of today's
_GROWN = 100.0
#: fewer entries than this say nothing
_FEWEST = 64
#: tensors that are looked at
_TENSORS = 8

#: a tensor, and the weight of its shape
Pair = tuple[StoredTensor, StoredTensor]


class Likeness(NamedTuple):
    """How a tensor resembles a weight.

    Attributes:
        values: correlation of the entries.
        size: standard deviation, in those of the weight.
        magnitudes: correlation of the logarithms of the entries' magnitudes; 0 where it was not asked for.
        power: to which power of the weight's magnitude the entries' follow it (by least squares); likewise.
    """

    values: float
    size: float
    magnitudes: float
    power: float

    @property
    def slope(self) -> float:
        """How many times the weight is in the tensor (by least squares)."""
        return self.values * self.size


def decay_slope(groups: Iterable[Mapping[str, Any]]) -> float:
    """How many times the weight is in a moment, at most, because weight decay is part of the gradient.

    An average of gradients has the rate of the decay; a sum with momentum ``m``, 1 / (1 - m) times as much.

    Args:
        groups: the optimizer's.
    """
    found = 0.0
    for group in groups:
        decay, momentum = group.get("weight_decay"), group.get("momentum")
        if isinstance(decay, (int, float)):
            kept = momentum if isinstance(momentum, (int, float)) and 0 <= momentum < 1 else 0.0
            found = max(found, decay / (1 - kept))
    return found


def measured_kind(root: Path, pairs: Iterable[Pair], decay: float = 0.0) -> tuple[StateKind, str]:
    """The kind of a state of one name, from its largest tensors, and the numbers as text.

    Args:
        root: the checkpoint.
        pairs: every tensor of that name, with its parameter's weight.
        decay: how many times the weight may be in a moment (see :func:`decay_slope`).
    """
    found = _found(root, pairs)
    if not found:
        return StateKind.UNKNOWN, "its tensors are too small, or constant"
    low, high = min(abs(one.values) for one in found), max(abs(one.values) for one in found)
    scales = sorted(one.magnitudes for one in found)
    text = (
        f"correlation with the weight {low:.2f} to {high:.2f}, of magnitudes {scales[0]:.2f} to "
        f"{scales[-1]:.2f}"
    )
    if min(one.values for one in found) >= COPY:
        slope = median(one.slope for one in found)
        text += f", {slope:.2g} times the weight"
        return StateKind.WEIGHT if _is_copy(slope, decay) else StateKind.UNKNOWN, text
    if high <= NONE and scales[-1] <= NO_SCALE:
        return StateKind.MOMENT, text
    if high <= NONE and scales[0] >= SCALE and _within(FIRST_POWER, median(one.power for one in found)):
        return StateKind.WEIGHT, text
    return StateKind.UNKNOWN, text


def doubt(root: Path, pairs: Iterable[Pair], slot: str, kind: StateKind, decay: float) -> str:
    """Why a state cannot be what its name says, in words that follow "its values"; "" if it can.

    Args:
        root: the checkpoint.
        pairs: tensors of that name, with their parameters' weights.
        slot: the name.
        kind: what it stands for.
        decay: how many times the weight may be in a moment (see :func:`decay_slope`).
    """
    found = _found(root, pairs, scales=kind is not StateKind.MOMENT)
    if not found:
        return ""
    values, slope = median(one.values for one in found), median(one.slope for one in found)
    if kind is StateKind.MOMENT:
        if median(abs(one.values) for one in found) < COPY or abs(slope) <= max(MUCH, 2 * decay):
            return ""
        return f"are those of the weights (correlation {values:.2f}, {slope:.2g} times the weight)"
    if slot in INITIAL:
        size = median(one.size for one in found)
        return "" if 1 / _GROWN <= size <= _GROWN else f"are {size:.2g} times as large as the weights"
    follows = abs(values) <= NONE and median(one.magnitudes for one in found) >= NO_SCALE
    follows = follows and _within(FIRST_POWER, median(one.power for one in found))
    return "" if values >= LEAST or follows else f"do not follow the weights (correlation {values:.2f})"


def _is_copy(slope: float, decay: float) -> bool:
    """Whether something with that much of the weight in it is a copy, which weight decay cannot explain."""
    return _within(SIZE, slope) and slope > 2 * decay


def _within(bounds: tuple[float, float], value: float) -> bool:
    return bounds[0] <= value <= bounds[1]


def _found(root: Path, pairs: Iterable[Pair], *, scales: bool = True) -> list[Likeness]:
    """Of the largest tensors that say something."""
    usable = [pair for pair in pairs if pair[0].dtype in FLOATING and prod(pair[0].shape) >= _FEWEST]
    usable.sort(key=lambda pair: -prod(pair[0].shape))
    found = (likeness(root, *pair, scales=scales) for pair in usable[:_TENSORS])
    return [one for one in found if one is not None]


def likeness(root: Path, one: StoredTensor, weight: StoredTensor, *, scales: bool = True) -> Likeness | None:
    """Of a tensor and a weight of the same shape, with ``scales`` of their magnitudes too.

    None where one of them is constant.
    """
    from sparkling_cli.storage.read import sampled

    values, reference = sampled(root, one), sampled(root, weight)
    found = _correlation(values, reference)
    if found is None:
        return None
    logs: tuple[float, float] | None = None
    if scales:
        both = [(log(abs(a)), log(abs(b))) for a, b in zip(values, reference, strict=True) if a and b]
        logs = _correlation(*map(list, zip(*both, strict=True))) if len(both) >= _FEWEST else None
    return Likeness(*found, *((0.0, 0.0) if logs is None else (logs[0], logs[0] * logs[1])))


def _correlation(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float] | None:
    """Pearson's, and the quotient of the standard deviations; None where one is constant or not finite."""
    count = len(values)
    means = sum(values) / count, sum(reference) / count
    left, right = [a - means[0] for a in values], [b - means[1] for b in reference]
    square, other = sum(map(mul, left, left)), sum(map(mul, right, right))
    if not (isfinite(square) and isfinite(other) and square > 0 and other > 0):
        return None
    root = sqrt(square) * sqrt(other)
    return (sum(map(mul, left, right)) / root, sqrt(square / other)) if root else None
