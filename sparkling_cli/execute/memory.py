"""The arithmetic of a plan row on whole tensors in memory: for small models and for proofs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparkling_cli.execute.fill import normal
from sparkling_cli.layout.geometry import Fill, View, ViewDim

if TYPE_CHECKING:
    import torch


def target_shape(view: View) -> tuple[int, ...]:
    """The storage shape that a view widens to."""
    sizes: dict[int, int] = {}
    for dim in view:
        sizes[dim.dim] = sizes.get(dim.dim, 1) * dim.target
    return tuple(sizes[i] for i in sorted(sizes))


def widen_tensor(
    source: torch.Tensor,
    view: View,
    *,
    scale: float = 1.0,
    offset: float = 0.0,
    seed: int = 0,
    stream: str = "",
) -> torch.Tensor:
    """The widened tensor: same dtype, shape ``target_shape(view)``.

    Arithmetic is float32 (float64 for float64 sources), rounded once.
    """
    import torch

    if all(dim.identity for dim in view) and scale == 1.0 and offset == 0.0:
        return source.clone()
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    work = source.reshape([dim.source for dim in view]).to(wide)
    for i, dim in enumerate(view):
        work = work.index_select(i, _index(dim))
    factor = torch.full((), scale, dtype=wide)
    for i, dim in enumerate(view):
        factor = factor * _along(_scales(dim).to(wide), i, len(view))
    fills = combined_fills(view)
    values = work * factor + offset
    if (fills == Fill.RANDOM).any():
        std = source.to(torch.float64).std(correction=0).item()
        noise = normal(seed, stream, 0, values.numel()).reshape(values.shape).to(wide)
        values = torch.where(fills == Fill.RANDOM, noise * (std * factor), values)
    values = torch.where(fills == Fill.ZERO, torch.zeros((), dtype=wide), values)
    return values.to(source.dtype).reshape(target_shape(view))


def combined_fills(view: View) -> torch.Tensor:
    """Fill of every entry in the view's shape; old entries are COPY."""
    import torch

    result = torch.zeros([dim.target for dim in view], dtype=torch.int8)
    for group in sorted({dim.dim for dim in view}):
        fill = torch.zeros((), dtype=torch.int8)
        shield = torch.zeros((), dtype=torch.bool)
        for i, dim in enumerate(view):
            if dim.dim != group:
                continue
            fills = torch.cat([torch.full((r.length,), int(r.fill), dtype=torch.int8) for r in dim.runs])
            shields = torch.cat([torch.full((r.length,), r.shield) for r in dim.runs])
            fill = torch.maximum(fill, _along(fills, i, len(view)))
            shield = shield | _along(shields, i, len(view))
        result = torch.maximum(result, torch.where(shield, torch.zeros_like(fill), fill))
    return result


def new_entries(view: View) -> torch.Tensor:
    """Boolean mask of new entries, in the storage shape."""
    import torch

    mask = torch.zeros([dim.target for dim in view], dtype=torch.bool)
    for i, dim in enumerate(view):
        new = torch.cat([torch.full((r.length,), r.new) for r in dim.runs])
        mask = mask | _along(new, i, len(view))
    return mask.reshape(target_shape(view))


def _index(dim: ViewDim) -> torch.Tensor:
    import torch

    return torch.cat([torch.arange(r.source, r.source + r.length) for r in dim.runs])


def _scales(dim: ViewDim) -> torch.Tensor:
    import torch

    return torch.cat([torch.full((r.length,), r.scale, dtype=torch.float64) for r in dim.runs])


def _along(vector: torch.Tensor, dim: int, dims: int) -> torch.Tensor:
    return vector.reshape([-1 if i == dim else 1 for i in range(dims)])
