"""What state whose new entries follow from all old ones must be, written out: see ``widening.reference``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparkling_cli.widening.reference import DIAGONAL, MEANS, TURNED, Wanted

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def made(wanted: Wanted, old: Array) -> tuple[Array, Array]:
    """State whose new entries follow from all old ones, and which of the entries are new.

    Args:
        wanted: of the tensor.
        old: the source's entries as float64 numbers, in the shape ``wanted.sizes``.
    """
    import numpy as np

    if wanted.state == TURNED:
        return np.full(wanted.shape, old.mean()), np.ones(wanted.shape, bool)
    made = old[np.ix_(*(dim.source for dim in wanted.dims))]
    new = np.zeros(made.shape, bool)
    if wanted.state == MEANS or old.ndim < 2 or old.shape[-1] != old.shape[-2]:
        dim = wanted.dims[wanted.own]
        at: list[Any] = [slice(None)] * made.ndim
        at[wanted.own] = dim.new
        made[tuple(at)] = np.take(made, np.flatnonzero(~dim.new), wanted.own).mean(wanted.own, keepdims=True)
        new[tuple(at)] = True
        return made, new
    n = made.shape[-1]
    fresh = wanted.dims[-1].new
    new[...] = fresh[:, None] | fresh[None, :]
    identity = np.eye(n)
    if wanted.state == DIAGONAL:
        identity = identity * np.trace(old, axis1=-2, axis2=-1)[..., None, None] / old.shape[-1]
    return np.where(new, identity, made), new
