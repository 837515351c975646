"""DeepSpeed's Universal Checkpoint: ``zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt`` and model states.

What ZeRO itself saves are flat partitions of all parameters glued together; DeepSpeed's own converter makes
one folder per parameter out of them, which can be widened, and loaded under any ZeRO stage and rank count.
A pipeline model (GPT-NeoX) has no ``module`` among its model states: its weights lie in a file per layer, and
a parameter is named by its layer's number.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.deeper import as_read, by_source, deeper_files
from sparkling_cli.formats.directory import list_files
from sparkling_cli.formats.model import Checkpoint, OutputFile, OutputRequest, Pairs, ParamState
from sparkling_cli.formats.optimizer_states import is_named
from sparkling_cli.formats.statedict import Place, numbers_of, weights_in
from sparkling_cli.formats.statefiles import Box, StateFiles
from sparkling_cli.formats.torchfile import (
    ATTRIBUTES,
    Call,
    More,
    TorchFile,
    TreePath,
    called,
    plain,
    read_torch_file,
)
from sparkling_cli.formats.zerofile import OPTIMIZER, SharedStep, read_options

ZERO = "zero/"
_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_CONVERT = "python -m deepspeed.checkpoint.ds_to_universal --input_folder {source} --output_folder {target}"


@dataclass(frozen=True)
class Parsed:
    """What the writer needs again: all files, which of them are model states, and the one step of ZeRO-3."""

    files: StateFiles
    models: tuple[str, ...]
    shared: SharedStep | None


class UniversalCheckpoint:
    """A Universal Checkpoint folder. Order of calls: ``claims``, ``open``, ``outputs``."""

    name = "deepspeed-universal"

    def claims(self, root: Path) -> bool:
        """Model states and a ``zero`` folder of parameters.

        Raises:
            CheckpointError: flat ZeRO partitions, which the message says how to convert.
        """
        if not root.is_dir():
            return False
        if any(root.glob("zero/*/fp32.pt")):
            return True
        if any(root.glob("*zero_pp_rank_*_optim_states.pt")):
            target = root.with_name(f"{root.name}_universal")
            raise CheckpointError(
                f"{root} holds ZeRO's flat partitions, in which parameters cannot be told apart",
                hint="convert it, and expand the result: " + _CONVERT.format(source=root, target=target),
            )
        if any(_LAYER.fullmatch(path.name) for path in root.glob("layer_*")):
            raise CheckpointError(
                f"{root} has a pipeline model's layers, and no zero/ with a folder for each parameter",
                hint="copy these files beside the result of the conversion, and expand that",
            )
        if (root / "latest").is_file() and any(root.glob("*/*_model_states.pt")):
            steps = sorted(path.parent.name for path in root.glob("*/*_model_states.pt"))
            raise CheckpointError(
                f"{root} is a DeepSpeed run's folder",
                hint=f"name a checkpoint in it: {shlex.quote(str(root / steps[-1]))}",
            )
        return False

    def open(self, root: Path) -> Checkpoint:
        """Names, shapes and places of every parameter's file.

        Raises:
            CheckpointError: damaged or contradictory files, tensor parallelism, frozen ZeRO-3 parameters.
            UnsafePickleError: model states that are not weights-only-safe; they were not executed.
        """
        present = list_files(root)
        layers = {name: found for name in present if (found := _LAYER.fullmatch(name))}
        models = tuple(
            n for n in present if "/" not in n and n.endswith("_model_states.pt") and n not in layers
        )
        split = [name for name, found in layers.items() if int(found[2])]
        if not models:
            raise CheckpointError(
                f"{root / 'mp_rank_00_model_states.pt'} is missing, which the converter copies",
                hint="copy it from the folder that was converted",
            )
        if split or any("mp_rank_00" not in name for name in models):
            raise CheckpointError(
                f"{root}: expected model states of one tensor-parallel rank, found "
                f"{', '.join((*models, *split))}",
                hint="save and convert the checkpoint without tensor parallelism",
            )
        wanted_files = (*models, *layers, *_parameter_files(present))
        files = {name: read_torch_file(root / name, name) for name in wanted_files}
        return self._read(root, present, models, files)

    def _read(
        self, root: Path, present: tuple[str, ...], models: tuple[str, ...], files: Mapping[str, TorchFile]
    ) -> Checkpoint:
        """What the files say.

        Args:
            root: the checkpoint.
            present: all files in it.
            models: those of model states.
            files: model states, a pipeline model's layers, and those of parameters.
        """
        states = _read_states(files)
        tree = files[models[0]].tree
        if isinstance(tree, dict) and tree.get("module", "") is None:
            layers = {int(found[1]): files[name] for name in files if (found := _LAYER.fullmatch(name))}
            weights = _layer_weights(root, layers, states)
        else:
            weights = _read_weights(root, files[models[0]], states)
        known = {state.param for state in states}
        lost = next((name for name in _param_shapes(tree) if name not in known), None)
        if lost is not None:
            raise CheckpointError(f"{root}: zero/{lost} is missing: the conversion was not finished")
        partitioned = all(key.startswith(ZERO) for key in weights.values())
        groups, shared = read_options(root, present, partitioned=partitioned)
        boxes = _flat_boxes(files, _param_shapes(tree), states)
        if shared is not None:  # ZeRO-3: the fp32 files are the weights
            step, places = {"step": shared.value}, {"step": shared.places}
            states = tuple(
                ParamState(s.param, {k: v for k, v in s.tensors.items() if k != "fp32"}, step, places)
                for s in states
            )
        found_files = StateFiles(files, boxes)
        tensors, others = found_files.found(weights, states)
        if shared is not None:
            others += shared.further
            found_files = replace(found_files, files={**files, OPTIMIZER: shared.file})
        config = plain(tree["args"]) if isinstance(tree.get("args"), (dict, Call)) else None
        notes = ['resume with "checkpoint": {"load_universal": true} in DeepSpeed\'s config']
        if OPTIMIZER not in present:
            notes.append(
                f"{OPTIMIZER} is missing, without which DeepSpeed does not load it: convert once more"
            )
        facts: dict[str, Any] = {"kind": "DeepSpeed Universal Checkpoint", "zero_3": partitioned}
        if type(tree.get("global_steps")) is int:
            facts["global_step"] = tree["global_steps"]
        if states and {"exp_avg", "exp_avg_sq"} <= set(states[0].tensors):
            facts["optimizer_class"] = "AdamW"
        return Checkpoint(
            root=root,
            format=self.name,
            tensors=tensors,
            weights=weights,
            states=states,
            param_groups=groups,
            config=config if isinstance(config, dict) else None,
            config_file="" if config is None else f"{models[0]}: args",
            carried=tuple(n for n in present if n not in found_files.files),
            further=tuple(others),
            facts=facts,
            notes=tuple(notes),
            private=Parsed(found_files, models, shared),
        )

    def deeper(self, checkpoint: Checkpoint, weights: Pairs, groups: Sequence[Pairs]) -> Checkpoint:
        """See :class:`~sparkling_cli.formats.model.Deepening`."""
        parsed: Parsed = checkpoint.private
        names, old = by_source(weights), parsed.files.files
        files: dict[str, TorchFile] = {}
        for name in parsed.models:
            files |= deeper_files(checkpoint, {name: old[name]}, (name, ("module",)), (), weights, ())
            files[name] = _with_shapes_of(files[name], names)
        for name, file in old.items():
            if name.startswith(ZERO) and name != OPTIMIZER:
                _, param, slot = name.split("/")
                files |= {to: called(file, to) for to in (f"{ZERO}{n}/{slot}" for n in names[param])}
        read = self._read(checkpoint.root, list_files(checkpoint.root), parsed.models, files)
        return as_read(checkpoint, read, old.keys() | files.keys(), groups)

    def outputs(self, checkpoint: Checkpoint, request: OutputRequest) -> tuple[OutputFile, ...]:
        """Every parameter's files, and the model states with their shapes edited.

        Raises:
            CheckpointError: the request renames weights, which lie under the module's own names here.
        """
        parsed: Parsed = checkpoint.private
        files = parsed.files.files
        declared = request.by_key(checkpoint.by_key, str(checkpoint.root))
        shapes = {name: declared[key].shape for name, key in checkpoint.weights.items() if key in declared}
        edits = {
            name: {**_shape_edits(files[name], shapes), **_args_edits(files[name], request)}
            for name in parsed.models
        }
        if parsed.shared is not None:
            edits[OPTIMIZER] = parsed.shared.edits
        return parsed.files.outputs(checkpoint, request, edits)


def _param_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes as the model states keep them, of every parameter that ZeRO holds."""
    groups = plain(tree.get("param_shapes"))
    return {n: tuple(shape) for g in groups or () for n, shape in g.items() if isinstance(shape, tuple)}


