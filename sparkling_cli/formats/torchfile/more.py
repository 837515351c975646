"""An optimizer's torch file with further parameters, whose state is read where that of others lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.torchfile.archive import Record
from sparkling_cli.formats.torchfile.file import TorchFile, collected
from sparkling_cli.formats.torchfile.objects import Call, Ordered, TensorNode


class Holder(NamedTuple):
    """A parameter of the new file: its name, and the number of the one whose state it has, or None."""

    name: str
    number: Any


def with_parameters(file: TorchFile, groups: Sequence[Sequence[Holder]]) -> TorchFile:
    """The file with other parameters, numbered through all groups as torch does it.

    Args:
        file: an optimizer's state dict.
        groups: of parameters; as many as the file has.

    Raises:
        CheckpointError: a group has something for each of its parameters that is not known.
    """
    held = file.tree["state"]
    copies = _Copies(file)
    holders = enumerate(holder for group in groups for holder in group)
    numbers = {new: copies.of(h.number, held[h.number]) for new, h in holders if h.number is not None}
    state = Ordered(numbers) if isinstance(held, Ordered) else numbers
    first, changed = 0, []
    for group, own in zip(file.tree["param_groups"], groups, strict=True):
        changed.append(_group(group, own, first, file.relative))
        first += len(own)
    tree = dict(file.tree) | {"state": state, "param_groups": changed}
    records = list(file.archive.records)
    last = max(i for i, record in enumerate(records) if record.name.startswith("data/"))
    archive = replace(file.archive, records=(*records[: last + 1], *copies.records, *records[last + 1 :]))
    return collected(replace(file, tree=tree, archive=archive))


def _group(group: dict[str, Any], own: Sequence[Holder], first: int, where: str) -> dict[str, Any]:
    """A group's entry with its new numbers, and names where it has some."""
    known = {"params", "param_names"}
    count = len(group["params"])
    lists = [k for k, v in group.items() if isinstance(v, (list, dict)) and len(v) == count > 2]
    if set(lists) - known:
        raise CheckpointError(
            f"{where}: a group of the optimizer has {min(set(lists) - known)!r} for each of its parameters",
            hint="expand a copy of the directory without the optimizer's state, and restart the optimizer",
        )
    named = {"param_names": [holder.name for holder in own]} if "param_names" in group else {}
    return {**group, "params": list(range(first, first + len(own))), **named}


class _Copies:
    """States that are read once more: the same tensors in storages of their own."""

    def __init__(self, file: TorchFile) -> None:
        self.records: list[Record] = []
        self._known = {record.name: record for record in file.archive.records}
        self._seen: set[Any] = set()
        keys = [name.removeprefix("data/") for name in self._known if name.startswith("data/")]
        self._next = 1 + max((int(key) for key in keys if key.isdigit()), default=0)

    def of(self, number: Any, state: Any) -> Any:
        """The state itself the first time that it is asked for, then copies of it."""
        if number not in self._seen:
            self._seen.add(number)
            return state
        return self._copied(state, {})

    def _copied(self, value: Any, storages: dict[str, Any]) -> Any:
        if isinstance(value, TensorNode):
            key = value.storage.key
            if key not in storages:
                storages[key] = replace(value.storage, key=str(self._next))
                self.records.append(self._known[f"data/{key}"]._replace(name=f"data/{self._next}"))
                self._next += 1
            return replace(value, storage=storages[key])
        if isinstance(value, Call):
            raise CheckpointError(f"optimizer state holds a {value.function.path}, which cannot be copied")
        if isinstance(value, dict):
            copied = {key: self._copied(item, storages) for key, item in value.items()}
            return Ordered(copied) if isinstance(value, Ordered) else copied
        if isinstance(value, (list, tuple)):
            return type(value)(self._copied(item, storages) for item in value)
        return value
