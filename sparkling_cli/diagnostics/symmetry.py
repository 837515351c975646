"""The symmetry meter: how far every new channel has moved from the channel that it was copied from.

Equal copies get equal gradients (Eq. 20, 40); with a symmetric optimizer state they stay equal for ever.
From the files of a trained checkpoint and of the expanded one that it came from, the meter says per layer
and axis whether the copies have parted. A *channel* of an axis is all that carries its index in one layer:
for ``ffn`` the gate and up rows and the down column, for each expert by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparkling_cli.errors import CheckpointError, LayoutError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.depth import LAYERS
from sparkling_cli.layout.expr import UNSHAPED, Role, TensorLayout, axis_names, factors
from sparkling_cli.layout.model import ModelLayout, TensorPattern
from sparkling_cli.manifest import Manifest, read_manifest
from sparkling_cli.results.measured import ChannelSymmetry, Symmetry
from sparkling_cli.storage.read import TensorSource
from sparkling_cli.storage.tensors import FLOATING
from sparkling_cli.training.copies import LOCKED, old_entries
from sparkling_cli.training.moved import Moved, squares
from sparkling_cli.widening.geometry import Growth, Treatment, View, ViewDim, growth_at, view_of

if TYPE_CHECKING:
    import torch

#: axes whose new entries are no copies, or copies that get gradients of their own
APART = frozenset({"vocab"}) | UNSHAPED


def measure_symmetry(trained: Path | str, expanded: Path | str, *, stage: int | None = None) -> Symmetry:
    """Compare new channels with their sources in a trained checkpoint.

    Args:
        trained: the checkpoint to measure; the expanded one itself before any training.
        expanded: the output of ``sparkling expand`` that it was trained on from: its manifest is read.
        stage: which expansion's channels; default the last.

    Raises:
        CheckpointError: there is no manifest, or the trained checkpoint is not of this model.
    """
    manifest = read_manifest(Path(expanded))
    layout = manifest.model_layout()
    growth, before = _growth(manifest, layout, stage)
    checkpoint = open_checkpoint(Path(trained))
    start = open_checkpoint(Path(expanded))
    shapes = start.shapes
    sums: dict[_Key, torch.Tensor] = {}
    moved = Moved()
    with TensorSource(checkpoint) as source, TensorSource(start) as starts:
        for name, key in checkpoint.weights.items():
            pattern = _pattern(name, layout)
            if pattern is None or not pattern.dims.axes() & set(growth):
                continue
            _check_shape(checkpoint, name, pattern.dims, layout)
            own = growth_at(growth, pattern.template, name)
            if checkpoint.tensors[key].dtype in FLOATING:
                tensor = source.read(key)
                _add(sums, name, tensor, pattern.dims, before, own)
                if shapes.get(name) == tensor.shape:
                    update = tensor.float() - starts.weight(name).float()
                    moved += _moved(update, view_of(pattern.dims, before, own, Treatment()))
    if not sums:
        raise CheckpointError(f"{trained} holds no weight with a new channel of {', '.join(sorted(growth))}")
    return Symmetry.of(tuple(_rows(sums)), **moved.rms())


def _moved(update: torch.Tensor, view: View) -> Moved:
    """How far a tensor's new and old entries are from where they began."""
    old = old_entries(update, view)
    whole, kept = squares(update), squares(old)
    return Moved(max(whole - kept, 0.0), update.numel() - old.numel(), kept, old.numel())


@dataclass(frozen=True)
class _Key:
    """A group of channels: numbers in the tensors' names (layer, expert), axis, stacked experts or none."""

    numbers: tuple[int, ...]
    axis: str
    stack: int


def _growth(
    manifest: Manifest, layout: ModelLayout, stage: int | None
) -> tuple[dict[str, Growth], dict[str, int]]:
    """Growth of the wanted expansion, as sizes now allow: later growth of the same axis counts as old."""
    last = max(s.stage for s in manifest.stages)
    wanted = last if stage is None else stage
    if not any(s.stage == wanted for s in manifest.stages):
        raise CheckpointError(f"there is no expansion {stage}; the manifest has {len(manifest.stages)}")
    grown = {axis: growth for axis, growth in manifest.growth(wanted).items() if axis not in APART}
    if not grown:
        names = " and ".join(sorted(manifest.growth(wanted)))
        raise CheckpointError(f"only {names} has grown: what is new there cannot be locked to what is old")
    for axis, growth in grown.items():
        if layout.sizes[axis] != growth.target:
            raise CheckpointError(
                f"axis {axis!r} has grown again since expansion {wanted}, from {growth.target} to "
                f"{layout.sizes[axis]}: its channels can be measured until then"
            )
        if growth.by_layer and len(growth.by_layer) != layout.sizes[LAYERS]:
            raise CheckpointError(
                f"there are more layers since expansion {wanted}, and each had its own copies on {axis!r}: "
                "its channels can be measured until then"
            )
    return grown, {**layout.sizes, **{axis: g.source for axis, g in grown.items()}}


