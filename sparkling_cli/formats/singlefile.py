"""Checkpoints in one torch file: nanoGPT, Lightning, composer, plain ``{"model": ..., "optimizer": ...}``.

What a file is follows from what is in it. The file is never unpickled by torch, and never whole in memory.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparkling_cli.errors import CheckpointError, NoModelError
from sparkling_cli.formats.deeper import as_read, deeper_files
from sparkling_cli.formats.model import Checkpoint, OutputFile, OutputRequest, Pairs
from sparkling_cli.formats.statedict import (
    OptimizerTree,
    is_optimizer,
    is_state_dict,
    joined,
    optimizer_in,
    weights_in,
    without_attribute,
)
from sparkling_cli.formats.statefiles import StateFiles
from sparkling_cli.formats.torchfile import TensorNode, TorchFile, TreePath, at, plain, read_torch_file
from sparkling_cli.formats.trainer_facts import optimizer_class
from sparkling_cli.layout.keys import get_path, path_of

MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "net", "weights")
CONFIG_KEYS = ("model_args", "hyper_parameters", "model_config", "config", "hparams", "args")
STEP_KEYS = ("iter_num", "global_step", "step", "iteration", "step_count", "iter", "steps")

#: suffixes by which torch files go
SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin"})


#: composer's files, of which the first rank's has all but random states
_RANK = re.compile(r"-rank\d+\.pt$")


class Section(NamedTuple):
    """A part of what is saved: its file, and its path in the file's tree."""

    file: str
    path: TreePath


@dataclass(frozen=True)
class Sections:
    """Where what lies; the config, if there is one, in the model's file."""

    kind: str
    model: Section
    optimizers: tuple[Section, ...] = ()
    config: TreePath | None = None


@dataclass(frozen=True)
class Parsed:
    """What the writer needs again."""

    files: StateFiles
    sections: Sections


class SingleFile:
    """A checkpoint that is one torch file; base of those whose parts lie in few, with a config beside them.

    Order of calls: ``claims``, ``open``, ``outputs``.
    """

    name = "torch-file"

    def claims(self, root: Path) -> bool:
        """A file that starts like a torch zip archive."""
        if not root.is_file():
            return False
        with root.open("rb") as file:
            return file.read(4) == b"PK\x03\x04" or root.suffix in SUFFIXES

    def open(self, root: Path) -> Checkpoint:
        """Names, shapes and places of everything in the file.

        Raises:
            CheckpointError: damaged, or there are no weights in it.
            UnsafePickleError: its pickle is not weights-only-safe; it was not executed.
        """
        file = read_torch_file(root, "")
        return read_sections(root, self.name, {"": file}, find_sections(file))

    def outputs(self, checkpoint: Checkpoint, request: OutputRequest) -> tuple[OutputFile, ...]:
        """The torch files.

        Raises:
            CheckpointError: the request renames weights, which lie under the module's own names here.
        """
        parsed: Parsed = checkpoint.private
        files, (name, _) = parsed.files.files, parsed.sections.model
        request.by_key({key for file in files.values() for key in file.tensors}, files[name].path.name)
        edits = {name: config_edits(files[name].tree, parsed.sections, request.config)}
        return parsed.files.outputs(checkpoint, request, edits)

    def deeper(self, checkpoint: Checkpoint, weights: Pairs, groups: Sequence[Pairs]) -> Checkpoint:
        """See :class:`~sparkling_cli.formats.model.Deepening`."""
        parsed: Parsed = checkpoint.private
        files, sections = parsed.files.files, parsed.sections
        files = deeper_files(checkpoint, files, sections.model, sections.optimizers, weights, groups)
        read = read_sections(checkpoint.root, checkpoint.format, files, sections)
        return as_read(checkpoint, read, files, groups)


