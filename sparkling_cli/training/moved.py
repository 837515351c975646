"""How far new and old entries move in a step."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from sparkling_cli.training.slices import NewEntries, local_tensor


@dataclass(frozen=True)
class Moved:
    """Sums of squares of updates, and over how many entries."""

    new: float = 0.0
    new_entries: int = 0
    old: float = 0.0
    old_entries: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.new + other.new,
            self.new_entries + other.new_entries,
            self.old + other.old,
            self.old_entries + other.old_entries,
        )

    def rms(self) -> dict[str, float]:
        """Root mean squares by the names that a log has them under; of what has entries only."""
        sums = {
            "update_rms_new": (self.new, self.new_entries),
            "update_rms_old": (self.old, self.old_entries),
        }
        return {name: sqrt(total / count) for name, (total, count) in sums.items() if count}


def moved(param: Tensor, before: Tensor, entries: NewEntries, stage: int) -> Moved:
    """The update of one parameter's entries in this process: those of ``stage``, and all others.

    ``before``, a copy of the local tensor, is overwritten.
    """
    update = before.sub_(local_tensor(param))
    pieces = list(entries.of(update, stage)) if stage in entries.stages else []
    new = sum(squares(piece) for piece in pieces)
    count = sum(piece.numel() for piece in pieces)
    for piece in pieces:
        piece.zero_()
    return Moved(new, count, squares(update), update.numel() - count)


def squares(tensor: Tensor) -> float:
    """The sum of the squares of all entries."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=dtype)) ** 2
