"""nanochat's step files: ``model_NNNNNN.pt``, ``optim_NNNNNN_rankR.pt``, ``meta_NNNNNN.json``.

The optimizer numbers its parameters, in groups of a known order. AdamW's state lies in blocks of rows, one
per rank; Muon's is stacked, under the first parameter of a group of equal matrices, so many to a rank.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.directory import list_files, read_json, rewritten_file
from sparkling_cli.formats.model import Checkpoint, OutputFile, OutputRequest, ParamState
from sparkling_cli.formats.statedict import OptimizerTree, Place, optimizer_in, weights_in
from sparkling_cli.formats.statefiles import (
    Box,
    StateFiles,
    read_optimizer_file,
    read_weights_file,
)
from sparkling_cli.formats.torchfile import TorchFile
from sparkling_cli.formats.trainer_facts import curve_facts
from sparkling_cli.storage.tensors import Shape

_FILE = re.compile(r"(model|optim|meta)_(\d+)(?:_rank(\d+))?\.(?:pt|json)")
#: parameters that AdamW has, by group, in nanochat's order; all others are matrices of ``transformer.h``
_ADAMW = (
    re.compile(r"lm_head\.weight"),
    re.compile(r"transformer\.wte\.weight"),
    re.compile(r"value_embeds\.\d+\.weight"),
    re.compile(r"resid_lambdas"),
    re.compile(r"x0_lambdas"),
    re.compile(r"smear_gate\.weight|smear_lambda|backout_lambda"),
)
_MATRICES = "transformer.h."
#: a parameter of fewer entries has its whole AdamW state on every rank
_SMALL = 1024
_EARLIER = "take an earlier step of the run"


@dataclass(frozen=True)
class Parsed:
    """What the writer needs again."""

    files: StateFiles
    meta: str


class NanochatStep:
    """One step of a nanochat run. Order of calls: ``claims``, ``open``, ``outputs``.

    Attributes:
        step: which one; None where the folder has one alone.
    """

    name = "nanochat"

    def __init__(self, step: int | None = None) -> None:
        self.step = step

    def claims(self, root: Path) -> bool:
        """A folder with files of a step.

        Raises:
            CheckpointError: a step is not whole, or there are several.
        """
        steps = _steps(root)
        if steps:
            self._chosen(root, steps)
        return bool(steps)

    def _chosen(self, root: Path, steps: Mapping[int, Mapping[str, Mapping[int, str]]]) -> int:
        whole = sorted(step for step, files in steps.items() if "model" in files) or sorted(steps)[-1:]
        if self.step is None and len(whole) > 1:
            raise CheckpointError(
                f"{root} holds steps {', '.join(map(str, whole))} of a nanochat run",
                hint=f"name one by its weights: {shlex.quote(str(root / steps[whole[-1]]['model'][0]))}",
            )
        return whole[0] if self.step is None else self.step

    def open(self, root: Path) -> Checkpoint:
        """Names, shapes and places; sizes and schedule from the meta file.

        Raises:
            CheckpointError: missing, damaged or contradictory files.
            UnsafePickleError: a torch file that is not weights-only-safe; it was not executed.
        """
        steps = _steps(root)
        step = self._chosen(root, steps)
        model_file, meta_file, ranks = _files_of(root, step, steps.get(step, {}))
        meta = read_json(root, meta_file)
        config = meta.get("model_config")
        if not isinstance(config, dict):
            raise CheckpointError(f"{meta_file}: there is no model_config, the model's sizes, in it")
        model = read_weights_file(root, model_file)
        weights = weights_in(model, ())
        optimizers = [read_optimizer_file(root, name) for name in ranks]
        found = _States({name: model.tensors[key].shape for name, key in weights.items()}, optimizers)
        files = StateFiles({file.relative: file for file in (model, *optimizers)}, found.boxes)
        tensors, others = files.found(weights, found.states)
        theirs = {name for _, files in steps.items() for names in files.values() for name in names.values()}
        facts: dict[str, Any] = {"kind": "nanochat", "global_step": step}
        notes = []
        if found.states:
            facts["optimizer_class"] = "Muon with AdamW"
            facts.update(_schedule(meta, found.groups))
            notes.append(_resume(meta, step))
        else:
            notes.append("there is no optimizer state of this step: weights only")
        later = sorted(set(steps) - {step})
        if later:
            notes.append(f"files of other steps ({', '.join(map(str, later))}) are not carried over")
        return Checkpoint(
            root=root,
            format=self.name,
            tensors=tensors,
            weights=weights,
            states=tuple(found.states),
            param_groups=tuple(found.groups),
            config=config,
            config_file=f"{meta_file}: model_config",
            carried=tuple(name for name in list_files(root) if name not in theirs),
            further=tuple(others),
            facts=facts,
            notes=tuple(notes),
            private=Parsed(files, meta_file),
        )

    def outputs(self, checkpoint: Checkpoint, request: OutputRequest) -> tuple[OutputFile, ...]:
        """The torch files, and the meta file with its new sizes.

        Raises:
            CheckpointError: the wider model's optimizer would group or divide its parameters otherwise.
        """
        parsed: Parsed = checkpoint.private
        shapes = {item.key: item.shape for item in request.tensors}
        _check_alike(checkpoint, shapes)
        changes = {f"model_config.{key}": value for key, value in request.config.items()}
        ratio = _aspect_ratio(checkpoint, request.config)
        if ratio is not None:
            changes["user_config.aspect_ratio"] = ratio
        meta = rewritten_file(checkpoint.root, parsed.meta, changes)
        return (*parsed.files.outputs(checkpoint, request), meta)


def step_of_file(path: Path) -> int | None:
    """The step of a run whose weights or meta file a path is; None of any other path.

    Weights with no file of a run beside them are a file like any other.
    """
    found = _FILE.fullmatch(path.name)
    if found is None or found[1] == "optim" or not path.is_file():
        return None
    run = any(kinds.keys() - {"model"} for kinds in _steps(path.parent).values())
    return int(found[2]) if run else None


def _steps(root: Path) -> dict[int, dict[str, dict[int, str]]]:
    """Step -> kind of file -> rank -> name; empty where there is nothing of the kind."""
    found: dict[int, dict[str, dict[int, str]]] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        named = _FILE.fullmatch(path.name)
        if named is not None and (named[1] == "meta") == (path.suffix == ".json"):
            kinds = found.setdefault(int(named[2]), {})
            kinds.setdefault(named[1], {})[int(named[3] or 0)] = path.name
    return {step: kinds for step, kinds in found.items() if "model" in kinds or len(kinds) > 1}


def _files_of(
    root: Path, step: int, kinds: Mapping[str, Mapping[int, str]]
) -> tuple[str, str, tuple[str, ...]]:
    """Names of the files of one step: weights, sizes and options, and the optimizer's, one per rank.

    Raises:
        CheckpointError: one is missing.
    """
    for kind, name in (("model", f"model_{step:06d}.pt"), ("meta", f"meta_{step:06d}.json")):
        if kind not in kinds:
            raise CheckpointError(
                f"{root / name} is missing, which nanochat writes with every step",
                hint=f"copy it from where the run was, or {_EARLIER}",
            )
    ranks = kinds.get("optim", {})
    lost = next((rank for rank in range(max(ranks, default=0)) if rank not in ranks), None)
    if lost is not None:
        raise _missing_rank(root, step, lost, f"there is one of rank {max(ranks)}")
    return kinds["model"][0], kinds["meta"][0], tuple(ranks[rank] for rank in sorted(ranks))


def _missing_rank(root: Path, step: int, rank: int, why: str) -> CheckpointError:
    return CheckpointError(
        f"{root / f'optim_{step:06d}_rank{rank}.pt'} is missing: {why}",
        hint=f"every rank writes a file of its own: copy it, or {_EARLIER}",
    )


@dataclass
class _States:
    """The optimizer's state of every rank, by parameter.

    Attributes:
        shapes: of the weights, in the model's order.
        files: one per rank.
        states: a parameter may have several: small ones have their whole state on every rank.
        groups: with names.
        boxes: see :class:`~sparkling_cli.formats.statefiles.StateFiles`.
        places: parameter -> where the numbers of its state stand, on all ranks.
    """

    shapes: Mapping[str, Shape]
    files: Sequence[TorchFile]
    states: list[ParamState] = field(default_factory=list)
    groups: list[Mapping[str, Any]] = field(default_factory=list)
    boxes: dict[str, tuple[Box, ...]] = field(default_factory=dict)
    places: dict[str, dict[str, list[Place]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank, file in enumerate(self.files):
            tree = optimizer_in(file, ())
            named = _named_groups(tree, self.shapes, file.relative)
            if rank == 0:
                self.groups = [
                    {**group, "params": names}
                    for group, names in zip((g for g in tree.groups if g["params"]), named, strict=True)
                ]
            owners = {
                str(number): names[place:]
                for group, names in zip((g for g in tree.groups if g["params"]), named, strict=True)
                for place, number in enumerate(group["params"])
            }
            for state in tree.states:
                names = owners.get(state.param)
                if names is None:
                    raise CheckpointError(f"{file.relative}: state of {state.param}, which is in no group")
                stacked = any(len(file.tensors[key].shape) == 3 for key in state.tensors.values())
                add = self._muon if stacked else self._adamw
                add(rank, file, state, names)

    def _adamw(self, rank: int, file: TorchFile, state: ParamState, names: Sequence[str]) -> None:
        name, count = names[0], len(self.files)
        whole = self.shapes[name]
        split = count > 1 and prod(whole) >= _SMALL
        rows = whole[0] // count if split else 0
        slots = {}
        for slot, key in state.tensors.items():
            found = file.tensors[key].shape
            if found != ((rows, *whole[1:]) if split else whole):
                self._check_count(file, name, whole, found)
            slots[slot] = key
            if split:
                slots[slot] = f"{self.files[0].relative}:{name}.{slot}"
                self.boxes[key] = (Box(slots[slot], (rank * rows, *[0] * (len(whole) - 1)), found),)
        places = self.places.setdefault(name, {})
        for scalar, at in state.places.items():
            places.setdefault(scalar, []).extend(at)
        if rank == 0 or not split:
            self.states.append(ParamState(name, slots, state.scalars, places))

    def _check_count(self, file: TorchFile, name: str, whole: Shape, found: Shape) -> None:
        """State of another shape than the number of files gives.

        Raises:
            CheckpointError: always; says which file is missing, if one is.
        """
        ranks = whole[0] // found[0] if whole and found and found[0] else 0
        if ranks > len(self.files) and found == (whole[0] // ranks, *whole[1:]):
            why = f"{file.relative} has {found[0]} of the {whole[0]} rows of {name!r}: of {ranks} ranks"
            raise self._lost(why)
        raise CheckpointError(
            f"{file.relative}: state of {name!r} has shape {found}, the parameter has {whole}, and there are "
            f"{len(self.files)} ranks' files",
            hint=f"the files are of different runs: {_EARLIER}",
        )

    def _lost(self, why: str) -> CheckpointError:
        """The next rank's file is missing."""
        first = self.files[0]
        step = int(_FILE.fullmatch(first.relative)[2])  # type: ignore[index]  # it was found by it
        return _missing_rank(first.path.parent, step, len(self.files), why)

    def _muon(self, rank: int, file: TorchFile, state: ParamState, names: Sequence[str]) -> None:
        each = ceil(len(names) / len(self.files))
        own = names[rank * each : (rank + 1) * each]
        slots: dict[str, dict[str, str]] = {name: {} for name in own}
        for slot, key in state.tensors.items():
            found = file.tensors[key].shape
            matrix = self.shapes[names[0]]
            factor = (matrix[0], 1) if matrix[0] >= matrix[1] else (1, matrix[1])
            if found not in ((each, *matrix), (each, *factor)):
                if found[1:] in (matrix, factor) and each > found[0] and rank == 0:
                    ranks = ceil(len(names) / found[0])
                    why = f"{file.relative} has {found[0]} of {len(names)} matrices {matrix[0]} x {matrix[1]}"
                    raise self._lost(f"{why}: of {ranks} ranks")
                raise CheckpointError(
                    f"{file.relative}: {slot} of {names[0]!r} and {len(names) - 1} others has shape {found}, "
                    f"expected {(each, *matrix)} or {(each, *factor)}",
                    hint=f"the files are of different runs: {_EARLIER}",
                )
            keys = [f"{self.files[0].relative}:{name}.{slot}" for name in names]
            for name, box_key in zip(own, keys[rank * each :], strict=False):
                slots[name][slot] = box_key
            boxes = [Box(box_key, (0, 0), found[1:]) for box_key in keys[rank * each :][:each]]
            self.boxes[key] = (*boxes, *[Box(keys[0], (0, 0), found[1:], True)] * (each - len(own)))
        self.states += [ParamState(name, own, {}) for name, own in slots.items()]