def find_sections(file: TorchFile) -> Sections:
    """Where the weights, the optimizer and the config numbers are.

    Raises:
        CheckpointError: there are no weights; the message lists what there is.
    """
    tree = file.tree
    if not isinstance(tree, dict):
        raise CheckpointError(
            f"{file.path.name} holds a {type(tree).__name__}, expected a dictionary with a state dict in it"
        )
    homes = [(), *((key,) for key, value in tree.items() if isinstance(value, dict))]
    models = [(*home, key) for home in homes for key in MODEL_KEYS if is_state_dict(at(tree, home).get(key))]
    if len(models) > 1 and len(models[0]) == 1:  # what lies deeper is another matter
        models = [path for path in models if len(path) == 1]
    if not models and is_state_dict(tree) and all(isinstance(v, TensorNode) for v in tree.values()):
        return Sections("state-dict", Section(file.relative, ()))
    first = file.path.with_name(_RANK.sub("-rank0.pt", file.path.name))
    if not models and first != file.path:
        raise CheckpointError(
            f"{file.path.name} has no weights: composer saves them in the first rank's file",
            hint=f"give {shlex.quote(str(first))}"
            + ("" if first.exists() else ", which is missing here: copy it"),
        )
    if not models:
        raise NoModelError(
            f"{file.path.name} has no state dict under {', '.join(MODEL_KEYS)}; it has: {_listing(tree)}",
            hint='save {"model": model.state_dict(), "optimizer": optimizer.state_dict()} with torch.save',
        )
    if len(models) > 1:
        names = " and ".join(".".join(path) for path in models)
        raise CheckpointError(f"{file.path.name} has two models: {names}")
    kind, home = "plain", models[0][:-1]
    if "model_args" in tree:
        kind = "nanogpt"
    elif "pytorch-lightning_version" in tree:
        kind = "lightning"
    elif home and is_timestamp(at(tree, home).get("timestamp")):
        kind = "composer"
    optimizers = tuple(Section(file.relative, path) for path in _optimizer_paths(tree))
    return Sections(kind, Section(file.relative, models[0]), optimizers, _config_path(tree, home))


def is_timestamp(value: Any) -> bool:
    """What composer counts of the run so far."""
    return isinstance(value, dict) and isinstance(value.get("Timestamp"), dict)


def _optimizer_paths(tree: Any, path: TreePath = ()) -> tuple[TreePath, ...]:
    """Every optimizer's state dict, under whatever key: one that is overlooked would stay narrow."""
    if is_optimizer(tree):
        return (path,)
    if not isinstance(tree, (dict, list, tuple)) or len(path) > 3:
        return ()
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return tuple(found for key, item in items for found in _optimizer_paths(item, (*path, key)))


def _config_path(tree: Mapping[str, Any], home: TreePath) -> TreePath | None:
    """The dictionary with the model's sizes; inside it, a nested transformers config if there is one.

    Args:
        tree: the file's.
        home: the dictionary that the model's section is in.
    """
    for key in CONFIG_KEYS:
        value = at(tree, home).get(key)
        if not isinstance(value, dict) or not value:
            continue
        nested = [k for k, v in value.items() if isinstance(v, dict) and "model_type" in v]
        return (*home, key, nested[0]) if len(nested) == 1 and "model_type" not in value else (*home, key)
    value, path = tree, (*home, "integrations", "huggingface", "model", "config", "content")
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return path if isinstance(value, dict) else None


def read_sections(
    root: Path,
    format_name: str,
    files: Mapping[str, TorchFile],
    sections: Sections,
    *,
    config: Mapping[str, Any] | None = None,
    config_file: str = "",
    carried: tuple[str, ...] = (),
) -> Checkpoint:
    """The checkpoint in torch files.

    Args:
        root: the checkpoint.
        format_name: of the format.
        files: by relative path.
        sections: where what lies in them.
        config: the model's sizes, if they are in another file.
        config_file: that file.
        carried: files beside them.
    """
    file = files[sections.model.file]
    weights = weights_in(file, sections.model.path)
    trees = [optimizer_in(files[name], path) for name, path in sections.optimizers]
    optimizer = joined(trees, file.path.name) if trees else OptimizerTree()
    bare = without_attribute(weights) if sections.kind in ("lightning", "composer") else {}
    weights = {bare.get(name, name): key for name, key in weights.items()}
    if config is None and sections.config is not None:
        config = plain(at(file.tree, sections.config))
        config_file = f"{file.path.name}: {'.'.join(map(str, sections.config))}"
    held = StateFiles(files)
    tensors, others = held.found(weights, optimizer.states)
    notes = []
    if not trees:
        notes.append("there is no optimizer state in this file: weights only")
    elif not optimizer.states:
        notes.append("the optimizer has not made a step yet: there is no state to widen")
    return Checkpoint(
        root=root,
        format=format_name,
        tensors=tensors,
        weights=weights,
        states=optimizer.states,
        param_groups=optimizer.groups,
        config=config,
        config_file=config_file,
        carried=carried,
        further=tuple(others),
        facts=facts_of(file.tree, sections, optimizer),
        notes=tuple(notes),
        private=Parsed(held, sections),
    ).renamed(bare)


