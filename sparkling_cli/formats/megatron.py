"""Megatron-LM's ``torch`` format: ``iter_N/mp_rank_TT[_PPP]/model_optim_rng.pt``, sizes in its ``args``.

Every tensor-parallel rank has its slice of a weight and of the weight's state, every pipeline stage its own
layers, numbered from zero. The optimizer numbers its parameters, decayed ones and others apart, and keeps
their fp32 masters in lists beside its state.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.directory import inside, list_files
from sparkling_cli.formats.model import Checkpoint, OutputFile, OutputRequest, ParamState
from sparkling_cli.formats.numbered_states import name_parameters
from sparkling_cli.formats.statedict import OptimizerTree, Place, is_state_dict, optimizer_in
from sparkling_cli.formats.statefiles import Box, StateFiles
from sparkling_cli.formats.torchfile import ATTRIBUTES, Call, TensorNode, TorchFile, plain, read_torch_file
from sparkling_cli.formats.trainer_facts import curve_facts
from sparkling_cli.storage.tensors import Shape

FILE, FLAT = "model_optim_rng.pt", "distrib_optim.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
#: weights that are shared out by rows, and by columns; all others are whole on every rank
_BY_ROWS = ("word_embeddings.weight", "linear_qkv.weight", "linear_qkv.bias", "output_layer.weight")
_GATED = ("linear_fc1.weight", "linear_fc1.bias")
_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
MASTER = "fp32_param"
#: Megatron's names for the end of a schedule with a constant phase
_WSD_DECAYS = {"linear": "linear", "cosine": "cosine", "minus_sqrt": "1-sqrt"}
#: as which "state" a weight is known that is whole on every rank, on the ranks but the first
_REPLICA = "param"
_OTHER_FORMAT = "resume once with --ckpt-format torch_dist, save, and expand that"


class MegatronLegacy:
    """An iteration in Megatron's ``torch`` format. Order of calls: ``claims``, ``open``, ``outputs``."""

    name = "megatron-torch"

    def claims(self, root: Path) -> bool:
        """Folders ``mp_rank_*`` with Megatron's file.

        Raises:
            CheckpointError: a rank is missing, the optimizer's state is flat, or a folder of iterations.
        """
        if not root.is_dir():
            return False
        if (root / "latest_checkpointed_iteration.txt").is_file():
            steps = sorted(path.parent.parent.name for path in root.glob(f"iter_*/mp_rank_*/{FILE}"))
            if steps:
                raise CheckpointError(
                    f"{root} is a folder of Megatron's iterations",
                    hint=f"name one: {shlex.quote(str(root / steps[-1]))}",
                )
        if not any(root.glob(f"mp_rank_*/{FILE}")):
            return False
        _ranks(root)
        return True

    def open(self, root: Path) -> Checkpoint:
        """Names, shapes and places from all ranks; sizes and schedule from the arguments.

        Raises:
            CheckpointError: missing, damaged or contradictory files, or parallelism that is not read.
            UnsafePickleError: a file that is not weights-only-safe; it was not executed.
        """
        grid = _ranks(root)
        files = [[read_torch_file(inside(root, p, "the folder"), p) for p in stage] for stage in grid]
        args = _arguments(files[0][0])
        found = _Parts(files, gated=bool(args.get("swiglu")))
        ranks = StateFiles({f.relative: f for stage in files for f in stage}, found.boxes)
        tensors, others = ranks.found(found.weights, found.states)
        facts: dict[str, Any] = {"kind": "Megatron, torch format", **facts_in(files[0][0].tree)}
        if found.states:
            facts["optimizer_class"] = "AdamW"
        notes = [] if found.states else ["there is no optimizer state in these files: weights only"]
        notes.append("resume with the sizes of the output's args, and with --kv-channels as it was")
        return Checkpoint(
            root=root,
            format=self.name,
            tensors=tensors,
            weights=found.weights,
            states=tuple(found.states),
            param_groups=tuple(found.groups),
            config=args,
            config_file=f"{files[0][0].relative}: args",
            carried=tuple(name for name in list_files(root) if name not in ranks.files),
            further=tuple(others),
            facts=facts,
            notes=tuple(notes),
            private=ranks,
        )

    def outputs(self, checkpoint: Checkpoint, request: OutputRequest) -> tuple[OutputFile, ...]:
        """Every rank's file, with the new sizes among its arguments."""
        ranks: StateFiles = checkpoint.private
        args = {("args", *ATTRIBUTES, key): value for key, value in request.config.items()}
        return ranks.outputs(checkpoint, request, dict.fromkeys(ranks.files, args))


