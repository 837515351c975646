"""What only Megatron's directories have: arguments and step beside the tensors, and buckets of state.

Arguments, step, schedule, and how the optimizer's state lies, are saved once: in the file ``common.pt``, or,
by newer versions, in an object among the others. State in buckets is written by parameter, as Megatron itself
does with ``--dist-ckpt-optim-fully-reshardable``: it loads either, by what the checkpoint says of itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.dcp.buckets import (
    FLAT,
    MASTER,
    WAY_OUT,
    check_masters,
    is_bucket,
    states_in_buckets,
)
from sparkling_cli.formats.dcp.read import Entry
from sparkling_cli.formats.directory import read_json
from sparkling_cli.formats.megatron import args_in, facts_in
from sparkling_cli.formats.model import Further, OutputFile, ParamState
from sparkling_cli.formats.other_files import further_in
from sparkling_cli.formats.statedict import with_shapes
from sparkling_cli.formats.torchfile import ATTRIBUTES, TorchFile, TreePath, plain, read_torch_file
from sparkling_cli.formats.torchfile.unpickle import Anything
from sparkling_cli.storage.tensors import StoredTensor
from sparkling_cli.widening.geometry import Run, View

FILE, OBJECT, BACKEND = "common.pt", "common_state/shard_0_1", "metadata.json"
#: what says how state lies, and that it lies by parameter, or in buckets
_LAYOUT, _KIND = "param_state_sharding_type", "distrib_optim_sharding_type"
_BY_PARAMETER, _IN_BUCKETS = "fully_reshardable", "dp_reshardable"
#: the state that masters are, of either optimizer
_MASTERS = (MASTER, "fp32_param")
#: what a module saves beside its tensors: the place among the layers, and experts, and how many there are
_PIECE = re.compile(
    r"(?P<module>.+)(?P<what>\._extra_state/shard_)(?P<at>\d+(?:\.\d+)*)_(?P<of>\d+(?:\.\d+)*)"
)
#: what the optimizer says of its buckets, which are none in the output
_SIZES = ("per_bucket_numel", "per_bucket_numel_unpadded")


class FlatObject(NamedTuple):
    """What an object is that the optimizer saves by group of ranks: ``chained_0.``, 1, ``optimizer``."""

    chain: str
    group: int
    name: str


@dataclass(frozen=True)
class Megatron:
    """What was read.

    Attributes:
        common: the file, or the item of a ``.distcp`` file, that has what is saved once.
        entry: the object's name among the entries; "" for the file.
        objects: of the optimizer, where its state lies in buckets.
        states: weight -> state name -> where it lies in the buckets.
    """

    common: TorchFile
    entry: str
    objects: Mapping[FlatObject, TorchFile]
    states: Mapping[str, Mapping[str, StoredTensor]]

    @property
    def _at(self) -> TreePath:
        return (0,) if self.entry else ()

    @property
    def tree(self) -> dict[Any, Any]:
        """What is saved once; nothing of it was executed."""
        found = self.common.tree
        if self.entry and isinstance(found, list) and found:
            found = found[0]
        return found if isinstance(found, dict) else {}

    @property
    def args(self) -> dict[str, Any] | None:
        """The arguments of the run as plain data; None if they were not saved."""
        return args_in(self.tree)

    @property
    def facts(self) -> dict[str, Any]:
        """Kind, step and schedule."""
        return {"kind": "Megatron, torch_dist", **facts_in(self.tree)}

    @property
    def config_file(self) -> str:
        """Where the arguments are, for messages."""
        return f"{self.entry or FILE}: args"

    @property
    def groups(self) -> tuple[Mapping[str, Any], ...]:
        """Those of the optimizer, without its parameters."""
        held = [item.tree[0] for own, item in self.objects.items() if own[1:] == (0, "optimizer")]
        held = held or [one.get("optimizer") for one in self._optimizers().values()]
        found = (one.get("param_groups") for one in held if isinstance(one, dict))
        return tuple(g for groups in found for g in map(plain, groups or ()) if isinstance(g, dict))

    def becomes(self, entries: Iterable[str], views: Mapping[str, View]) -> dict[str, tuple[str, ...]]:
        """Entry -> its names in the output, where these are others: state by parameter instead of buckets.

        Args:
            entries: names of all.
            views: of the weights, by entry.
        """
        found = pieces_of(entries, views)
        found |= {name: () for name in entries if self.states and FLAT.fullmatch(name)}
        return found | {w: (w, *(state_entry(w, slot) for slot in own)) for w, own in self.states.items()}

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """State in the buckets, by the entries that the output has instead of them."""
        return {state_entry(w, slot): at for w, slots in self.states.items() for slot, at in slots.items()}

    def param_states(self, weights: Mapping[str, str]) -> Iterator[ParamState]:
        """The state in the buckets.

        Args:
            weights: name -> entry.
        """
        for name, entry in weights.items():
            if entry in self.states:
                yield ParamState(name, {slot: state_entry(entry, slot) for slot in self.states[entry]})

    @property
    def further(self) -> list[Further]:
        """Tensors that are saved once, which can only be copied; those of an object are among the entries."""
        return [] if self.entry else [item._replace(key="") for item in further_in(self.common, ())]

    def _optimizers(self) -> dict[TreePath, dict[Any, Any]]:
        """The optimizers' states by their places: one, or several in a chain."""
        held = self.tree.get("optimizer")
        if not isinstance(held, dict):
            return {}
        if held and all(type(key) is int for key in held):
            return {("optimizer", key): one for key, one in held.items() if isinstance(one, dict)}
        return {("optimizer",): held}

    def check(self) -> None:
        """What is said of the optimizer fits its buckets.

        Raises:
            CheckpointError: it does not, or an object holds a tensor.
        """
        said = self.tree.get("content_metadata")
        kind = said.get(_KIND) if isinstance(said, dict) else None
        if kind != _IN_BUCKETS or {_chain(p) for p in self._optimizers()} != {o.chain for o in self.objects}:
            raise CheckpointError(
                f"{self.entry or FILE}: the optimizer's state lies flat, as {kind!r}; of flat state only "
                f"{_IN_BUCKETS!r} is read",
                hint=WAY_OUT,
            )
        for own, item in self.objects.items():
            if not isinstance(item.tree, list) or len(item.tree) != 1 or item.tensors:
                kind = "a tensor" if item.tensors else "something else than one object"
                raise CheckpointError(
                    f"{item.relative}: the optimizer's {own.name!r} holds {kind}", hint=WAY_OUT
                )

    def edited(self, config: Mapping[str, Any]) -> OutputFile:
        """What is saved once, with other arguments, and the optimizer's state as one by parameter."""
        edits = {(*self._at, "args", *ATTRIBUTES, key): value for key, value in config.items()}
        if self.objects:
            said = (*self._at, "content_metadata")
            edits |= {(*said, _KIND): _BY_PARAMETER, (*said, "chained_optim_avoid_prefix"): True}
            for place in self._optimizers():
                edits[(*self._at, *place, _LAYOUT)] = _BY_PARAMETER
                for own, item in self.objects.items():
                    if own[:2] == (_chain(place), 0) and own.name not in _SIZES:
                        edits[(*self._at, *place, own.name)] = item.tree[0]
        return with_shapes(self.common, {}, edits=edits)


