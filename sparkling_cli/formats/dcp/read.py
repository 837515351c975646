"""From the ``.metadata`` of one or two DCP directories to tensors, states and groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sparkling_cli.errors import CheckpointError, UnsafePickleError
from sparkling_cli.formats.dcp.check import check_metadata
from sparkling_cli.formats.dcp.items import Place, read_item, scalar_of, tensor_key, value_of
from sparkling_cli.formats.dcp.metadata import METADATA, read_metadata
from sparkling_cli.formats.dcp.names import Roles, find_roles
from sparkling_cli.formats.further import tensors_in_item
from sparkling_cli.formats.model import Further, ParamState
from sparkling_cli.storage.tensors import Extent, StoredTensor

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata


@dataclass(frozen=True)
class Part:
    """One DCP directory of a checkpoint: its folder below the root ("" or with a slash behind)."""

    folder: str
    metadata: Metadata

    def described(self, fqn: str) -> TensorStorageMetadata:
        """Size, dtype and boxes of a tensor entry."""
        found = self.metadata.state_dict_metadata[fqn]
        return cast("TensorStorageMetadata", found)

    def place(self, index: MetadataIndex) -> Place:
        """Where an item lies, relative to the checkpoint's root.

        Raises:
            CheckpointError: it is compressed or otherwise transformed, or has no place.
        """
        info = self.metadata.storage_data.get(index)
        if info is None:
            raise CheckpointError(f".metadata says nowhere where {index.fqn!r} at {index.offset} lies")
        if info.transform_descriptors:
            raise CheckpointError(
                f"{index.fqn!r} is stored through {', '.join(info.transform_descriptors)}: its bytes are no "
                "tensor data",
                hint="save the checkpoint without stream transforms",
            )
        name = str(info.relative_path)
        if name.startswith("/") or ".." in name.split("/"):
            raise CheckpointError(f".metadata points out of its own directory: {name!r}")
        return Place(self.folder + name, int(info.offset), int(info.length))


@dataclass(frozen=True)
class Entry:
    """One name of the checkpoint: which part it is in, and its fully qualified name there."""

    part: Part
    fqn: str

    @property
    def described(self) -> TensorStorageMetadata:
        """Size, dtype and boxes of a tensor entry."""
        return self.part.described(self.fqn)


@dataclass(frozen=True)
class Parsed:
    """What the writer needs again."""

    parts: tuple[Part, ...]
    entries: Mapping[str, Entry]
    roles: Roles
    scalar_keys: Mapping[tuple[int, str], str]
    config_file: str


def read_parts(root: Path, folders: tuple[str, ...]) -> tuple[tuple[Part, ...], dict[str, Entry], Roles]:
    """All parts, their entries under names that are unique in the checkpoint, and who is who."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    parts = tuple(Part(folder, read_metadata(root / folder)) for folder in folders)
    for part in parts:
        check_metadata(part.metadata, root / part.folder / METADATA)
    entries: dict[str, Entry] = {}
    paths: dict[str, tuple[str, ...]] = {}
    tensors = set()
    for part in parts:
        planned = part.metadata.planner_data if isinstance(part.metadata.planner_data, dict) else {}
        for fqn, meta in part.metadata.state_dict_metadata.items():
            name = fqn if part is parts[0] else f"{part.folder}{fqn}"
            entries[name] = Entry(part, fqn)
            paths[name] = tuple(map(str, planned.get(fqn) or (fqn,)))
            if isinstance(meta, TensorStorageMetadata):
                tensors.add(name)
    for part in parts:
        _check_files(root, part)
    return parts, entries, find_roles(paths, frozenset(tensors), str(root))


def _check_files(root: Path, part: Part) -> None:
    """Every data file is there and long enough for every item in it.

    Raises:
        CheckpointError: names the first that is not.
    """
    ends: dict[str, int] = {}
    for index in part.metadata.storage_data:
        place = part.place(index)
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        path = root / name
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


