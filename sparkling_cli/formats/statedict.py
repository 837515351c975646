"""State dicts inside a torch file: which entries are weights, which are optimizer state.

Shared by every format that keeps ``{"model": ..., "optimizer": ...}`` in one file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import OutputFile, ParamState
from sparkling_cli.formats.optimizer_states import CODES, PACKED_CODES
from sparkling_cli.formats.torchfile import (
    INSIDE,
    REMOVED,
    Call,
    TensorNode,
    TorchFile,
    TreePath,
    at,
    is_packed,
    is_subclass,
    lay_out,
    plain,
    read_values,
)

#: put in front of every name by wrappers; no part of the model
WRAPPERS = ("_orig_mod.", "module.", "_forward_module.", "_fsdp_wrapped_module.")

#: how one number of a dtype is packed
PACKED = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}


class Place(NamedTuple):
    """Where a number of the state stands: in which file, as which tensor or at which path."""

    file: str
    at: str | TreePath


class OptimizerTree(NamedTuple):
    """An optimizer's state dict, parsed.

    Attributes:
        states: one per parameter, in the file's order; the places of numbers are :class:`Place`.
        groups: param groups as plain data.
    """

    states: tuple[ParamState, ...] = ()
    groups: tuple[Mapping[str, Any], ...] = ()


def is_state_dict(value: Any) -> bool:
    """A dictionary of named tensors; entries that are no tensors may stand between them."""
    return (
        isinstance(value, dict)
        and any(isinstance(v, TensorNode) for v in value.values())
        and all(isinstance(k, str) for k in value)
    )


def is_optimizer(value: Any) -> bool:
    """What ``Optimizer.state_dict()`` gives."""
    return isinstance(value, dict) and isinstance(value.get("state"), dict) and "param_groups" in value


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> the name without what wrappers (compilation, data parallelism) put in front.

    Raises:
        CheckpointError: two names become one.
    """
    found = {name: name for name in names}
    again = True
    while again:
        again = False
        for wrapper in WRAPPERS:
            if found and all(name.startswith(wrapper) for name in found.values()):
                found = {key: name[len(wrapper) :] for key, name in found.items()}
                again = True
    # A module inside may be compiled on its own.
    if any("._orig_mod." in name for name in found.values()):
        found = {key: name.replace("._orig_mod.", ".") for key, name in found.items()}
    if len(set(found.values())) != len(found):
        twice = next(n for n in found.values() if sum(m == n for m in found.values()) > 1)
        raise CheckpointError(f"two weights are called {twice!r} once wrappers' prefixes are taken off")
    return found


def without_attribute(names: Iterable[str]) -> dict[str, str]:
    """Name -> the name without the attribute that holds the model, if that is the trainer's only part."""
    names = tuple(names)
    firsts = {name.partition(".")[0] for name in names}
    cut = len(firsts.pop()) + 1 if len(firsts) == 1 and all("." in name for name in names) else 0
    return {name: name[cut:].removeprefix("_orig_mod.") if cut else name for name in names}


def weights_in(file: TorchFile, path: TreePath) -> dict[str, str]:
    """Weight name (without wrappers) -> tensor key, in the file's order."""
    keys = file.keys
    names = [name for name, value in at(file.tree, path).items() if (*path, name) in keys]
    bare = bare_names(names)
    return {bare[name]: keys[(*path, name)] for name in names}


def optimizer_in(file: TorchFile, path: TreePath) -> OptimizerTree:
    """The optimizer at a path.

    State in dictionaries and lists has their keys and indices in its name: ``GG.0``.

    Raises:
        CheckpointError: state that is no dictionary.
    """
    keys = file.keys
    optimizer = at(file.tree, path)
    holders = optimizer["state"]
    named = bool(holders) and all(isinstance(i, str) and not i.isdigit() for i in holders)
    names = bare_names(holders) if named else {i: str(i) for i in holders}
    states = []
    counters: list[tuple[dict[str, float], str, str]] = []
    found: list[tuple[str, TreePath, Any, dict[str, str]]]
    found = [(names[ident], (*path, "state", ident), state, {}) for ident, state in holders.items()]
    for param, home, state, own in [*found, *_in_groups(optimizer, path, keys)]:
        if not isinstance(state, dict):
            raise CheckpointError(
                f"{file.path.name}: the optimizer's state of {param!r} is {type(state).__name__}"
            )
        tensors, places = dict(own), {}
        scalars: dict[str, float] = {}
        for name, value in state.items():
            if isinstance(value, TensorNode) and _is_counter(name, value):
                key = keys[(*home, name)]
                counters.append((scalars, name, key))
                places[name] = (Place(file.relative, key),)
            elif isinstance(value, (int, float)):
                scalars[name] = _number(value, f"{file.path.name}: {name!r} of parameter {param!r}")
                places[name] = (Place(file.relative, (*home, name)),)
            else:
                tensors.update(
                    {slot: keys[place] for slot, place in _tensors(value, str(name), (*home, name))}
                )
        states.append(ParamState(param, tensors, scalars, places))
    values = numbers_of(file, (key for _, _, key in counters))
    for scalars, name, key in counters:
        scalars[name] = values[key]
    groups = plain(optimizer["param_groups"])
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(
            f"{file.path.name}: the optimizer's param_groups must be a list of dictionaries, "
            f"found {groups!r:.80}"
        )
    return OptimizerTree(tuple(states), tuple(groups))


