"""Copies that have not parted from their sources yet: the sign that something is wrong with a resumed run."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparkling_cli.layout.expr import TensorLayout
from sparkling_cli.layout.regions import Births
from sparkling_cli.training.slices import local_tensor
from sparkling_cli.widening.derived import indices
from sparkling_cli.widening.geometry import Growth, Treatment, view_of

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def share_locked(
    params: Iterable[tuple[Tensor, TensorLayout]], sizes: dict[str, int], births: Births
) -> float | None:
    """The share of the last expansion's new entries that equal the entries that they were copied from.

    Args:
        params: every parameter with new entries, and what its dims mean.
        sizes: of the axes now.
        births: axis -> ``[start, stop, stage]``.

    Returns:
        None where no parameter lies in this process as a whole, or where which entry copies which depends on
        earlier expansions (fractional growth of an axis that has grown before).
    """
    last = max(stage for born in births.values() for _, _, stage in born)
    growth = {axis: Growth(born[-1][0], born[-1][1]) for axis, born in births.items() if born[-1][2] == last}
    if any(len(births[axis]) > 2 and g.target % g.source for axis, g in growth.items()):
        return None
    before = {**sizes, **{axis: grown.source for axis, grown in growth.items()}}
    equal = new = 0
    for param, dims in params:
        if local_tensor(param) is not param:
            continue
        view = view_of(dims, before, growth, Treatment())
        sources = param.detach()
        for dim, (source, _) in enumerate(indices(view)):
            target = torch.from_numpy(_places(source)).to(param.device)
            sources = sources.index_select(dim, target)
        old = prod(part.source for part in view)
        new += param.numel() - old
        equal += int((sources == param.detach()).sum()) - old
    return equal / new if new else None


def _places(source: Array) -> Array:
    """Target index -> the target index of the old entry that it is or copies: the first with its source."""
    import numpy as np

    _, first, inverse = np.unique(source, return_index=True, return_inverse=True)
    places: Array = first[inverse]
    return places
