"""The directories of a deeper model: further entries in ``.metadata``, read where others lie."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.dcp.read import Directory, Parsed, read_fields
from sparkling_cli.formats.deeper import by_source, renamed
from sparkling_cli.formats.model import Checkpoint, Pairs
from sparkling_cli.formats.statedict import bare_names

#: entry -> its names in the deeper model
Names = Mapping[str, Sequence[str]]


def deeper_directories(
    checkpoint: Checkpoint, weights: Pairs, groups: Sequence[Pairs]
) -> tuple[tuple[Directory, ...], dict[str, list[str]]]:
    """The directories, and for entries that list parameters, what they list.

    Args:
        checkpoint: the source.
        weights: see :class:`~sparkling_cli.formats.model.Deepening`.
        groups: the same, of the optimizer's groups.

    Raises:
        CheckpointError: the groups number parameters, or do not have one that has state.
    """
    parsed: Parsed = checkpoint.private
    roles, own = parsed.roles, by_source(weights)
    params = {**own, **by_source(pair for pairs in groups for pair in pairs)}
    entries = [(entry, name, own[name]) for name, entry in roles.weights.items()]
    by_param = {**roles.groups, **{p: {**roles.groups.get(p, {}), **s} for p, s in roles.states.items()}}
    for param, fields in by_param.items():
        if param not in params and not param.isdigit():
            raise CheckpointError(f"{checkpoint.root.name}: the optimizer has state of {param!r}, no weight")
        entries += [(entry, param, params[param]) for entry in fields.values() if param in params]
    names = {entry: [renamed(entry, old, new) for new in news] for entry, old, news in entries}
    return tuple(_deeper(one, names) for one in parsed.directories), _lists(parsed, groups)


def _lists(parsed: Parsed, groups: Sequence[Pairs]) -> dict[str, list[str]]:
    found = {}
    values = read_fields(parsed.roles, parsed.entries)
    numbered = [fields for group, fields in parsed.roles.groups.items() if group.isdigit()]
    for fields, pairs in zip(numbered, groups if numbered else (), strict=True):
        raw = values[fields["params"]]
        if not all(isinstance(name, str) for name in raw):
            raise CheckpointError(
                f"{fields['params']}: parameters by number, found {raw!r:.60}",
                hint="save the optimizer by torch.distributed.checkpoint.state_dict, which names them",
            )
        own = {bare: name for name, bare in bare_names(raw).items()}
        found[fields["params"]] = [renamed(own[old], old, new) for new, old in pairs]
    return found


def _deeper(directory: Directory, names: Names) -> Directory:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    def names_of(fqn: str) -> list[str]:
        full = directory.prefix + fqn
        return [name.removeprefix(directory.prefix) for name in names.get(full, (full,))]

    metadata = copy.copy(directory.metadata)
    metadata.state_dict_metadata = {
        name: found for fqn, found in metadata.state_dict_metadata.items() for name in names_of(fqn)
    }
    metadata.storage_data = {
        MetadataIndex(name, index.offset, index.index): info
        for index, info in metadata.storage_data.items()
        for name in names_of(index.fqn)
    }
    if isinstance(metadata.planner_data, dict):
        metadata.planner_data = {
            name: _nested(name, path) for fqn, path in metadata.planner_data.items() for name in names_of(fqn)
        }
    return replace(directory, metadata=metadata)


def _nested(name: str, like: Sequence[object]) -> tuple[str, ...]:
    """The nesting of a name that has its dots where another's are."""
    steps, ends = name.split("."), accumulate((str(step).count(".") + 1 for step in like), initial=0)
    return tuple(".".join(steps[start:stop]) for start, stop in pairwise(ends))
