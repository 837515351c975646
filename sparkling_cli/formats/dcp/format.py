"""``torch.distributed.checkpoint`` directories: torchtitan, OLMo-core, Trainer with FSDP, Megatron, your own.

They differ in where the directory lies, how its names nest and where the model's config is; the rest is
one format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError, UnsafePickleError
from sparkling_cli.formats.dcp import lingua
from sparkling_cli.formats.dcp.buckets import WAY_OUT
from sparkling_cli.formats.dcp.deeper import deeper_directories
from sparkling_cli.formats.dcp.megatron import FILE as COMMON
from sparkling_cli.formats.dcp.megatron import read_megatron
from sparkling_cli.formats.dcp.metadata import METADATA
from sparkling_cli.formats.dcp.read import (
    Directory,
    Entry,
    Parsed,
    read_directories,
    read_entries,
    read_fields,
    read_further,
    read_groups,
    read_states,
)
from sparkling_cli.formats.dcp.write import directory_outputs
from sparkling_cli.formats.deeper import as_read
from sparkling_cli.formats.directory import list_files, read_json, rewritten_file
from sparkling_cli.formats.model import Checkpoint, OutputFile, OutputRequest, Pairs
from sparkling_cli.formats.other_files import left_out
from sparkling_cli.formats.torchfile import read_torch_file
from sparkling_cli.formats.trainer_facts import optimizer_class, run_facts
from sparkling_cli.layout.keys import path_of, set_path

#: where composer keeps the config of a transformers model, key by key
_COMPOSER_CONFIG = "state.integrations.huggingface.model.config.content."
_STEP_KEYS = (
    "state.timestamp.Timestamp.batch",
    "train_state.step",
    "lr_scheduler.last_epoch",
    "scheduler.last_epoch",
    "step",
    "global_step",
)


LINGUA = "lingua"


@dataclass(frozen=True)
class Variant:
    """Where a trainer puts its DCP directories.

    Attributes:
        kind: its name, for people.
        folders: DCP directories below the root, the model's first; a second one is optional.
        config: the file with the model's sizes.
        needs: a file without which it is another trainer's.
    """

    kind: str
    folders: tuple[str, ...]
    config: str = "config.json"
    needs: str = ""


VARIANTS = (
    Variant("OLMo-core", ("model_and_optim/",)),
    Variant("Trainer with FSDP", ("pytorch_model_fsdp_0/", "optimizer_0/")),
    Variant(LINGUA, ("",), lingua.CONFIG, needs=lingua.CONFIG),
    Variant("torch.distributed.checkpoint", ("",)),
)


class DcpFormat:
    """A directory of DCP files. Order of calls: ``claims``, ``open``, ``outputs``."""

    name = "dcp"

    def claims(self, root: Path) -> bool:
        """A directory with ``.metadata`` where one of the variants has it.

        Raises:
            CheckpointError: there are ``.distcp`` files but no ``.metadata``.
        """
        if variant_of(root) is not None:
            return True
        if root.is_dir():
            for folder in ("", "model_and_optim", "pytorch_model_fsdp_0"):
                if any((root / folder).glob("*.distcp")):
                    raise CheckpointError(
                        f"{root / folder} has *.distcp files but no {METADATA}, which is written last",
                        hint="saving was not finished, or the file, whose name starts with a dot, was not "
                        "copied",
                    )
        return False

    def open(self, root: Path) -> Checkpoint:
        """Names, shapes and places of everything; every item's header is read and checked.

        Raises:
            CheckpointError: missing, damaged or contradictory files.
            UnsafePickleError: ``.metadata`` names more than plain data; it was not executed.
        """
        variant = variant_of(root)
        if variant is None:
            raise CheckpointError(f"{root} has no {METADATA}")
        folders = tuple(f for f in variant.folders if (root / f / METADATA).is_file())
        _one_model_only(root)
        if variant.kind != LINGUA and (root / lingua.STATE).is_file():
            raise CheckpointError(
                f"{root / lingua.CONFIG} is missing, which lingua writes beside {lingua.STATE}",
                hint="copy it from where the run was: it has the model's sizes",
            )
        directories = read_directories(root, folders)
        present = list_files(root)
        config = read_json(root, variant.config) if variant.config in present else None
        within = "" if config is not None else _COMPOSER_CONFIG
        found = _read(root, directories, variant.config if config else "", within)
        entries, states, megatron = found.private.entries, found.states, found.private.megatron
        written = {one.folder + METADATA for one in directories}.union(*(one.files() for one in directories))
        written |= {variant.config} if config is not None else set()
        written |= {COMMON} if megatron is not None else set()
        config = config or _entries_as_config(entries, within) or None
        config_file = "" if config is None else within.rstrip(".") or variant.config
        if config is None and megatron is not None:
            config, config_file = megatron.args, megatron.config_file
        facts, notes = run_facts(root, present)
        stale: list[str] = []
        if variant.kind == LINGUA and config is not None:
            facts.update(lingua.facts_of(root, config))
            stale = [name for name in present if name.startswith(lingua.CONSOLIDATED)]
            if stale:
                notes.append(f"{lingua.CONSOLIDATED} is left out: lingua makes it anew, at the new size")
        _add_facts(facts, root, entries, variant.kind)
        facts |= megatron.facts if megatron is not None else {}
        if states:
            facts["optimizer_class"] = optimizer_class(
                states, found.param_groups, facts.get("training_args", {})
            )
            if "step" in states[0].scalars:
                facts.setdefault("global_step", int(states[0].scalars["step"]))
        if not states:
            notes.append("there is no optimizer state in this checkpoint: weights only")
        if config is None and variant.kind == "Trainer with FSDP":
            notes.append("no config.json here: copy the model's config.json beside the FSDP folders")
        return replace(
            found,
            config=config,
            config_file=config_file,
            carried=tuple(name for name in present if name not in written and name not in stale),
            further=(*found.further, *left_out(root, stale)),
            facts=facts,
            notes=tuple(notes),
        )

    def deeper(self, checkpoint: Checkpoint, weights: Pairs, groups: Sequence[Pairs]) -> Checkpoint:
        """See :class:`~sparkling_cli.formats.model.Deepening`."""
        parsed: Parsed = checkpoint.private
        if parsed.megatron is not None and parsed.megatron.states:
            raise CheckpointError(
                f"{checkpoint.root}: layers are not added where the optimizer's state lies in flat buckets",
                hint=WAY_OUT,
            )
        directories, lists = deeper_directories(checkpoint, weights, groups)
        read = _read(checkpoint.root, directories, parsed.config_file, parsed.within, lists)
        own = {"", *(file for one in directories for file in one.files())}
        return as_read(checkpoint, read, own, groups)

    def outputs(self, checkpoint: Checkpoint, request: OutputRequest) -> tuple[OutputFile, ...]:
        """The ``.distcp`` files, the config, and last every ``.metadata``.

        Raises:
            CheckpointError: the request renames weights, which lie under the module's own names here.
        """
        parsed: Parsed = checkpoint.private
        megatron = parsed.megatron
        added = megatron.tensors if megatron is not None else {}
        declared = request.by_key({**parsed.entries, **added}, str(checkpoint.root))
        numbers: dict[str, Any] = {**parsed.lists, **dict(request.numbers(checkpoint.states))}
        within = parsed.within and (megatron is None or megatron.args is None)
        for key, value in request.config.items() if within else ():
            name = parsed.within + key
            if name not in parsed.entries:
                raise CheckpointError(
                    f"{checkpoint.root}: there is no {name!r}, which has to change",
                    hint=f"put the model's config.json, with {key}, into the folder",
                )
            numbers[name] = value
        files = []
        if megatron is not None:
            common = megatron.edited({} if parsed.config_file or within else request.config)
            if megatron.entry:
                numbers[megatron.entry] = common
            else:
                files.append(common)
        views = {name: declared[name].view for name in checkpoint.weights.values() if name in declared}
        becomes = megatron.becomes(parsed.entries, views) if megatron is not None else {}
        for one in parsed.directories:
            files += directory_outputs(one, declared, numbers, becomes)
        if parsed.config_file:
            changes = request.config
            if parsed.config_file == lingua.CONFIG:
                shapes = {n: declared[k].shape for n, k in checkpoint.weights.items() if k in declared}
                changes = lingua.with_multiplier(checkpoint.config or {}, changes, shapes)
            files.insert(0, rewritten_file(checkpoint.root, parsed.config_file, changes))
        return tuple(sorted(files, key=lambda file: file.last))


def _read(
    root: Path,
    directories: tuple[Directory, ...],
    config_file: str,
    within: str,
    lists: Mapping[str, list[str]] | None = None,
) -> Checkpoint:
    """What all directories hold; for the arguments see :class:`~sparkling_cli.formats.dcp.read.Parsed`."""
    entries, roles = read_entries(root, directories)
    weights = {name: entries[name].stored() for name in dict.fromkeys(roles.weights.values())}
    states, tensors = read_states(roles, entries)
    values = {**read_fields(roles, entries), **(lists or {})}
    groups = read_groups(roles, values)
    further = list(read_further(roles, entries, states, values))
    megatron = read_megatron(root, entries, weights)
    if megatron is not None:
        states = (*states, *megatron.param_states(roles.weights))
        tensors |= megatron.tensors
        groups = groups or megatron.groups
        further += megatron.further
    return Checkpoint(
        root=root,
        format=DcpFormat.name,
        tensors={**weights, **tensors},
        weights=roles.weights,
        states=states,
        param_groups=groups,
        further=tuple(further),
        private=Parsed(directories, entries, config_file, within, roles, lists or {}, megatron),
    )


def _entries_as_config(entries: Mapping[str, Entry], within: str) -> dict[str, Any]:
    """A config that is stored key by key; empty if there is none."""
    config: dict[str, Any] = {}
    for name, entry in entries.items():
        if within and name.startswith(within) and not entry.is_tensor:
            set_path(config, path_of(name.removeprefix(within)), entry.value())
    return config


def variant_of(root: Path) -> Variant | None:
    """The variant whose ``.metadata`` lies where it should."""
    if not root.is_dir():
        return None
    here = (v for v in VARIANTS if (root / v.folders[0] / METADATA).is_file())
    return next((v for v in here if not v.needs or (root / v.needs).is_file()), None)


def _one_model_only(root: Path) -> None:
    more = sorted(p.name for p in root.glob("pytorch_model_fsdp_*") if p.name != "pytorch_model_fsdp_0")
    if more:
        raise CheckpointError(
            f"{root} holds more than one model: {', '.join(more)} beside pytorch_model_fsdp_0"
        )


def _add_facts(facts: dict[str, Any], root: Path, entries: Mapping[str, Entry], kind: str) -> None:
    """The kind, and the step if only the DCP entries know it."""
    facts["kind"] = kind
    for name in _STEP_KEYS:
        if name in entries and "global_step" not in facts:
            try:
                value = entries[name].value()
            except UnsafePickleError:
                continue
            if isinstance(value, (int, float)):
                facts["global_step"] = int(value)
    facts.update({k: v for k, v in _olmo_core_facts(root).items() if k not in facts})


def _olmo_core_facts(root: Path) -> dict[str, int]:
    """Steps from OLMo-core's trainer state; its random states are NumPy objects, which stay inert."""
    path = root / "train" / "rank0.pt"
    if not path.is_file():
        return {}
    try:
        tree = read_torch_file(path, "train/rank0.pt").tree
    except CheckpointError:
        return {}  # carried over as it is, whatever it holds
    tree = tree if isinstance(tree, dict) else {}
    return {key: tree[key] for key in ("global_step", "max_steps") if type(tree.get(key)) is int}
