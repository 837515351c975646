"""A torch file with further weights and parameters, which are read where others lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.torchfile.archive import Record
from sparkling_cli.formats.torchfile.file import TRANSPARENT, TorchFile, TreePath, collected, walk
from sparkling_cli.formats.torchfile.layout import edited
from sparkling_cli.formats.torchfile.objects import Call, Ordered, TensorNode, at, copied_call, like
from sparkling_cli.formats.torchfile.subclass import is_subclass


class Holder(NamedTuple):
    """A parameter of the new file: its name, and the number or name of the one with its state, or None."""

    name: str
    source: Any


class More:
    """A torch file that gets further entries: what it is asked for again is read where the first lies."""

    def __init__(self, file: TorchFile) -> None:
        self._file = file
        self._copies = _Copies(file)
        self._edits: dict[TreePath, Any] = {}

    def weights(self, path: TreePath, names: Sequence[tuple[str, str]]) -> None:
        """Other weights in a state dict, or in another table of theirs; what is not named stays behind them.

        Args:
            path: of the table.
            names: of each weight of the new one, in order, and of the one that it is read from.
        """
        old = at(self._file.tree, path)
        sources = {source for _, source in names}
        found = {name: self._copies.of((path, source), old[source]) for name, source in names}
        found.update((name, value) for name, value in old.items() if name not in sources)
        self._edits[path] = like(old, found)

    def value(self, path: TreePath, value: Any) -> None:
        """Another plain value at a path."""
        self._edits[path] = value

    def parameters(self, path: TreePath, groups: Sequence[Sequence[Holder]]) -> None:
        """Other parameters in an optimizer's state dict; numbered ones through all groups, as torch does it.

        Args:
            path: of the optimizer.
            groups: of parameters; as many as the optimizer has.

        Raises:
            CheckpointError: a group has something for each of its parameters that is not known.
        """
        optimizer = at(self._file.tree, path)
        held = optimizer["state"]
        numbered = all(isinstance(ident, int) or ident.isdigit() for ident in held)
        holders = enumerate(holder for group in groups for holder in group)
        state = {
            number if numbered else h.name: self._copies.of((path, h.source), held[h.source])
            for number, h in holders
            if h.source is not None
        }
        first, changed = 0, []
        for group, own in zip(optimizer["param_groups"], groups, strict=True):
            idents = list(range(first, first + len(own))) if numbered else [holder.name for holder in own]
            changed.append(_group(group, own, idents, self._file.relative))
            first += len(own)
        self._edits[(*path, "state")] = like(held, state)
        self._edits[(*path, "param_groups")] = changed

    def done(self) -> TorchFile:
        """The new file."""
        records = list(self._file.archive.records)
        data = (i for i, record in enumerate(records) if record.name.startswith("data/"))
        last = max(data, default=len(records) - 1)
        records[last + 1 : last + 1] = self._copies.records
        archive = replace(self._file.archive, records=tuple(records))
        return collected(replace(self._file, tree=edited(self._file.tree, self._edits), archive=archive))


def _group(group: dict[str, Any], own: Sequence[Holder], idents: list[Any], where: str) -> dict[str, Any]:
    """A group's entry with its new parameters, and names where it has some."""
    known = {"params", "param_names"}
    count = len(group["params"])
    lists = [k for k, v in group.items() if isinstance(v, (list, dict)) and len(v) == count > 2]
    if set(lists) - known:
        raise CheckpointError(
            f"{where}: a group of the optimizer has {min(set(lists) - known)!r} for each of its parameters",
            hint="expand a copy of the checkpoint without the optimizer's state, and restart the optimizer",
        )
    named = {"param_names": [holder.name for holder in own]} if "param_names" in group else {}
    return {**group, "params": idents, **named}


class _Copies:
    """What is read once more: the same tensors in storages of their own."""

    def __init__(self, file: TorchFile) -> None:
        self.records: list[Record] = []
        self._known = {record.name: record for record in file.archive.records}
        self._seen: set[Any] = set()
        keys = [name.removeprefix("data/") for name in self._known if name.startswith("data/")]
        self._next = 1 + max((int(key) for key in keys if key.isdigit()), default=0)

    def of(self, place: Any, value: Any) -> Any:
        """The value at a place the first time that it is asked for, then copies of it."""
        if place not in self._seen:
            self._seen.add(place)
            return value
        return self._copied(value, {})

    def _copied(self, value: Any, storages: dict[str, Any]) -> Any:
        if isinstance(value, TensorNode):
            key = value.storage.key
            if key not in storages:
                storages[key] = replace(value.storage, key=str(self._next))
                self.records.append(self._known[f"data/{key}"]._replace(name=f"data/{self._next}"))
                self._next += 1
            return replace(value, storage=storages[key])
        if isinstance(value, Call):
            if not any(isinstance(part, TensorNode) for _, part in walk(value)):
                return value
            if value.function.path not in TRANSPARENT and not is_subclass(value):
                raise CheckpointError(f"a layer has a {value.function.path}, which cannot be copied")
            fresh = copied_call(value)
            fresh.args = tuple(self._copied(item, storages) for item in value.args)
            return fresh
        if isinstance(value, dict):
            copied = {key: self._copied(item, storages) for key, item in value.items()}
            return Ordered(copied) if isinstance(value, Ordered) else copied
        if isinstance(value, (list, tuple)):
            return type(value)(self._copied(item, storages) for item in value)
        return value