def _named_groups(tree: OptimizerTree, shapes: Mapping[str, Shape], where: str) -> list[list[str]]:
    """Names of the parameters of every group that has any.

    Raises:
        CheckpointError: the groups are none of nanochat's.
    """
    wanted = list(_grouped(shapes))
    found = [list(group["params"]) for group in tree.groups if group.get("params")]
    if [len(names) for names in wanted] != [len(numbers) for numbers in found]:
        raise CheckpointError(
            f"{where}: its groups have {', '.join(str(len(numbers)) for numbers in found)} parameters; "
            f"nanochat's for this model have {', '.join(str(len(names)) for names in wanted)}: which is "
            "which cannot be told",
            hint="expand a copy of the folder without the optimizer's files",
        )
    return wanted


def _grouped(shapes: Mapping[str, Shape]) -> Iterator[list[str]]:
    for pattern in _ADAMW:
        names = [name for name in shapes if pattern.fullmatch(name)]
        if "smear_gate.weight" in names:  # in the order of the group, not of the file
            names = [n for n in ("smear_gate.weight", "smear_lambda", "backout_lambda") if n in names]
        if names:
            yield names
    matrices = [name for name in shapes if name.startswith(_MATRICES)]
    for shape in sorted({shapes[name] for name in matrices}):
        yield [name for name in matrices if shapes[name] == shape]


