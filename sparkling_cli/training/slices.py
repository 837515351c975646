"""A parameter's new entries as slices of its (local) tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from sparkling_cli.layout.regions import Region

Slices = tuple[slice, ...]

#: entries of a temporary: at most this many live beside the parameters (in cache, on a CPU)
PIECE = {"cpu": 1 << 17}
PIECE_ELSEWHERE = 1 << 22


@dataclass(frozen=True)
class NewEntries:
    """Where the new entries of one parameter lie, by stage.

    Attributes:
        view: shape in which every slice is a rectangle.
        stages: stage -> slices of the view.
    """

    view: tuple[int, ...]
    stages: dict[int, tuple[Slices, ...]]

    def of(self, tensor: Tensor, stage: int) -> Iterator[Tensor]:
        """The stage's entries of a tensor that is shaped like the parameter, as views of it."""
        local = local_tensor(tensor)
        shaped = local.view(self.view)
        for slices in self.stages[stage]:
            yield shaped[slices]


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; the tensor itself unless it is a DTensor."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return tensor
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def new_entries(param: Tensor, region: Region) -> NewEntries | None:
    """The new entries that this process holds of ``param``; None if there are none."""
    held = _held(param, region)
    view = held.view
    local = local_tensor(param)
    limit = PIECE.get(local.device.type, PIECE_ELSEWHERE)
    stages = {
        stage: tuple(piece for box in held.boxes(stage) for piece in _pieces(box, limit))
        for stage in held.stages
        if stage > 0
    }
    kept = {stage: slices for stage, slices in stages.items() if slices}
    return NewEntries(view, kept) if kept and local.numel() else None


def _held(param: Tensor, region: Region) -> Region:
    """The region of the local part of a parameter: the indices that this process holds, per dim."""
    placements = getattr(param, "placements", None)
    if placements is None:
        return region
    mesh = param.device_mesh  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    indices: list[torch.Tensor | None] = [None] * param.dim()
    if coordinate is None:  # this process takes no part in the mesh
        return region.take([[] for _ in range(param.dim())])
    for mesh_dim, placement in enumerate(placements):
        dim = getattr(placement, "dim", None)
        if dim is None:
            continue
        kept = indices[dim]
        before = torch.arange(param.shape[dim]) if kept is None else kept
        indices[dim] = _share(placement, before, mesh.size(mesh_dim), coordinate[mesh_dim])
    return region.take([None if i is None else i.tolist() for i in indices])


def _share(placement: Any, indices: Tensor, parts: int, which: int) -> Tensor:
    """What one process of a mesh dim keeps of ``indices``, by the placement's own splitting."""
    along = type(placement)(**{**_options(placement), "dim": 0})
    pieces, _ = along._split_tensor(indices, parts, with_padding=False)
    piece: Tensor = pieces[which]
    return piece


def _options(placement: Any) -> dict[str, int]:
    factor = getattr(placement, "split_factor", None)  # FSDP2 over tensor parallelism
    return {} if factor is None else {"split_factor": factor}


def _pieces(box: Sequence[tuple[int, int]], limit: int) -> Iterator[Slices]:
    """A box cut along its outer dims into pieces of at most ``limit`` entries."""
    sizes = [stop - start for start, stop in box]
    if prod(sizes) <= limit or not box:
        yield tuple(slice(start, stop) for start, stop in box)
        return
    inner = prod(sizes[1:])
    start, stop = box[0]
    rows = max(1, limit // inner)
    for at in range(start, stop, rows):
        first = slice(at, min(at + rows, stop))
        if inner <= limit:
            yield (first, *(slice(a, b) for a, b in box[1:]))
        else:
            yield from ((first, *rest) for rest in _pieces(box[1:], limit))