def config_edits(tree: Any, sections: Sections, changes: Mapping[str, Any]) -> dict[TreePath, Any]:
    """Edits that put new config numbers in, also where nanoGPT keeps a second copy of them."""
    if sections.config is None:
        return {}
    config = at(tree, sections.config)
    copy = tree.get("config") if sections.kind == "nanogpt" else None
    edits: dict[TreePath, Any] = {}
    for dotted, value in changes.items():
        path = path_of(dotted)
        listed = [isinstance(get_path(config, path[:at]), list) for at in range(len(path))]
        steps = (int(step) if inside else step for step, inside in zip(path, listed, strict=True))
        edits[(*sections.config, *steps)] = value
        if isinstance(copy, dict) and dotted in copy and copy[dotted] == config.get(dotted):
            edits["config", dotted] = value
    return edits


def facts_of(tree: Any, sections: Sections, optimizer: OptimizerTree) -> dict[str, Any]:
    """Step and schedule numbers that stand in the file."""
    facts: dict[str, Any] = {"kind": sections.kind}
    for key in STEP_KEYS:
        if sections.model.path and type(tree.get(key)) is int:
            facts["global_step"] = tree[key]
            break
    if sections.kind == "composer":
        home = at(tree, sections.model.path[:-1])
        if type(home["timestamp"]["Timestamp"].get("batch")) is int:
            facts["global_step"] = home["timestamp"]["Timestamp"]["batch"]
        for scheduler in (home.get("schedulers") or {}).values():  # its shape is a function, not a number
            rates = scheduler.get("base_lrs") if isinstance(scheduler, dict) else None
            if isinstance(rates, list) and rates and all(type(rate) is float for rate in rates):
                facts["schedule"] = {"peak": max(rates)}
    if "global_step" not in facts and optimizer.states and "step" in optimizer.states[0].scalars:
        facts["global_step"] = int(optimizer.states[0].scalars["step"])
    if optimizer.states:
        facts["optimizer_class"] = optimizer_class(optimizer.states, optimizer.groups, {})
    if optimizer.groups:
        facts["learning_rate"] = optimizer.groups[0].get("lr")
    config = tree.get("config") if sections.kind == "nanogpt" else None
    if isinstance(config, dict):
        facts.update(_nanogpt_schedule(plain(config)))
    return facts


def _nanogpt_schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """What nanoGPT's ``get_lr`` makes of its options, as far as they are there."""
    names = ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters", "max_iters")
    numbers = {name: config[name] for name in names if type(config.get(name)) in (int, float)}
    if config.get("decay_lr") is False:
        schedule = {"type": "constant", "peak": numbers.get("learning_rate")}
        return {"schedule": schedule, "max_steps": numbers.get("max_iters")}
    if config.get("decay_lr") is not True or not set(names[:4]) <= set(numbers):
        return {}
    schedule = {
        "type": "cosine",
        "peak": numbers["learning_rate"],
        "minimum": numbers["min_lr"],
        "warmup_steps": int(numbers["warmup_iters"]),
    }
    return {"schedule": schedule, "max_steps": int(numbers["lr_decay_iters"])}


def _listing(tree: Mapping[Any, Any]) -> str:
    shown = [f"{key!r} ({type(value).__name__})" for key, value in list(tree.items())[:12]]
    return ", ".join(shown) + (", ..." if len(tree) > 12 else "") if shown else "nothing"