def _with_shapes_of(file: TorchFile, names: Mapping[str, Sequence[str]]) -> TorchFile:
    """Model states that say the shapes of a deeper model's parameters, and list its buffers.

    Args:
        file: with a deeper model's module.
        names: weight -> what is read from it.

    Raises:
        CheckpointError: frozen parameters, of which the file has fragments.
    """
    if file.tree.get("frozen_param_shapes"):
        raise CheckpointError(
            f"{file.relative}: new layers have no place among frozen parameters",
            hint="save the checkpoint with all parameters trained, or expand the model alone",
        )
    more, groups = More(file), file.tree.get("param_shapes")
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        pairs = [(new, name) for name in group for new in names.get(name, (name,))]
        more.weights(("param_shapes", index), pairs)
    buffers = file.tree.get("buffer_names")
    if isinstance(buffers, list):
        more.value(("buffer_names",), [new for name in buffers for new in names.get(name, (name,))])
    return more.done()


def _flat_boxes(
    files: Mapping[str, TorchFile], shapes: Mapping[str, tuple[int, ...]], states: tuple[ParamState, ...]
) -> dict[str, tuple[Box, ...]]:
    """What ZeRO-3 keeps flat, as boxes of its parameter's shape.

    Raises:
        CheckpointError: a flat tensor has another number of entries than its parameter.
    """
    stored = {key: tensor for file in files.values() for key, tensor in file.tensors.items()}
    boxes: dict[str, tuple[Box, ...]] = {}
    for state in states:
        shape = shapes.get(state.param)
        for slot, key in state.tensors.items() if shape is not None else ():
            found = stored[key].shape
            if shape is None or len(found) != 1 or found == shape:
                continue
            if prod(shape) == prod(found):
                boxes[key] = (Box(key, (0,) * len(shape), shape),)
            elif is_named(slot):  # any other is none of the optimizer's
                name = key.partition(":")[0]
                raise CheckpointError(f"{name} has {prod(found)} entries, its parameter has shape {shape}")
    return boxes