def _pattern(name: str, layout: ModelLayout) -> TensorPattern | None:
    for table in (layout.disk_table, layout.module_table):
        try:
            return table.find(name)
        except LayoutError:
            continue
    return None


def _check_shape(checkpoint: Checkpoint, name: str, dims: TensorLayout, layout: ModelLayout) -> None:
    found, expected = checkpoint.weight(name).shape, dims.shape(layout.sizes)
    if found != expected:
        raise CheckpointError(
            f"{checkpoint.root.name}: {name} has shape {found}, after the expansion it has {expected}",
            hint="compare with the expanded checkpoint that this one was trained on from",
        )


def _add(
    sums: dict[_Key, torch.Tensor],
    name: str,
    tensor: torch.Tensor,
    dims: TensorLayout,
    before: Mapping[str, int],
    growth: Mapping[str, Growth],
) -> None:
    import torch

    view = view_of(dims, before, growth, Treatment())
    shaped = tensor.reshape([dim.target for dim in view]).to(torch.float64)
    stacks = [i for i, dim in enumerate(view) if dims.dims[dim.dim].role is Role.STACK]
    for i, (dim, axis) in enumerate(zip(view, _axes(dims, growth), strict=True)):
        if not axis:
            continue
        new, old = _pairs(dim)
        # experts (stacks) and channels first, all else is one vector
        front = [s for s in stacks if s != i]
        channels = shaped.movedim([*front, i], list(range(len(front) + 1))).flatten(0, max(0, len(front) - 1))
        if not front:
            channels = channels[None]
        channels = channels.flatten(2) if channels.dim() > 2 else channels[..., None]
        a, b = channels[:, new], channels[:, old]
        numbers = tuple(int(part) for part in name.split(".") if part.isdigit())
        parts = torch.stack([pair.sum(-1) for pair in (a * b, a * a, b * b, (a - b) ** 2)])
        key = _Key(numbers, axis, channels.shape[0] if front else 0)
        if key in sums and sums[key].shape != parts.shape:
            # the axis occurs with another multiplicity (q and k heads, say)
            key = _Key(numbers, f"{axis} of {name}", key.stack)
        sums[key] = sums[key] + parts if key in sums and sums[key].shape == parts.shape else parts


def _pairs(dim: ViewDim) -> tuple[list[int], list[int]]:
    """New indices along a view dim, and the old index that each was copied from."""
    place: dict[int, int] = {}
    for run in dim.runs:
        if not run.new:
            place.update({run.source + i: run.target + i for i in range(run.length)})
    new = [run.target + i for run in dim.runs if run.new for i in range(run.length)]
    old = [place[run.source + i] for run in dim.runs if run.new for i in range(run.length)]
    return new, old


def _axes(dims: TensorLayout, growth: Mapping[str, Growth]) -> list[str]:
    """Per view dim, the growing axes in it, joined by ``+``; "" for none."""
    found = []
    for dim in dims.dims:
        for factor in factors(dim.expr):
            found.append("+".join(sorted(set(axis_names(factor)) & set(growth))))
    return found


def _rows(sums: Mapping[_Key, torch.Tensor]) -> Iterator[ChannelSymmetry]:
    import torch

    groups: dict[tuple[int | None, str], list[torch.Tensor]] = {}
    for key, value in sums.items():
        layer = key.numbers[0] if key.numbers else None
        axis = key.axis.partition(" of ")[0]
        groups.setdefault((layer, axis), []).append(value)
    for (layer, axis), values in groups.items():
        dot, new, source, apart = torch.cat([value.flatten(1) for value in values], dim=1)
        norms = (new * source).sqrt()
        both_zero = (new == 0) & (source == 0)
        cosine = torch.where(norms > 0, dot / norms.clamp_min(1e-300), both_zero.to(dot.dtype))
        distance = torch.where(source > 0, (apart / source.clamp_min(1e-300)).sqrt(), apart.sqrt())
        yield ChannelSymmetry(
            layer=layer,
            axis=axis,
            channels=len(dot),
            cosine=float(cosine.mean()),
            distance=float(distance.mean()),
            locked=float((distance < LOCKED).double().mean()),
        )
