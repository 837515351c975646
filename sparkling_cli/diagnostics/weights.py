"""RMS of weights and optimizer state per role and layer, streamed from files in bounded memory.

RMS(h) = ||h||_2 / sqrt(d) over all entries of a tensor (Eq. 1); sums are kept in float64. A *role* is a
tensor's name with its numbers taken out; the first number is the layer, further ones (experts) are
summed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.storage.read import PIECE, TensorSource
from sparkling_cli.storage.tensors import FLOATING

if TYPE_CHECKING:
    import torch

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


@dataclass(frozen=True)
class TensorStat:
    """Statistics of one role in one layer.

    Attributes:
        role: the name without its numbers, e.g. ``model.layers.*.mlp.up_proj.weight``.
        layer: the first number in the name; None where there is none.
        slot: "" for weights, else the state's name (``exp_avg``).
        tensors: how many tensors are in it.
        entries: how many numbers.
        rms: over all finite entries.
        largest: the largest finite magnitude.
        zeros: how many entries are exactly zero.
        nan: how many entries are not a number.
        inf: how many entries are infinite.
    """

    role: str
    layer: int | None
    slot: str
    tensors: int
    entries: int
    rms: float
    largest: float
    zeros: int
    nan: int
    inf: int

    @property
    def label(self) -> str:
        """The role with its layer put back in: what a person looks for."""
        return self.role if self.layer is None else self.role.replace("*", str(self.layer), 1)


@dataclass(frozen=True)
class WeightReport:
    """Statistics of a whole checkpoint, in the order of its tensors."""

    stats: tuple[TensorStat, ...]

    @property
    def nonfinite(self) -> tuple[TensorStat, ...]:
        """Those with NaN or Inf in them."""
        return tuple(stat for stat in self.stats if stat.nan or stat.inf)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state there is, in order of appearance."""
        return tuple(dict.fromkeys(stat.slot for stat in self.stats if stat.slot))

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "tensors": [asdict(stat) for stat in self.stats],
            "nonfinite": [stat.label + (f" {stat.slot}" if stat.slot else "") for stat in self.nonfinite],
        }


@dataclass
class _Sum:
    tensors: int = 0
    entries: int = 0
    squares: float = 0.0
    largest: float = 0.0
    zeros: int = 0
    nan: int = 0
    inf: int = 0

    def add(self, piece: torch.Tensor) -> None:
        import torch

        flat = piece.reshape(-1)
        if flat.dtype.is_floating_point and flat.element_size() < 4:
            flat = flat.to(torch.float32)
        self.entries += flat.numel()
        if not flat.numel():
            return
        self.zeros += flat.numel() - int(torch.count_nonzero(flat))
        norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
        if not norm < float("inf"):
            # rare: find out which entries, and go on with the others
            self.nan += int(torch.isnan(flat).sum())
            self.inf += int(torch.isinf(flat).sum())
            flat = flat[torch.isfinite(flat)]
            norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
        self.squares += norm * norm
        if flat.numel():
            low, high = torch.aminmax(flat)
            self.largest = max(self.largest, -float(low), float(high))

    def stat(self, role: str, layer: int | None, slot: str) -> TensorStat:
        finite = self.entries - self.nan - self.inf
        rms = sqrt(self.squares / finite) if finite else 0.0
        return TensorStat(
            role, layer, slot, self.tensors, self.entries, rms, self.largest, self.zeros, self.nan, self.inf
        )


def measure_weights(checkpoint: Checkpoint, *, piece: int = PIECE) -> WeightReport:
    """Read every floating-point tensor once and sum it up.

    Args:
        checkpoint: with named optimizer state (``inference.locate.named_states``) for roles of state.
        piece: bytes in memory at a time; a single row may be larger.

    Raises:
        CheckpointError: a file cannot be read.
    """
    sums: dict[tuple[str, int | None, str], _Sum] = {}
    with TensorSource(checkpoint) as source:
        for name, slot, key in named_tensors(checkpoint):
            if checkpoint.tensors[key].dtype not in FLOATING:
                continue
            total = sums.setdefault((*role_and_layer(name), slot), _Sum())
            total.tensors += 1
            for part in source.pieces(key, nbytes=piece):
                total.add(part)
    return WeightReport(tuple(total.stat(*where) for where, total in sums.items()))


def named_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """(name, slot, key) of every weight and every parameter-shaped piece of state."""
    for name, key in checkpoint.weights.items():
        yield name, "", key
    for state in checkpoint.states:
        for slot, key in state.tensors.items():
            if checkpoint.tensors[key].shape:
                yield state.param, slot, key


def role_and_layer(name: str) -> tuple[str, int | None]:
    """``model.layers.3.mlp.experts.7.up.weight`` as its role with ``*`` for both numbers, and 3."""
    first = _NUMBER.search(name)
    return _NUMBER.sub("*", name), None if first is None else int(first.group())
