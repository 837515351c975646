"""How far copies have parted from their sources: the sign that something is wrong with a resumed run."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparkling_cli.training.moved import squares
from sparkling_cli.training.slices import local_tensor
from sparkling_cli.widening.derived import indices
from sparkling_cli.widening.geometry import View

Array = np.ndarray[Any, Any]

#: what is closer to its source than this share of the source's size counts as locked: rounding, and a rate of
#: their own, move copies apart that learn nothing of their own
LOCKED = 0.01


def copies(params: Iterable[tuple[Tensor, View]]) -> dict[str, float]:
    """The last expansion's new entries against the entries that they were copied from.

    Args:
        params: every parameter with new entries, and how the last expansion made it.

    Returns:
        ``share_locked``, of entries that are closer to their sources than ``LOCKED`` of their tensor's RMS,
        and ``cosine_of_copies``, over all entries together. Neither where no parameter lies in this process
        as a whole.
    """
    equal = count = 0
    new = source = apart = 0.0
    for param, view in params:
        if local_tensor(param) is not param:
            continue
        value = param.detach()
        copied, old = _taken(value, [places_of(one) for one, _ in indices(view)]), old_entries(value, view)
        count += value.numel() - old.numel()
        kept, origin, distance = squares(old), squares(copied), copied - value
        near = LOCKED * sqrt(origin / max(copied.numel(), 1))
        equal += int((distance.abs() <= near).sum()) - old.numel()
        new += squares(value) - kept
        source += origin - kept
        apart += squares(distance)  # nothing of old entries: they are their own sources
    if not count:
        return {}
    found = {"share_locked": equal / count}
    norms = sqrt(max(new, 0.0) * max(source, 0.0))
    return {**found, "cosine_of_copies": (new + source - apart) / 2 / norms} if norms else found


def old_entries(tensor: Tensor, view: View) -> Tensor:
    """What a tensor has of its size before the growth, in its shape then."""
    return _taken(tensor, [np.unique(places_of(source)) for source, _ in indices(view)])


def _taken(tensor: Tensor, places: Iterable[Array]) -> Tensor:
    for dim, at in enumerate(places):
        tensor = tensor.index_select(dim, torch.from_numpy(at).to(tensor.device))
    return tensor


def places_of(source: Array) -> Array:
    """Target index -> the target index of the old entry that it is or copies: the first with its source."""
    _, first, inverse = np.unique(source, return_index=True, return_inverse=True)
    places: Array = first[inverse]
    return places
