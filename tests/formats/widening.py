"""Shared by the tests of formats: expand, and compare entry by entry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparkling_cli.api import expand, inspect, verify
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.storage.read import TensorSource


def widen(source: Path, target: Path, axes: Mapping[str, float], **options: Any) -> Path:
    """Expand by factors per axis; gives the output, which ``verify`` and ``inspect`` can read."""
    target.parent.mkdir(exist_ok=True)
    asked = [{"axis": axis, "factor": factor} for axis, factor in axes.items()]
    expand(source, target, axes=asked, report="none", **options)
    verify(source, target)
    found = inspect(target, activations=False)
    assert found.format == open_checkpoint(source).format
    assert not found.weights.nonfinite
    assert not [note for note in found.notes if "by number" in note]
    return target


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every weight and state tensor of a checkpoint, by its key, read by our own reader."""
    checkpoint = open_checkpoint(path)
    with TensorSource(checkpoint) as source:
        return {key: source.read(key) for key in checkpoint.tensors}


def check_moments(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], where: str = "") -> None:
    """Moments of one parameter: old entries bit-equal as a set, all others exactly zero (Eq. 24)."""
    for name, before in old.items():
        after = new[name]
        assert after.shape >= before.shape, (where, name)
        kept = after[after != 0].sort().values
        assert torch.equal(kept, before[before != 0].sort().values), (where, name)


def corner(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The first entries along every dim: the old ones, where no dim is fused."""
    return tensor[tuple(slice(0, size) for size in shape)]
