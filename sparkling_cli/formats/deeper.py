"""Torch files of a checkpoint as those of a deeper model: weights and states are read for several layers.

Formats put these files in place of the source's and read them as they read any others.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checkpoint, Pairs
from sparkling_cli.formats.statedict import optimizer_in
from sparkling_cli.formats.torchfile import Holder, More, TorchFile, TreePath, at


def deeper_files(
    checkpoint: Checkpoint,
    files: Mapping[str, TorchFile],
    model: tuple[str, TreePath] | None,
    optimizers: Sequence[tuple[str, TreePath]],
    weights: Pairs,
    groups: Sequence[Pairs],
) -> dict[str, TorchFile]:
    """The files with the weights and parameters of a deeper model.

    Args:
        checkpoint: the source, its states named.
        files: by relative path.
        model: the file and path of the state dict, if there is one in them.
        optimizers: file and path of each, in the order that the checkpoint's groups have.
        weights: see :class:`~sparkling_cli.formats.model.Deepening`.
        groups: the same, of all optimizers.

    Raises:
        CheckpointError: a name in the files has more in it than wrappers in front.
    """
    if any("state" in group for group in checkpoint.param_groups):
        raise CheckpointError(
            f"{checkpoint.root.name}: the optimizer's groups hold copies of the weights, in which new "
            "layers have no place",
            hint="expand a copy without the optimizer's state",
        )
    more = {name: More(file) for name, file in files.items()}
    if model is not None:
        name, path = model
        entries = files[name].keys
        names = (raw for raw in at(files[name].tree, path) if (*path, raw) in entries)
        raw = dict(zip(checkpoint.weights, names, strict=True))
        more[name].weights(path, [(renamed(raw[old], old, new), raw[old]) for new, old in weights])
    left, states = list(groups), list(checkpoint.states)
    for name, path in optimizers:
        optimizer = at(files[name].tree, path)
        found = optimizer_in(files[name], path).states
        idents: dict[str, Any] = {}
        bare = dict(zip((s.param for s in found), (s.param for s in states), strict=False))
        for ident, state in zip(optimizer["state"], found, strict=False):
            idents.setdefault(bare[state.param], ident)
        count = len(optimizer["param_groups"])
        own, left, states = left[:count], left[count:], states[len(found) :]
        more[name].parameters(path, [[_holder(new, old, idents) for new, old in pairs] for pairs in own])
    return {name: one.done() for name, one in more.items()}


def _holder(new: str, old: str, idents: Mapping[str, Any]) -> Holder:
    ident = idents.get(old)  # what is frozen has no state
    return Holder(renamed(ident, old, new) if isinstance(ident, str) and not ident.isdigit() else new, ident)


def renamed(raw: str, old: str, new: str) -> str:
    """A name in a file under another name of its weight; what stands around it stays.

    Raises:
        CheckpointError: the weight's name is not in it.
    """
    before, found, behind = raw.rpartition(old)
    if not found:
        raise CheckpointError(f"{raw!r} has a wrapper's name inside", hint="save the unwrapped model")
    return before + new + behind


def by_source(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """What is read from each of the source's tensors, the old one first."""
    found: dict[str, list[str]] = {}
    for new, old in pairs:
        found.setdefault(old, []).append(new)
    return found


def as_read(
    checkpoint: Checkpoint, read: Checkpoint, files: Container[str], groups: Sequence[Pairs]
) -> Checkpoint:
    """The source with what was read from a deeper model's files.

    Args:
        checkpoint: the source.
        read: the files, as they are read.
        files: their relative paths.
        groups: names for numbered parameters.
    """
    names = [[new for new, _ in pairs] for pairs in groups]
    named = tuple(
        {**group, "params": own} if "params" in group else group
        for group, own in zip(read.param_groups, names, strict=True)
    )
    numbers = {str(number): name for number, name in enumerate(name for own in names for name in own)}
    return replace(
        checkpoint,
        tensors=read.tensors,
        weights=read.weights,
        states=read.renamed(numbers).states,
        param_groups=named,
        further=(*(item for item in checkpoint.further if item.file not in files), *read.further),
        private=read.private,
    )
