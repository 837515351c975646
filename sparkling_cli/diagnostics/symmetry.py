"""The symmetry meter: how far every new channel has moved from the channel that it was copied from.

Equal copies get equal gradients (Eq. 20, 40); with a symmetric optimizer state they stay equal for ever.
From the files of a trained checkpoint and of the expanded one that it came from, the meter says per layer
and axis whether the copies have parted. A *channel* of an axis is all that carries its index in one layer:
for ``ffn`` the gate and up rows and the down column, for each expert by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.expr import UNSHAPED, Role, TensorLayout, axis_names, factors
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.manifest import read_manifest
from sparkling_cli.results.measured import ChannelSymmetry, Symmetry
from sparkling_cli.storage.read import TensorSource
from sparkling_cli.storage.tensors import FLOATING
from sparkling_cli.training.copies import LOCKED, old_entries, places_of
from sparkling_cli.training.moved import Moved, squares
from sparkling_cli.widening.derived import indices
from sparkling_cli.widening.geometry import Treatment, View, growth_at, view_of

#: a group of channels: numbers in the tensors' names (layer, expert), axis, stacked experts or none
_Key: TypeAlias = tuple[tuple[int, ...], str, int]
#: axes whose new entries are no copies, or copies that get gradients of their own
APART = frozenset({"vocab"}) | UNSHAPED


def measure_symmetry(trained: Path | str, expanded: Path | str) -> Symmetry:
    """Compare the last expansion's new channels with their sources in a trained checkpoint.

    Args:
        trained: the checkpoint to measure; the expanded one itself before any training.
        expanded: the output of ``sparkling expand`` that it was trained on from: its manifest is read.

    Raises:
        CheckpointError: there is no manifest, or the trained checkpoint is not of this model.
    """
    manifest = read_manifest(Path(expanded))
    layout = manifest.model_layout()
    growth = {axis: grown for axis, grown in manifest.growth().items() if axis not in APART}
    before = {**layout.sizes, **{axis: grown.source for axis, grown in growth.items()}}
    checkpoint = open_checkpoint(Path(trained))
    start = open_checkpoint(Path(expanded))
    shapes = start.shapes
    sums: dict[_Key, torch.Tensor] = {}
    moved = Moved()
    with TensorSource(checkpoint) as source, TensorSource(start) as starts:
        for name, key in checkpoint.weights.items():
            pattern = layout.disk_table.look_up([name])[0] or layout.module_table.look_up([name])[0]
            if pattern is None or not pattern.dims.axes() & growth.keys():
                continue
            _check_shape(checkpoint, name, pattern.dims, layout)
            if checkpoint.tensors[key].dtype in FLOATING:
                tensor = source.read(key)
                own = growth_at(growth, pattern.template, name)
                view = view_of(pattern.dims, before, own, Treatment())
                _add(sums, name, tensor, pattern.dims, view, own.keys())
                if shapes.get(name) == tensor.shape:
                    moved += _moved(tensor.float() - starts.weight(name).float(), view)
    if not sums:
        raise CheckpointError(f"{trained} holds no weight with a new channel of {', '.join(sorted(growth))}")
    return Symmetry.of(tuple(_rows(sums)), **moved.rms())


def _moved(update: torch.Tensor, view: View) -> Moved:
    """How far a tensor's new and old entries are from where they began."""
    old = old_entries(update, view)
    whole, kept = squares(update), squares(old)
    return Moved(max(whole - kept, 0.0), update.numel() - old.numel(), kept, old.numel())


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
    view: View,
    grown: Set[str],
) -> None:
    shaped = tensor.reshape([dim.target for dim in view]).to(torch.float64)
    stacks = [i for i, dim in enumerate(view) if dims.dims[dim.dim].role is Role.STACK]
    terms = [factor for dim in dims.dims for factor in factors(dim.expr)]
    for i, (dim, term) in enumerate(zip(view, terms, strict=True)):
        axis = "+".join(sorted(grown & set(axis_names(term))))
        if not axis:
            continue
        # experts (stacks) and channels first, all else is one vector
        front = [s for s in stacks if s != i]
        experts = prod(shaped.shape[s] for s in front)
        channels = shaped.movedim([*front, i], [*range(len(front) + 1)]).reshape(experts, dim.target, -1)
        places = torch.from_numpy(places_of(indices((dim,))[-1][0]))
        new = (places != torch.arange(dim.target)).nonzero().flatten()
        a, b = channels[:, new], channels[:, places[new]]
        numbers = tuple(int(part) for part in name.split(".") if part.isdigit())
        parts = torch.stack([pair.sum(-1) for pair in (a * b, a * a, b * b, (a - b) ** 2)])
        key = numbers, axis, experts if front else 0
        if key in sums and sums[key].shape != parts.shape:
            # the axis occurs with another multiplicity (q and k heads, say)
            key = numbers, f"{axis} of {name}", key[2]
        sums[key] = sums[key] + parts if key in sums and sums[key].shape == parts.shape else parts


def _rows(sums: Mapping[_Key, torch.Tensor]) -> Iterator[ChannelSymmetry]:
    groups: dict[tuple[int | None, str], list[torch.Tensor]] = {}
    for (numbers, axis, _), value in sums.items():
        groups.setdefault((numbers[0] if numbers else None, axis.partition(" of ")[0]), []).append(value)
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
