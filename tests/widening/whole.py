"""The arithmetic of a view on whole tensors in memory, by torch: what the kernel is held to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparkling_cli.storage.tensors import FLOATING
from sparkling_cli.widening.fill import normal
from sparkling_cli.widening.geometry import Fill, View, ViewDim, target_shape
from sparkling_cli.widening.moments import BLOCK, block_moments, merged
from sparkling_cli.widening.parts import boxes, stream_of

if TYPE_CHECKING:
    import torch


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

    Arithmetic is float32 (float64 for float64 sources), rounded once. Entries that are only copied keep
    their bits; dtypes that are no floating ones can only be copied or zero.

    Raises:
        TypeError: arithmetic on a dtype that has none.
    """
    import torch

    if all(dim.identity for dim in view) and scale == 1.0 and offset == 0.0:
        return source.clone()
    wide = torch.float64 if source.dtype == torch.float64 else torch.float32
    picked = source.reshape([dim.source for dim in view])
    for i, dim in enumerate(view):
        picked = _picked(picked, i, _index(dim))
    factor = torch.full((), scale, dtype=wide)
    for i, dim in enumerate(view):
        factor = factor * _along(_scales(dim).to(wide), i, len(view))
    fills = combined_fills(view)
    computed = (factor != 1) if offset == 0.0 else torch.ones((), dtype=torch.bool)
    computed = (computed & (fills == Fill.COPY)) | (fills == Fill.RANDOM)
    if str(source.dtype).removeprefix("torch.") not in FLOATING and computed.any():
        raise TypeError(f"{source.dtype} entries can be copied, not computed")
    if computed.any():
        work = picked.to(wide)
        values = work * factor + offset if offset else work * factor
        if (fills == Fill.RANDOM).any():
            values = torch.where(
                fills == Fill.RANDOM, _drawn(source, view, factor, offset, seed, stream), values
            )
        picked = torch.where(computed, values.to(source.dtype), picked)
    if (fills == Fill.ZERO).any():
        picked = _bits(picked).masked_fill(fills == Fill.ZERO, 0).view(source.dtype)
    return picked.reshape(target_shape(view))


def _drawn(
    source: torch.Tensor, view: View, factor: torch.Tensor, offset: float, seed: int, stream: str
) -> torch.Tensor:
    """``factor * (mean + std * noise) + offset`` in the view's shape, every unit by itself."""
    import torch

    flat = source.reshape(-1)
    targets = {box.unit: box for box in boxes(view, source=False)}
    noise, std, mean = (torch.zeros(targets[next(iter(targets))].sizes, dtype=factor.dtype) for _ in range(3))
    old = {box.unit: box for box in boxes(view, source=True)}
    for target in targets.values():
        box = old[target.drawn_as]
        values = flat[torch.from_numpy(box.places(0, box.entries))].to(torch.float64).numpy()
        found = merged(block_moments(values[at : at + BLOCK]) for at in range(0, len(values), BLOCK))
        there = torch.from_numpy(target.places(0, target.entries))
        numbers = torch.from_numpy(normal(seed, stream_of(stream, target.drawn_as), 0, len(there)).copy())
        for tensor, value in ((noise, numbers.to(factor.dtype)), (std, found.std), (mean, found.mean)):
            tensor.view(-1)[there] = value
    return noise * (std * factor) + (mean * factor + offset)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, for what torch does not do with dtypes that it only stores."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = tensor.element_size()
    return tensor.view(integers[size]) if size in integers else tensor


def _picked(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    return _bits(tensor).index_select(dim, index).view(tensor.dtype)


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
