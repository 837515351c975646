"""Directories of the transformers ``Trainer``, accelerate's ``save_state``, and plain model directories.

Weights are safetensors or torch files, single or sharded; ``optimizer.pt`` numbers parameters; the model's
sizes stand in ``config.json``. All other files are carried over as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.deeper import as_read, deeper_files
from sparkling_cli.formats.directory import list_files, read_json, rewritten_file
from sparkling_cli.formats.fsdpfile import check_alone, read_copy, with_copies
from sparkling_cli.formats.model import Checkpoint, OutputFile, OutputRequest, Pairs
from sparkling_cli.formats.other_files import left_out
from sparkling_cli.formats.statedict import OptimizerTree, optimizer_in
from sparkling_cli.formats.statefiles import StateFiles, read_optimizer_file
from sparkling_cli.formats.torchfile import TorchFile
from sparkling_cli.formats.trainer_facts import optimizer_class, run_facts
from sparkling_cli.formats.weightfiles import (
    CANDIDATES,
    FSDP_FULL,
    WeightFiles,
    deeper_weights,
    find_weights,
    read_weights,
    weight_outputs,
)

CONFIG = "config.json"
#: The Trainer's optimizer file, and accelerate's.
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
#: Traces of training states that lie elsewhere in the directory, in a form that this format does not read.
_ELSEWHERE: Mapping[str, str] = {
    "zero_to_fp32.py": "DeepSpeed; convert it: python -m deepspeed.checkpoint.ds_to_universal",
    "pytorch_model_fsdp_0/.metadata": "sharded FSDP; expand pytorch_model_fsdp_0 or save a full state dict",
}


@dataclass(frozen=True)
class Parsed:
    """What the writer needs again."""

    weights: WeightFiles
    files: StateFiles


class TrainerDirectory:
    """Weights, perhaps with training state. Order of calls: ``claims``, ``open``, ``outputs``."""

    name = "trainer"

    def claims(self, root: Path) -> bool:
        """Weight files under transformers' names.

        Raises:
            CheckpointError: training state or a config without weights; FSDP's parts of single ranks.
        """
        if not root.is_dir():
            return False
        check_alone(root)
        if find_weights(root) is not None:
            return True
        traces = [name for name in ("trainer_state.json", *OPTIMIZERS, CONFIG) if (root / name).is_file()]
        if traces and not any((root / name).exists() for name in ("model.pt", ".metadata")):
            raise CheckpointError(
                f"{root.name}: it has {' and '.join(traces)}, but none of {', '.join(CANDIDATES)}",
                hint="name the directory that the weights are in, or one `checkpoint-N` inside this one",
            )
        return False

    def open(self, root: Path) -> Checkpoint:
        """Names, shapes and places of weights and optimizer state; config, steps and schedule.

        Raises:
            CheckpointError: missing, damaged or contradictory files.
            UnsafePickleError: a torch file that is not weights-only-safe.
        """
        present = list_files(root)
        for trace, what in _ELSEWHERE.items():
            if trace in present:
                raise CheckpointError(f"{root.name}: its training state is {what}")
        for name in (CONFIG, *OPTIMIZERS, "scheduler.pt", "trainer_state.json", "training_args.bin"):
            if (root / name).is_dir():
                raise CheckpointError(
                    f"{name}: expected a file, found a folder", hint="restore it from a copy"
                )
        weights = read_weights(root, present)
        config = read_json(root, CONFIG) if CONFIG in present else None
        file = _optimizer(root, present)
        optimizer = optimizer_in(file, ()) if file is not None else OptimizerTree()
        facts, notes = run_facts(root, present)
        args = facts.get("training_args", {})
        if file is not None:
            facts["optimizer_class"] = optimizer_class(optimizer.states, optimizer.groups, args)
        copy = read_copy(root, present)
        states = with_copies(optimizer.states, copy) if copy else optimizer.states
        if FSDP_FULL in present:
            facts["kind"] = "FSDP with full state dicts"
        ours = {*weights.paths, CONFIG, *(part.relative for part in (file, copy) if part)}
        stale = [name for name in present if name not in ours and _is_other_weights(name)]
        notes += [f"{name} is not carried over: it holds the weights at their old size" for name in stale]
        if file is None:
            notes.append("there is no optimizer state in this directory: weights only")
        elif not optimizer.states:
            notes.append(f"{file.relative} holds no state: the optimizer has not made a step yet")
        files = StateFiles({part.relative: part for part in (file, copy) if part})
        moments, others = files.found({}, states)
        return Checkpoint(
            root=root,
            format=self.name,
            tensors={**weights.tensors, **moments},
            weights=weights.weights,
            states=states,
            param_groups=optimizer.groups,
            config=config,
            config_file=CONFIG if config is not None else "",
            carried=tuple(name for name in present if name not in ours and name not in stale),
            further=(*left_out(root, stale), *others),
            facts=facts,
            notes=tuple(notes),
            private=Parsed(weights, files),
        )

    def outputs(self, checkpoint: Checkpoint, request: OutputRequest) -> tuple[OutputFile, ...]:
        """Weight files, index, config and optimizer file.

        Raises:
            CheckpointError: the request does not fit the formats of these files.
        """
        parsed: Parsed = checkpoint.private
        files = list(weight_outputs(parsed.weights, [item for item in request.tensors if item.name]))
        if checkpoint.config is not None:
            files.append(rewritten_file(checkpoint.root, CONFIG, request.config))
        elif request.config:
            raise CheckpointError(f"{checkpoint.root.name}: sizes change, but there is no {CONFIG}")
        return (*files, *parsed.files.outputs(checkpoint, request))

    def deeper(self, checkpoint: Checkpoint, weights: Pairs, groups: Sequence[Pairs]) -> Checkpoint:
        """See :class:`~sparkling_cli.formats.model.Deepening`."""
        parsed: Parsed = checkpoint.private
        if FSDP_FULL in parsed.files.files:
            raise CheckpointError(
                f"{checkpoint.root.name}: {FSDP_FULL} holds a copy of the weights, in which new layers have "
                "no place",
                hint="save without FSDP's full state dicts, or expand a copy without the optimizer's state",
            )
        weight_files = deeper_weights(parsed.weights, weights)
        files, tree = parsed.files, OptimizerTree()
        if checkpoint.states:
            (name,) = files.files
            found = deeper_files(checkpoint, files.files, None, [(name, ())], weights, groups)
            tree = optimizer_in(found[name], ())
            files = StateFiles(found)
        moments, others = files.found({}, tree.states)
        names = {name for name, _ in weights}
        own = {name: key for name, key in weight_files.weights.items() if name in names}
        read = replace(
            checkpoint,
            tensors={**{key: weight_files.tensors[key] for key in own.values()}, **moments},
            weights=own,
            states=tree.states,
            further=tuple(others),
            private=Parsed(weight_files, files),
        )
        return as_read(checkpoint, read, files.files, groups)


def _is_other_weights(name: str) -> bool:
    """Whole-model weights in files that are read, at the top of the directory."""
    top = "/" not in name
    return top and (name.endswith(".safetensors") or (name.startswith("pytorch_model") and ".bin" in name))


def _optimizer(root: Path, present: tuple[str, ...]) -> TorchFile | None:
    """The optimizer's file.

    Raises:
        CheckpointError: several optimizers, or no optimizer in the file.
    """
    found = [name for name in OPTIMIZERS if name in present]
    further = [n for n in present if n.startswith("optimizer_") and n.endswith((".pt", ".bin"))]
    if len(found) > 1 or further:
        raise CheckpointError(
            f"{root.name}: several optimizers: {', '.join(found + further)}; which parameters each "
            "numbers is not in them",
            hint="move those that the run does not resume from out of the directory",
        )
    if not found:
        return None
    hint = (
        f"expand a copy of the directory without {found[0]}, with --init random-copy (what parts "
        "copies is the state), and restart the optimizer"
    )
    return read_optimizer_file(root, found[0], hint)