def _ranks(root: Path) -> list[list[str]]:
    """Relative paths of the ranks' files, by pipeline stage and tensor-parallel rank.

    Raises:
        CheckpointError: one is missing, or the optimizer's state lies in flat buckets.
    """
    flat = sorted(root.glob(f"mp_rank_*/{FLAT}"))
    if flat:
        raise CheckpointError(
            f"{flat[0]}: flat buckets of the distributed optimizer, in which parameters cannot be told apart",
            hint=_OTHER_FORMAT,
        )
    there: dict[tuple[int, int], str] = {}
    for path in sorted(root.glob("mp_rank_*")):
        named = _FOLDER.fullmatch(path.name)
        if named is not None and path.is_dir():
            there[int(named[2] or 0), int(named[1])] = f"{path.name}/{FILE}"
    stages, slices = (max(rank[dim] for rank in there) + 1 for dim in (0, 1))
    staged = any("_" in name.partition("/")[0].removeprefix("mp_rank_") for name in there.values())
    for stage in range(stages):
        for rank in range(slices):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if staged else "") + f"/{FILE}"
            if not (root / name).is_file():
                raise CheckpointError(
                    f"{root / name} is missing: there are ranks up to {slices - 1}"
                    + (f" of stages up to {stages - 1}" if staged else ""),
                    hint="copy it from where the run was, or take an earlier iteration",
                )
    return [[there[stage, rank] for rank in range(slices)] for stage in range(stages)]


def args_in(tree: Any) -> dict[str, Any] | None:
    """The arguments of a run as plain data, from what it saved; None if they are not there.

    Groups of keys and values are said only where attention has some: Megatron writes 1 otherwise.
    """
    args = tree.get("args") if isinstance(tree, dict) else None
    found = plain(args) if isinstance(args, Call) else None
    if not isinstance(found, dict):
        return None
    if not found.get("group_query_attention"):
        found.pop("num_query_groups", None)
    return found


def _arguments(file: TorchFile) -> dict[str, Any]:
    found = args_in(file.tree)
    if found is None:
        raise CheckpointError(
            f"{file.relative}: there are no args in it, by which Megatron says the model's sizes",
            hint="save without --no-save-args, or take an earlier iteration",
        )
    split = {
        "expert_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "num_experts": None,
    }
    for name, usual in split.items():
        if found.get(name, usual) not in (usual, None):
            raise CheckpointError(
                f"{file.relative}: {name} is {found[name]}, and in this format only dense models without "
                "virtual stages can be read",
                hint=_OTHER_FORMAT,
            )
    return found