def _check_alike(checkpoint: Checkpoint, shapes: Mapping[str, Shape]) -> None:
    """The wider model's optimizer has the same groups, and divides the same parameters among ranks.

    Raises:
        CheckpointError: it does not.
    """
    before = {name: checkpoint.weight(name).shape for name in checkpoint.weights}
    after = {name: shapes[key] for name, key in checkpoint.weights.items()}
    states = [state.param for state in checkpoint.states]
    crossed = [n for n in set(states) if states.count(n) > 1 and prod(after[n]) >= _SMALL]
    if checkpoint.states and (list(_grouped(before)) != list(_grouped(after)) or crossed):
        raise CheckpointError(
            f"{checkpoint.root.name}: at the new sizes nanochat would put parameters into other groups of "
            "its optimizer, or on other ranks, than its state is in",
            hint="choose another factor, or expand a copy of the folder without the optimizer's files",
        )


def _schedule(meta: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Constant after a warmup, then linear to a share of the peak; as far as the options say it."""
    options = _options(meta)
    total = options.get("num_iterations")
    rates = [rate for group in groups if type(rate := group.get("initial_lr", group.get("lr"))) is float]
    schedule = {"peak": max(rates)} if rates else {}
    if type(total) is not int or total <= 0:
        return {"schedule": schedule}
    names = ("warmdown_ratio", "final_lr_frac", "warmup_steps")
    numbers = {name: options[name] for name in names if isinstance(options.get(name), (int, float))}
    if rates and len(numbers) == len(names):
        share, floor, warmup = numbers.values()
        decay = round(share * total)
        fall = {"decay": "linear", "decay_steps": decay, "decay_start": total - decay + 1, "lead": 1}
        return curve_facts(max(rates), total, warmup, type="wsd", minimum=floor * max(rates), **fall)
    return {"schedule": schedule, "max_steps": total}


def _options(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    found = meta.get("user_config")
    return found if isinstance(found, dict) else {}


def _resume(meta: Mapping[str, Any], step: int) -> str:
    total, batch = _options(meta).get("num_iterations"), meta.get("total_batch_size")
    steps = total if type(total) is int and total > 0 else "N"
    size = batch if type(batch) is int else "B"
    return (
        f"resume with scripts.base_train --model-tag OUTPUT --resume-from-step {step}, the run's own "
        f"options, the --aspect-ratio of the output's meta file, --num-iterations {steps} and "
        f"--total-batch-size {size} as they were: nanochat would take both from the wider model"
    )


def _aspect_ratio(checkpoint: Checkpoint, config: Mapping[str, Any]) -> int | None:
    """The option of the wider model, where the run had it and it gives the width exactly."""
    options = _options(read_json(checkpoint.root, checkpoint.private.meta))
    width, depth = config.get("n_embd"), (checkpoint.config or {}).get("n_layer")
    if "aspect_ratio" not in options or type(width) is not int or type(depth) is not int or depth < 1:
        return None
    return width // depth if width % depth == 0 else None