def state_entry(weight: str, slot: str) -> str:
    """The entry of a weight's state, where it lies by parameter."""
    return f"optimizer.state.{slot}.{weight}"


def pieces_of(entries: Iterable[str], views: Mapping[str, View]) -> dict[str, tuple[str, ...]]:
    """What modules save beside their tensors, once for each layer and expert.

    Args:
        entries: names of all.
        views: of the weights, by entry.

    Returns:
        Entry -> its names in the output: its own place, and those of what is copied from it.
    """
    stacks = {entry.rpartition(".")[0]: view for entry, view in views.items()}
    found = {}
    for entry in entries:
        piece = _PIECE.fullmatch(entry)
        if piece is None or piece["module"] not in stacks:
            continue
        at, of = (tuple(map(int, piece[part].split("."))) for part in ("at", "of"))
        dims = [dim for dim in stacks[piece["module"]] if dim.dim < len(of)]
        if tuple(dim.source for dim in dims) != of:  # of the whole model
            continue
        copies = (_copies_of(source, dim.runs) for source, dim in zip(at, dims, strict=True))
        own = piece["module"] + piece["what"]
        new = ".".join(str(dim.target) for dim in dims)
        found[entry] = tuple(f"{own}{'.'.join(map(str, place))}_{new}" for place in product(*copies))
    return found


def _copies_of(source: int, runs: Iterable[Run]) -> list[int]:
    """Where an entry of a dim is in the output."""
    return [
        run.target + source - run.source for run in runs if run.source <= source < run.source + run.length
    ]


def read_megatron(
    root: Path, entries: Mapping[str, Entry], weights: Mapping[str, StoredTensor]
) -> Megatron | None:
    """What only Megatron's directories have; None in others.

    Args:
        root: the checkpoint.
        entries: all.
        weights: of the model, by their entries.

    Raises:
        CheckpointError: it is damaged, or lies in a way that is not read.
    """
    flat = [name for name in entries if FLAT.fullmatch(name)]
    if OBJECT in entries and not entries[OBJECT].is_tensor:
        entry, common = OBJECT, entries[OBJECT].item().read(allow=Anything())
    elif (root / FILE).is_file():
        entry, common = "", read_torch_file(root / FILE, FILE, allow=Anything())
    elif flat:
        raise CheckpointError(
            f"{root}: {FILE} is missing, which says how the optimizer's state lies", hint=WAY_OUT
        )
    else:
        return None
    if (root / BACKEND).is_file():
        read_json(root, BACKEND)  # nothing of it changes, and nothing loads without it
    objects = {}
    for name in flat:
        if not entries[name].is_tensor:
            chain, group, rest = FLAT.fullmatch(name).groups()  # type: ignore[union-attr]
            own = FlatObject(chain, int(group), rest.partition("/")[0])
            objects[own] = entries[name].item().read(allow=Anything())
    found = Megatron(common, entry, objects, {})
    if not flat:
        named = {(name, state_entry(name, slot)) for name in weights for slot in _MASTERS}
        masters = {name: entries[entry].stored() for name, entry in sorted(named) if entry in entries}
        check_masters(root, weights, masters)
        return found
    found.check()
    buckets = {name: entries[name].stored() for name in flat if is_bucket(name)}
    return Megatron(common, entry, objects, states_in_buckets(root, weights, buckets))


def _chain(place: TreePath) -> str:
    """What stands before the entries' names of the optimizer at a place."""
    return f"chained_{place[1]}." if len(place) > 1 else ""