def stored_tensor(root: Path, entry: Entry) -> StoredTensor:
    """Shape, dtype and boxes of a tensor; every item's own header is checked against ``.metadata``.

    Raises:
        CheckpointError: they contradict each other, or the boxes do not tile the tensor.
    """
    meta = entry.described
    shape = tuple(meta.size)
    dtype = str(meta.properties.dtype).removeprefix("torch.")
    extents: list[Extent] = []
    for index, sizes in chunks_of(entry):
        place = entry.part.place(index)
        item = read_item(root, place)
        stored = item.tensors[tensor_key(item, entry.fqn)]
        if (stored.dtype, stored.shape) != (dtype, sizes):
            raise CheckpointError(
                f"{root / place.file}: {entry.fqn!r} at {tuple(index.offset or ())} is {stored.dtype} of "
                f"shape {stored.shape}; .metadata says {dtype} of shape {sizes}",
                hint="the files are of different saves: copy the checkpoint again",
            )
        extents.append(stored.extents[0]._replace(start=tuple(index.offset or ())))
    if sum(prod(extent.shape) for extent in extents) != prod(shape):
        raise CheckpointError(
            f"{root}: the {len(extents)} boxes of {entry.fqn!r} do not tile its shape {shape}",
            hint="a rank's part is missing: was every rank's save finished?",
        )
    return StoredTensor(dtype, shape, tuple(extents))


def chunks_of(entry: Entry) -> Iterator[tuple[MetadataIndex, tuple[int, ...]]]:
    """``(index in storage, sizes)`` of every box of a tensor."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    meta = entry.described
    for chunk in meta.chunks:
        yield MetadataIndex(entry.fqn, chunk.offsets), tuple(chunk.sizes)


def read_states(
    root: Path, roles: Roles, entries: Mapping[str, Entry]
) -> tuple[tuple[ParamState, ...], dict[str, StoredTensor], dict[tuple[int, str], str]]:
    """Optimizer state, its tensors, and which entries hold its one-number tensors (``step``)."""
    tensors: dict[str, StoredTensor] = {}
    scalar_keys: dict[tuple[int, str], str] = {}
    states = []
    for number, (param, slots) in enumerate(roles.states.items()):
        kept, scalars = {}, {}
        for slot, name in slots.items():
            entry = entries[name]
            single = slot == "step" and prod(entry.described.size) == 1
            value = _number(root, entry) if single else None
            if value is None:
                kept[slot] = name
                tensors[name] = stored_tensor(root, entry)
            else:
                scalars[slot] = value
                scalar_keys[number, slot] = name
        states.append(ParamState(param, kept, scalars))
    return tuple(states), tensors, scalar_keys


def read_further(
    root: Path,
    roles: Roles,
    entries: Mapping[str, Entry],
    scalars: Iterable[str],
    values: Mapping[str, Any],
) -> Iterator[Further]:
    """Every tensor that is no weight and no state, those inside of pickled objects included.

    Args:
        root: the checkpoint.
        roles: of its entries.
        entries: all of them.
        scalars: entries of one-number tensors that the states have as numbers.
        values: of the optimizer's groups.
    """
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    fields = (name for name, value in values.items() if not isinstance(value, (int, float, type(None))))
    for name in (*roles.others, *scalars, *fields):
        entry = entries[name]
        meta = entry.part.metadata.state_dict_metadata[entry.fqn]
        if isinstance(meta, TensorStorageMetadata):
            if prod(meta.size) > 1:
                yield Further(name, "", name, stored_tensor(root, entry))
            else:
                dtype = str(meta.properties.dtype).removeprefix("torch.")
                yield Further(name, "", "", StoredTensor(dtype, tuple(meta.size), ()))
            continue
        place = entry.part.place(MetadataIndex(entry.fqn))
        yield from tensors_in_item(root, place.file, place.offset, place.length, name)


def _number(root: Path, entry: Entry) -> float | None:
    index = next(index for index, sizes in chunks_of(entry) if 0 not in sizes)
    return scalar_of(read_item(root, entry.part.place(index)), entry.fqn)


def bytes_value(root: Path, entry: Entry) -> Any:
    """The object of a bytes entry as plain data.

    Raises:
        UnsafePickleError: its pickle names something that is not harmless; it was not executed.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    meta = entry.part.metadata.state_dict_metadata[entry.fqn]
    if isinstance(meta, BytesStorageMetadata):
        index = MetadataIndex(entry.fqn)
        return value_of(read_item(root, entry.part.place(index)))
    return _number(root, entry) if prod(entry.described.size) == 1 else None


def read_fields(root: Path, roles: Roles, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Entry -> its value as plain data, of every field of the optimizer's groups."""
    found: dict[str, Any] = {}
    for fields in roles.groups.values():
        for name in fields.values():
            try:
                found[name] = bytes_value(root, entries[name])
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
