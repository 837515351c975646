"""A parameter's new entries as slices of its (local) tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from sparkling_cli.layout.regions import Region
from sparkling_cli.storage.byte_ranges import slabs

Slices = tuple[slice, ...]

#: entries of a temporary: at most this many live beside the parameters (in cache, on a CPU)
PIECE = {"cpu": 1 << 17}
PIECE_ELSEWHERE = 1 << 22


@dataclass(frozen=True)
class Window:
    """A part of a tensor that lies in one piece, and its new entries.

    Attributes:
        start: its first entry in the flat tensor; None for the whole of a tensor of any strides.
        view: shape in which every slice is a rectangle.
        stages: stage -> slices of the view.
    """

    start: int | None
    view: tuple[int, ...]
    stages: dict[int, tuple[Slices, ...]]

    def of(self, local: Tensor) -> Tensor:
        """The window of a tensor, as a view of it."""
        if self.start is None:
            return local.view(self.view)
        return local.view(-1).narrow(0, self.start, prod(self.view)).view(self.view)


@dataclass(frozen=True)
class NewEntries:
    """Where the new entries of one of the optimizer's tensors lie, by stage."""

    windows: tuple[Window, ...]

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that have entries here, ascending."""
        return tuple(sorted({stage for window in self.windows for stage in window.stages}))

    def of(self, tensor: Tensor, stage: int) -> Iterator[Tensor]:
        """The stage's entries of a tensor that is shaped like the optimizer's, as views of it."""
        local = local_tensor(tensor)
        for window in self.windows:
            if stage in window.stages:
                shaped = window.of(local)
                for slices in window.stages[stage]:
                    yield shaped[slices]


@dataclass(frozen=True)
class Piece:
    """A part of a flattened parameter inside of a flat tensor that an optimizer holds.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        start: the piece's first entry in the flattened parameter.
        numel: its entries.
        tensor: the optimizer's, of one dim.
        at: the piece's first entry in it.
        box: first and last index per dim of the part of the parameter that is flattened; None for all of it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    tensor: Tensor
    at: int
    box: tuple[tuple[int, int], ...] | None = None


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; the tensor itself unless it is a DTensor."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return tensor
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def new_entries(param: Tensor, region: Region) -> NewEntries | None:
    """The new entries that this process holds of ``param``; None if there are none."""
    window = _window(None, _held(param, region), local_tensor(param))
    return NewEntries((window,)) if window.stages and local_tensor(param).numel() else None


def new_entries_of_pieces(pieces: Iterable[tuple[Piece, Region]]) -> NewEntries | None:
    """The new entries of one flat tensor; None if there are none.

    Args:
        pieces: all of the same tensor, each with its whole parameter's region.
    """
    windows = []
    for piece, whole in pieces:
        at, region = piece.at, whole
        if piece.box is not None:
            bounds = zip(piece.box, piece.shape, strict=True)
            region = whole.take([None if (a, b) == (0, size) else range(a, b) for (a, b), size in bounds])
        for first, sizes, _ in slabs(region.view, piece.start, piece.start + piece.numel):
            part = region.window(tuple((at, at + n) for at, n in zip(first, sizes, strict=True)))
            windows.append(_window(at, part, piece.tensor))
            at += prod(part.shape)
    kept = tuple(window for window in windows if window.stages)
    return NewEntries(kept) if kept else None


def _window(start: int | None, region: Region, local: Tensor) -> Window:
    limit = PIECE.get(local.device.type, PIECE_ELSEWHERE)
    stages = {
        stage: tuple(piece for box in region.boxes(stage) for piece in _pieces(box, limit))
        for stage in region.stages
        if stage > 0
    }
    return Window(start, region.view, {stage: slices for stage, slices in stages.items() if slices})


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
