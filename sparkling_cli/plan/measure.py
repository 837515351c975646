"""What a tensor of a weight's shape is, where its name does not say it: measured against the weight.

A copy or an average of a weight correlates with it. What rounding took from a weight (a compensation term)
does not, but its magnitude follows the weight's, entry by entry. A moment does neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite, prod
from pathlib import Path
from typing import NamedTuple

from sparkling_cli.formats.states import StateKind
from sparkling_cli.storage.tensors import FLOATING, StoredTensor

#: a tensor with at least this correlation with the weight is a copy or an average of it
COPY = 0.9
#: with at most this one it is none; accumulated gradients of a young run reach 0.6
NONE = 0.75
#: correlation of the logarithms of magnitudes, of compensation terms and of everything else
SCALE, NO_SCALE = 0.6, 0.4
#: fewer entries than this say nothing; more than that many are not read
_FEWEST, _MOST = 64, 1 << 20
#: tensors that are looked at
_TENSORS = 8

#: a tensor, and the weight of its shape
Pair = tuple[StoredTensor, StoredTensor]


class Likeness(NamedTuple):
    """How a tensor resembles a weight: correlation of values, and of the logarithms of magnitudes."""

    values: float
    magnitudes: float


def measured_kind(root: Path, pairs: Iterable[Pair]) -> tuple[StateKind, str]:
    """The kind of a state of one name, from its largest tensors, and the numbers as text.

    Args:
        root: the checkpoint.
        pairs: every tensor of that name, with its parameter's weight.
    """
    usable = [pair for pair in pairs if pair[0].dtype in FLOATING and prod(pair[0].shape) >= _FEWEST]
    usable.sort(key=lambda pair: -prod(pair[0].shape))
    found = [one for one in (likeness(root, *pair) for pair in usable[:_TENSORS]) if one is not None]
    if not found:
        return StateKind.UNKNOWN, "its tensors are too small, or constant"
    low, high = min(abs(one.values) for one in found), max(abs(one.values) for one in found)
    scales = sorted(one.magnitudes for one in found)
    text = (
        f"correlation with the weight {low:.2f} to {high:.2f}, of magnitudes {scales[0]:.2f} to "
        f"{scales[-1]:.2f}"
    )
    if min(one.values for one in found) >= COPY:
        return StateKind.WEIGHT, text
    if high <= NONE and scales[-1] <= NO_SCALE:
        return StateKind.MOMENT, text
    if high <= NONE and scales[0] >= SCALE:
        return StateKind.WEIGHT, text
    return StateKind.UNKNOWN, text


def likeness(root: Path, one: StoredTensor, weight: StoredTensor) -> Likeness | None:
    """Of a tensor and a weight of the same shape; None where one of them is constant."""
    import numpy as np

    values, reference = _entries(root, one), _entries(root, weight)
    if values.std() == 0 or reference.std() == 0:
        return None
    both = (values != 0) & (reference != 0)
    magnitudes = 0.0
    if both.sum() >= _FEWEST:
        logs = np.log(np.abs(values[both])), np.log(np.abs(reference[both]))
        if all(log.std() > 0 for log in logs):
            magnitudes = float(np.corrcoef(*logs)[0, 1])
    found = Likeness(float(np.corrcoef(values, reference)[0, 1]), magnitudes)
    return found if all(map(isfinite, found)) else None


def _entries(root: Path, stored: StoredTensor):  # type: ignore[no-untyped-def]
    """The first entries of a tensor, whole rows, as doubles."""
    from sparkling_cli.storage.read import read_tensor

    rows = None
    if stored.shape:
        row = max(prod(stored.shape[1:]), 1)
        rows = slice(0, min(stored.shape[0], max(_MOST // row, 1)))
    return read_tensor(root, stored, rows=rows).double().flatten().numpy()