def _parameter_files(present: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(n for n in present if n.startswith(ZERO) and n.count("/") == 2 and n.endswith(".pt"))


def _read_states(files: Mapping[str, TorchFile]) -> tuple[ParamState, ...]:
    """One state per folder below ``zero``.

    Raises:
        CheckpointError: a file of an optimizer's state holds no tensor, or there is no fp32 weight.
    """
    folders: dict[str, dict[str, str]] = {}
    steps: dict[str, tuple[float, Place]] = {}
    for name, file in files.items():
        if not name.startswith(ZERO):
            continue
        _, param, slot = name.split("/")
        slot = slot.removesuffix(".pt")
        if slot == "step" and type(file.tree) in (int, float):  # of an optimizer that counts in Python
            steps[param] = float(file.tree), Place(name, ())
            continue
        keyed = file.keys
        key = keyed.get((), keyed.get(("param",), ""))
        if not key and is_named(slot):
            raise CheckpointError(f"{name}: expected one tensor, itself or as 'param' of a dictionary")
        if not key:  # a file of the user's own
            continue
        if slot == "step" and prod(file.tensors[key].shape) == 1:
            steps[param] = numbers_of(file, [key])[key], Place(name, key)
        else:
            folders.setdefault(param, {})[slot] = key
    states = []
    for param, slots in folders.items():
        if "fp32" not in slots:
            raise CheckpointError(f"zero/{param} has no fp32.pt: the conversion was not finished")
        scalars, places = {}, {}
        if param in steps:
            scalars["step"], places["step"] = steps[param][0], steps[param][1:]
        states.append(ParamState(param, slots, scalars, places))
    return tuple(states)


def _layer_weights(
    root: Path, layers: Mapping[int, TorchFile], states: tuple[ParamState, ...]
) -> dict[str, str]:
    """Weights of a pipeline model, by the number of their layer.

    Raises:
        CheckpointError: layers are missing.
    """
    weights = {
        f"{number}.{name}": key
        for number, file in sorted(layers.items())
        for name, key in weights_in(file, ()).items()
    }
    lost = next((state.param for state in states if state.param not in weights), None)
    if lost is not None:
        raise CheckpointError(
            f"{root}: it is a pipeline model, whose weights lie in layer_*-model_*-model_states.pt, and none "
            f"has {lost!r}",
            hint="the converter does not copy these files: copy them from the folder that was converted",
        )
    return weights


def _args_edits(file: TorchFile, request: OutputRequest) -> dict[TreePath, Any]:
    """The run's arguments with their new sizes."""
    args: Any = file.tree.get("args")
    path: TreePath = ("args",) if isinstance(args, dict) else ("args", *ATTRIBUTES)
    return {(*path, key): value for key, value in request.config.items()}


def _read_weights(root: Path, file: TorchFile, states: tuple[ParamState, ...]) -> dict[str, str]:
    """Weights of the module; under ZeRO-3, where the module is empty, the fp32 files.

    Raises:
        CheckpointError: no module, or ZeRO-3 with frozen parameters.
    """
    if not isinstance(file.tree, dict) or not isinstance(file.tree.get("module"), dict):
        raise CheckpointError(f"{root / file.relative}: there is no module in it")
    module = weights_in(file, ("module",))
    if any(prod(file.tensors[key].shape) for key in module.values()):
        return module
    if file.tree.get("frozen_param_fragments"):
        raise CheckpointError(
            f"{root}: ZeRO-3 with frozen parameters, which the Universal Checkpoint leaves partitioned",
            hint="save with stage3_gather_16bit_weights_on_model_save and expand the model alone",
        )
    fp32 = {state.param: state.tensors["fp32"] for state in states}
    shared = file.tree.get("shared_params") or {}
    fp32.update({name: fp32[of] for name, of in shared.items() if of in fp32})
    missing = [name for name in module if name not in fp32]
    if missing:
        raise CheckpointError(f"{root}: zero/{missing[0]} is missing: the conversion was not finished")
    return {name: fp32[name] for name in module}


def _shape_edits(file: TorchFile, shapes: Mapping[str, tuple[int, ...]]) -> dict[TreePath, Any]:
    """``param_shapes`` with the new shapes."""
    edits: dict[TreePath, Any] = {}
    groups = file.tree.get("param_shapes")
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        for name, old in group.items():
            if name in shapes:
                edits["param_shapes", index, name] = old.function(shapes[name])
    return edits