@dataclass
class _Parts:
    """Weights and state of all ranks, put together.

    Attributes:
        files: by pipeline stage and tensor-parallel rank.
        gated: whether the MLP's first matrix has two halves.
        weights: name in the whole model -> key.
        states: of all parameters.
        groups: of the optimizer, without its parameters.
        boxes: see :class:`~sparkling_cli.formats.statefiles.StateFiles`.
        places: parameter -> where the numbers of its state stand, on all ranks.
    """

    files: Sequence[Sequence[TorchFile]]
    gated: bool
    weights: dict[str, str] = field(default_factory=dict)
    states: list[ParamState] = field(default_factory=list)
    groups: list[Mapping[str, Any]] = field(default_factory=list)
    boxes: dict[str, tuple[Box, ...]] = field(default_factory=dict)
    places: dict[str, dict[str, list[Place]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = 0
        for stage in self.files:
            count = 0
            for rank, file in enumerate(stage):
                own = list(self._weights(rank, file, first, len(stage)))
                count = max([count, *(int(n[1]) + 1 - first for name, _ in own if (n := _LAYER.match(name)))])
                self._state(rank, file, own, len(stage))
            first += count

    def _weights(self, rank: int, file: TorchFile, first: int, ranks: int) -> Iterator[tuple[str, Shape]]:
        """The rank's weights under their names in the whole model, with its own shapes, in order.

        Raises:
            CheckpointError: no model, several of them (virtual stages), or one weight on two stages.
        """
        tree = file.tree if isinstance(file.tree, dict) else {}
        if not is_state_dict(tree.get("model")):
            several = "; virtual pipeline stages are not read" if "model0" in tree else ""
            raise CheckpointError(f"{file.relative}: there is no model in it{several}")
        keys = file.keys
        for local, node in tree["model"].items():
            if not isinstance(node, TensorNode) or local.endswith("_extra_state"):
                continue
            name = _LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) + first}.", local)
            key = keys["model", local]
            if rank == 0 and name in self.weights:
                raise CheckpointError(
                    f"{file.relative}: {name!r} is in two stages",
                    hint="a head that is tied to the embedding lies in both: save with one pipeline stage",
                )
            whole = self._place(name, "weight", key, node.shape, rank, ranks)
            if rank == 0:
                self.weights[name] = whole or key
            elif whole is None:
                self.states.append(ParamState(name, {_REPLICA: key}))
            yield name, node.shape

    def _place(self, name: str, slot: str, key: str, shape: Shape, rank: int, ranks: int) -> str | None:
        """Put a rank's tensor into the whole one, whose key it gives; None if every rank has all of it."""
        if ranks == 1:
            return key
        whole = f"{name}.{slot}"
        if name.endswith(_GATED) and self.gated:
            half = (shape[0] // 2, *shape[1:])
            self.boxes[key] = tuple(
                Box(whole, (place * ranks * half[0] + rank * half[0], *[0] * (len(half) - 1)), half)
                for place in (0, 1)
            )
        elif name.endswith((*_BY_ROWS, *_GATED)):
            self.boxes[key] = (Box(whole, (rank * shape[0], *[0] * (len(shape) - 1)), shape),)
        elif name.endswith(_BY_COLUMNS):
            self.boxes[key] = (Box(whole, (0, rank * shape[1]), shape),)
        else:
            return None
        return whole

    def _state(self, rank: int, file: TorchFile, own: Sequence[tuple[str, Shape]], ranks: int) -> None:
        """The rank's optimizer state, by the shapes of its weights.

        Raises:
            CheckpointError: groups that are not Megatron's.
        """
        optimizer = file.tree.get("optimizer")
        if not isinstance(optimizer, dict):
            return
        inner = "optimizer" in optimizer
        path = ("optimizer", "optimizer") if inner else ("optimizer",)
        tree, shapes = optimizer_in(file, path), dict(own)
        named = self._named(tree, file, shapes)
        keys = file.keys
        masters = optimizer.get("fp32_from_fp16_params") if inner else None
        extra: dict[str, str] = {}
        for place, group in enumerate(masters if isinstance(masters, list) else ()):
            numbers = tree.groups[place]["params"]
            if len(group) != len(numbers):
                raise CheckpointError(
                    f"{file.relative}: group {place} has {len(group)} masters, not one each"
                )
            for index, number in enumerate(numbers):
                extra[str(number)] = keys["optimizer", "fp32_from_fp16_params", place, index]
        for state, name in zip(tree.states, named, strict=True):
            shape = shapes[name]
            slots: dict[str, str] = {}
            found = {**state.tensors, **({MASTER: extra[state.param]} if state.param in extra else {})}
            for slot, key in found.items():
                if file.tensors[key].shape != shape:
                    raise CheckpointError(
                        f"{file.relative}: {slot} of {name!r} has shape {file.tensors[key].shape}, the "
                        f"weight has {shape}"
                    )
                slots[slot] = self._place(name, slot, key, shape, rank, ranks) or key
            places = self.places.setdefault(name, {})
            for scalar, at in state.places.items():
                places.setdefault(scalar, []).extend(at)
            if rank == 0 or not any(key in self.boxes for key in found.values()):
                self.states.append(ParamState(name, slots, state.scalars, places))
        if not self.groups:
            self.groups = [{**group, "params": []} for group in tree.groups]

    def _named(self, tree: OptimizerTree, file: TorchFile, shapes: Mapping[str, Shape]) -> list[str]:
        """The parameters of a rank's states: matrices are decayed, in a group of their own, vectors are not.

        Raises:
            CheckpointError: groups of other kinds or sizes.
        """
        held = Checkpoint(file.path, MegatronLegacy.name, file.tensors, {}, tree.states, tree.groups)
        decayed = {name for name, shape in shapes.items() if len(shape) > 1}
        try:
            named = name_parameters(held, list(shapes.items()), decayed)
        except CheckpointError as error:
            raise CheckpointError(f"{file.relative}: {error.message}", hint=_OTHER_FORMAT) from error
        return [state.param for state in named.states]


def facts_in(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Step and schedule of a run, from what it saved; the schedule is counted in samples there.

    Args:
        tree: what lies beside the model: ``iteration``, ``opt_param_scheduler``, ``args``.
    """
    step = tree.get("iteration")
    if type(step) is not int:
        return {}
    found, args = plain(tree.get("opt_param_scheduler")), args_in(tree) or {}
    return {"global_step": step, **(_schedule(found, args, step) if isinstance(found, dict) else {})}


def _schedule(clock: Mapping[str, Any], args: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The schedule in steps; its peak alone where it is none of this program's curves."""
    peak, floor, done = (clock.get(name) for name in ("max_lr", "min_lr", "num_steps"))
    if not isinstance(peak, float) or peak <= 0:
        return {}
    each = done // step if type(done) is int and step > 0 and done % step == 0 else 0
    style, initial = clock.get("lr_decay_style"), args.get("lr_warmup_init")
    options: dict[str, Any] = {"type": style}
    counts = {name: clock.get(f"lr_{name}_steps") for name in ("warmup", "decay")}
    if style == "WSD":
        iterations = args.get("lr_wsd_decay_iters")
        counts["fall"] = iterations * each if type(iterations) is int else args.get("lr_wsd_decay_samples")
        options = {"type": "wsd", "decay": _WSD_DECAYS.get(str(args.get("lr_wsd_decay_style")))}
    steps = {
        name: int(count) // each
        for name, count in counts.items()
        if each and isinstance(count, (int, float)) and count % each == 0
    }
    known = style in ("cosine", "linear", "constant", "WSD") and None not in options.values()
    if not known or steps.keys() != counts.keys():
        return curve_facts(peak)
    options |= {"decay_steps": steps["fall"]} if "fall" in steps else {}
    options |= {"minimum": float(floor)} if isinstance(floor, (int, float)) and style != "constant" else {}
    options |= {"initial": float(initial)} if isinstance(initial, (int, float)) and initial else {}
    return curve_facts(peak, steps["decay"], steps["warmup"], **options)