def _in_groups(
    optimizer: Any, path: TreePath, keys: Mapping[TreePath, str]
) -> Iterator[tuple[str, TreePath, Any, dict[str, str]]]:
    """State that a group keeps itself, under its parameters (GrokAdamW): these are copies of the weights.

    Yields the parameter's number, where its state is, the state, and the key of the copy.
    """
    groups = optimizer["param_groups"]
    for number, group in enumerate(groups if isinstance(groups, (list, tuple)) else ()):
        held, params = (group.get(name) if isinstance(group, dict) else None for name in ("state", "params"))
        if not isinstance(held, dict) or not isinstance(params, (list, tuple)) or len(held) != len(params):
            continue
        home = (*path, "param_groups", number, "state")
        for place, (param, (own, state)) in enumerate(zip(params, held.items(), strict=True)):
            if isinstance(own, (TensorNode, Call)):
                yield str(param), (*home, own), state, {"param": keys[(*home, f"<key {place}>")]}


def _is_counter(name: Any, value: TensorNode) -> bool:
    return prod(value.shape) == 1 and value.dtype in PACKED and name == "step"


def _tensors(value: Any, slot: str, path: TreePath) -> Iterator[tuple[str, TreePath]]:
    """Every tensor of a state, with its name and its path."""
    if isinstance(value, TensorNode):
        yield slot, path
    elif isinstance(value, Call) and is_subclass(value):
        codes = PACKED_CODES if is_packed(value) else CODES
        for name, item in at(value, INSIDE).items():
            if isinstance(item, TensorNode):
                yield f"{slot}{codes if name == 'codes' else f'.{name}'}", (*path, *INSIDE, name)
    elif isinstance(value, (dict, list, tuple)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{slot}.{name}", (*path, name))


def joined(trees: Sequence[OptimizerTree], where: str) -> OptimizerTree:
    """Several optimizers of one model as one: each one's numbers follow those of the one before.

    Args:
        trees: in the file's order.
        where: the file, for messages.

    Raises:
        CheckpointError: some know parameters by number and some by name, or two have the same parameter.
    """
    if len(trees) == 1:
        return trees[0]
    known = [state.param.isdigit() for tree in trees for state in tree.states]
    if any(known) and not all(known):
        raise CheckpointError(f"{where}: one optimizer knows its parameters by number, another by name")
    states: list[ParamState] = []
    groups: list[Mapping[str, Any]] = []
    base = 0
    for tree in trees:
        shift = base if all(known) else None
        states += [replace(state, param=_shifted(state.param, shift)) for state in tree.states]
        for group in tree.groups:
            params = group.get("params", ())
            if isinstance(params, (list, tuple)):
                group = {**group, "params": [_shifted(str(param), shift) for param in params]}
                base += len(params)
            groups.append(group)
    names = [state.param for state in states]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{where}: two optimizers have state of parameter {twice!r}")
    return OptimizerTree(tuple(states), tuple(groups))


def _shifted(param: str, shift: int | None) -> str:
    return str(int(param) + shift) if shift is not None and param.isdigit() else param


def _number(value: float, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise CheckpointError(f"{where} is an absurdly large number") from None


def numbers_of(file: TorchFile, keys: Iterable[str]) -> dict[str, float]:
    """Values of one-entry tensors."""
    return {
        key: float(struct.unpack(PACKED[file.tensors[key].dtype], data)[0])
        for key, data in read_values(file, keys).items()
    }


def packed(dtype: str, value: float) -> bytes:
    """A number as the bytes of a one-entry tensor."""
    return struct.pack(PACKED[dtype], int(value) if dtype.startswith("int") else value)


def with_shapes(
    file: TorchFile,
    new: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    edits: Mapping[TreePath, Any] | None = None,
    values: Mapping[str, bytes] | None = None,
) -> OutputFile:
    """The file with its tensors' new shapes.

    Args:
        file: the source's.
        new: key -> dtype and shape.
        edits: see :func:`~sparkling_cli.formats.torchfile.lay_out`.
        values: bytes of small tensors; those that are neither here nor in ``new`` (counters, random states)
            stay as they are.
    """
    given, edits = values or {}, edits or {}
    gone = removed(file, edits)
    left = [key for key in file.tensors if key not in new and key not in given and key not in gone]
    return lay_out(file, new, edits=edits, values={**read_values(file, left), **given})


def removed(file: TorchFile, edits: Mapping[TreePath, Any]) -> set[str]:
    """Keys of the tensors that edits take out."""
    cuts = [path for path, value in edits.items() if value is REMOVED]
    return {key for key, path in file.paths.items() if any(path[: len(cut)] == cut for cut in cuts)}
