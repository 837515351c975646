"""RMS of weights and optimizer state per role and layer, streamed from files in bounded memory.

RMS(h) = ||h||_2 / sqrt(d) over all entries of a tensor (Eq. 1); sums are kept in float64. A *role* is a
tensor's name with its numbers taken out; the first number is the layer, further ones (experts) are
summed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import torch

from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.names import skeleton
from sparkling_cli.results.measured import TensorStat, Weights
from sparkling_cli.storage.read import PIECE, TensorSource
from sparkling_cli.storage.tensors import FLOATING


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
        counted = {name: value for name, value in vars(self).items() if name != "squares"}
        return TensorStat(role=role, layer=layer, slot=slot, rms=rms, **counted)


def measure_weights(checkpoint: Checkpoint, *, piece: int = PIECE) -> Weights:
    """Read every floating-point tensor once and sum it up.

    Args:
        checkpoint: with named optimizer state (``models.locate.named_states``) for roles of state.
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
    return Weights.of(tuple(total.stat(*where) for where, total in sums.items()))


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
    return skeleton(name), next((int(part) for part in name.split(".") if part.isdigit()), None)
