"""From the ``.metadata`` of one or two DCP directories to tensors, states and groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.errors import CheckpointError, UnsafePickleError
from sparkling_cli.formats.dcp.buckets import FLAT
from sparkling_cli.formats.dcp.check import check_metadata
from sparkling_cli.formats.dcp.items import Item, tensor_key
from sparkling_cli.formats.dcp.metadata import METADATA, read_metadata
from sparkling_cli.formats.dcp.names import Roles, find_roles
from sparkling_cli.formats.model import Further, ParamState
from sparkling_cli.formats.other_files import further_in
from sparkling_cli.formats.statedict import PACKED, numbers_of
from sparkling_cli.formats.torchfile import plain
from sparkling_cli.formats.torchfile.unpickle import Anything
from sparkling_cli.storage.tensors import Extent, StoredTensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    from sparkling_cli.formats.dcp.megatron import Megatron


@dataclass(frozen=True)
class Directory:
    """One DCP directory of a checkpoint.

    Attributes:
        root: the checkpoint.
        folder: below it ("" or with a slash behind).
        metadata: its ``.metadata``.
        prefix: what stands before its entries' names, so that they are unique in the checkpoint.
    """

    root: Path
    folder: str
    metadata: Metadata
    prefix: str

    def item(self, index: MetadataIndex) -> Item:
        """Where an item lies.

        Raises:
            CheckpointError: it is compressed or otherwise transformed, or lies outside the directory.
        """
        info = self.metadata.storage_data[index]
        transforms = getattr(info, "transform_descriptors", None)  # torch 2.6 has no such field
        if transforms:
            raise CheckpointError(
                f"{index.fqn!r} is stored through {', '.join(transforms)}: its bytes are no tensor data",
                hint="save the checkpoint without stream transforms",
            )
        name = str(info.relative_path)
        if name.startswith("/") or ".." in name.split("/"):
            raise CheckpointError(f".metadata points out of its own directory: {name!r}")
        return Item(self.root, self.folder + name, int(info.offset), int(info.length))

    def files(self) -> dict[str, int]:
        """Every data file of the directory, and where the last item in it ends.

        Raises:
            CheckpointError: names the first that is missing or too short.
        """
        ends: dict[str, int] = {}
        for index in self.metadata.storage_data:
            item = self.item(index)
            ends[item.file] = max(ends.get(item.file, 0), item.offset + item.length)
        for name, end in sorted(ends.items()):
            path = self.root / name
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing; .metadata names it",
                    hint="every .distcp file that .metadata names must be there: copy the checkpoint again",
                )
            if path.stat().st_size < end:
                raise CheckpointError(
                    f"{path} is truncated: its items end at byte {end}, it has {path.stat().st_size}",
                    hint="copy the checkpoint again",
                )
        return ends


class Entry(NamedTuple):
    """One name of the checkpoint: which directory it is in, and its fully qualified name there."""

    directory: Directory
    fqn: str

    @property
    def described(self) -> Any:
        """What ``.metadata`` says of it: of a tensor its size, dtype and boxes."""
        return self.directory.metadata.state_dict_metadata[self.fqn]

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor, and no pickled object."""
        return hasattr(self.described, "chunks")

    @property
    def dtype(self) -> str:
        """A tensor's."""
        return str(self.described.properties.dtype).removeprefix("torch.")

    def item(self, offsets: Any = None) -> Item:
        """Where it lies; of a tensor the box at these offsets."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        return self.directory.item(MetadataIndex(self.fqn, offsets))

    def stored(self) -> StoredTensor:
        """Shape, dtype and boxes of a tensor; every item's own header is checked against ``.metadata``.

        Raises:
            CheckpointError: they contradict each other.
        """
        extents = []
        for chunk in self.described.chunks:
            item, start, sizes = self.item(chunk.offsets), tuple(chunk.offsets), tuple(chunk.sizes)
            tree = item.read()
            found = tree.tensors[tensor_key(tree, self.fqn)]
            if (found.dtype, found.shape) != (self.dtype, sizes):
                raise CheckpointError(
                    f"{item.root / item.file}: {self.fqn!r} at {start} is {found.dtype} of shape "
                    f"{found.shape}; .metadata says {self.dtype} of shape {sizes}",
                    hint="the files are of different saves: copy the checkpoint again",
                )
            box: Extent = found.extents[0]._replace(start=start)
            extents.append(box)
        return StoredTensor(self.dtype, tuple(self.described.size), tuple(extents))

    def number(self) -> float | None:
        """The value of a tensor of one number; None for anything else."""
        if not self.is_tensor or prod(self.described.size) != 1:
            return None
        chunk = next(chunk for chunk in self.described.chunks if 0 not in chunk.sizes)
        tree = self.item(chunk.offsets).read()
        key = tensor_key(tree, self.fqn)
        found = tree.tensors[key]
        return numbers_of(tree, [key])[key] if found.dtype in PACKED and prod(found.shape) == 1 else None

    def value(self) -> Any:
        """A pickled object as plain data, or the value of a tensor of one number.

        Raises:
            UnsafePickleError: its pickle names something that is not harmless; it was not executed.
        """
        return self.number() if self.is_tensor else plain(self.item().read().tree)


@dataclass(frozen=True)
class Parsed:
    """What the writer needs again.

    Attributes:
        directories: the directories.
        entries: of all of them.
        config_file: with the model's sizes; "" if it has none of its own.
        within: what the names of entries begin with that are keys of the config.
        roles: of the entries.
        lists: entry -> names of parameters that it holds instead of those of the source.
        megatron: what only Megatron's directories have.
    """

    directories: tuple[Directory, ...]
    entries: Mapping[str, Entry]
    config_file: str
    within: str
    roles: Roles
    lists: Mapping[str, list[str]] = field(default_factory=dict)
    megatron: Megatron | None = None


def read_directories(root: Path, folders: tuple[str, ...]) -> tuple[Directory, ...]:
    """Every directory; their entries get names that are unique in the checkpoint."""
    return tuple(
        Directory(root, folder, read_metadata(root / folder), folder if number else "")
        for number, folder in enumerate(folders)
    )


def read_entries(root: Path, directories: tuple[Directory, ...]) -> tuple[dict[str, Entry], Roles]:
    """The entries of all directories, and who is who.

    What Megatron's optimizer keeps flat is none of them: see :mod:`~sparkling_cli.formats.dcp.buckets`.
    """
    for directory in directories:
        check_metadata(directory.metadata, root / directory.folder / METADATA)
    entries: dict[str, Entry] = {}
    paths: dict[str, tuple[str, ...]] = {}
    for directory in directories:
        planned = directory.metadata.planner_data if isinstance(directory.metadata.planner_data, dict) else {}
        for fqn in directory.metadata.state_dict_metadata:
            entries[directory.prefix + fqn] = Entry(directory, fqn)
            paths[directory.prefix + fqn] = tuple(map(str, planned.get(fqn) or (fqn,)))
    for directory in directories:
        directory.files()
    paths = {name: path for name, path in paths.items() if not FLAT.fullmatch(name)}
    tensors = frozenset(name for name in paths if entries[name].is_tensor)
    return entries, find_roles(paths, tensors, str(root))


def read_states(
    roles: Roles, entries: Mapping[str, Entry]
) -> tuple[tuple[ParamState, ...], dict[str, StoredTensor]]:
    """Optimizer state, its numbers (``step``) with the entries that hold them, and its tensors."""
    tensors: dict[str, StoredTensor] = {}
    states = []
    for param, slots in roles.states.items():
        kept, scalars, places = {}, {}, {}
        for slot, name in slots.items():
            value = entries[name].number() if slot == "step" else None
            if value is None:
                kept[slot] = name
                tensors[name] = entries[name].stored()
            else:
                scalars[slot], places[slot] = value, (name,)
        states.append(ParamState(param, kept, scalars, places))
    return tuple(states), tensors


def read_further(
    roles: Roles, entries: Mapping[str, Entry], states: Iterable[ParamState], values: Mapping[str, Any]
) -> Iterator[Further]:
    """Every tensor that is no weight and no state, those inside of pickled objects included.

    Args:
        roles: of its entries.
        entries: all of them.
        states: some of whose one-number tensors are numbers.
        values: of the optimizer's groups.
    """
    fields = (name for name, value in values.items() if not isinstance(value, (int, float, type(None))))
    scalars = (name for state in states for places in state.places.values() for name in places)
    for name in (*roles.others, *scalars, *fields):
        entry = entries[name]
        if not entry.is_tensor:
            item = entry.item()
            if item.start(4) == b"PK\x03\x04":  # else a planner's own matter
                tensors = further_in(item.read(allow=Anything()), (), name)
                yield from (found._replace(key="") for found in tensors)
        elif prod(entry.described.size) > 1:
            yield Further(name, "", name, entry.stored())
        else:
            shape, item = tuple(entry.described.size), entry.item(entry.described.chunks[0].offsets)
            place = Extent(item.file, item.offset, (0,) * len(shape), shape)  # of its item
            yield Further(name, "", "", StoredTensor(entry.dtype, shape, (place,)))


def read_fields(roles: Roles, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Entry -> its value as plain data, of every field of the optimizer's groups."""
    found: dict[str, Any] = {}
    for name in (name for fields in roles.groups.values() for name in fields.values()):
        try:
            found[name] = entries[name].value()
        except UnsafePickleError:
            found[name] = "(a Python object)"
    return found


def read_groups(roles: Roles, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Param groups as plain data.

    Flattened checkpoints keep the numbers of every parameter apart; parameters with equal numbers are one
    group here.
    """
    found = {
        group: {field: values[name] for field, name in fields.items()}
        for group, fields in roles.groups.items()
    }
    if all(group.isdigit() for group in found):
        return tuple(found.values())
    merged: dict[str, dict[str, Any]] = {}
    for param, fields in found.items():
        text = repr(sorted(fields.items()))
        merged.setdefault(text, {**fields, "params": []})["params"].append(param)
    return tuple(merged.values())
