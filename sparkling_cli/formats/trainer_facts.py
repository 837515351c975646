"""What a Trainer's small files say about the run: steps, schedule, optimizer; and what of it no longer fits.

No file is executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.directory import read_json, rewritten_file
from sparkling_cli.formats.model import Checkpoint, OutputFile, ParamState
from sparkling_cli.formats.optimizer_states import CODES, LEVELS, PACKED_CODES, SCALES, base_name
from sparkling_cli.formats.torchfile import plain, read_attributes, read_torch_file

#: Schedules whose minimum is zero unless their arguments say otherwise.
_TO_ZERO = frozenset({"cosine", "linear", "cosine_with_restarts"})


STATE = "trainer_state.json"
#: what trainer_state.json says of the best checkpoint so far, which has the model at its old size
_BEST = ("best_model_checkpoint", "best_metric", "best_global_step")
ADAPTER = "adapter_config.json"


def without_outdated(checkpoint: Checkpoint) -> tuple[Checkpoint, tuple[OutputFile, ...]]:
    """The checkpoint without carried files that speak of the model at its old size, and their successors.

    The Trainer's state names the best checkpoint so far, which ``load_best_model_at_end`` loads at the end of
    the run: cleared. Adapters in folders of their own fit the old size alone: left out.

    Returns:
        The checkpoint, with notes on what was done; and the files that are written anew.

    Raises:
        CheckpointError: the state is no JSON, or an adapter lies beside the weights.
    """
    root, carried = checkpoint.root, checkpoint.carried
    if ADAPTER in carried:
        raise CheckpointError(
            f"{root.name}: {ADAPTER} lies beside the weights: what the model computes includes an adapter, "
            "which fits the model at its old size alone",
            hint="merge it into the weights (peft: merge_and_unload) and save these, or move the adapter_* "
            "files out of the directory",
        )
    notes, files = [], []
    folders = {name.rpartition("/")[0] for name in carried if name.endswith(f"/{ADAPTER}")}
    adapters = {name for name in carried if name.rpartition("/")[0] in folders}
    notes += [
        f"{folder}/ is left out: an adapter for the model at its old size" for folder in sorted(folders)
    ]
    if STATE in carried:
        best = {name: value for name in _BEST if (value := read_json(root, STATE).get(name)) is not None}
        if best:
            files.append(rewritten_file(root, STATE, dict.fromkeys(best)))
            values = {**best, _BEST[0]: str(best.get(_BEST[0])).replace("\\", "/").rpartition("/")[2]}
            listed = ", ".join(f"{name} {values[name]}" for name in best)
            notes.append(
                f"{STATE}: {listed}: of the model at its old size; cleared, so that load_best_model_at_end "
                "chooses among the checkpoints from here on"
            )
    dropped = {file.path for file in files} | adapters
    if not dropped:
        return checkpoint, ()
    kept = tuple(name for name in carried if name not in dropped)
    further = tuple(
        item._replace(left_out=True) if item.file in adapters else item for item in checkpoint.further
    )
    return replace(checkpoint, carried=kept, further=further, notes=(*checkpoint.notes, *notes)), tuple(files)


def run_facts(root: Path, present: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Facts and notes from ``trainer_state.json``, ``scheduler.pt`` and ``training_args.bin``.

    Facts (each only where it is known): ``global_step``, ``max_steps``, ``base_lrs``, ``last_lrs``,
    ``last_epoch``, ``log_history``, ``training_args`` (a few plain values), ``schedule`` = {``type``,
    ``warmup_steps``, ``peak``, ``minimum``, ``kwargs``}.

    Raises:
        CheckpointError: ``trainer_state.json`` or the scheduler's file is damaged.
    """
    facts: dict[str, Any] = {}
    notes: list[str] = []
    if STATE in present:
        state = read_json(root, STATE)
        for name in ("global_step", "max_steps"):
            if isinstance(state.get(name), int) and state[name] >= 0:
                facts[name] = state[name]
        if isinstance(state.get("log_history"), list):
            facts["log_history"] = state["log_history"]
    for name in ("scheduler.pt", "scheduler.bin"):
        if name in present:
            facts.update(_scheduler(root, name))
    if "training_args.bin" in present:
        try:
            args = read_attributes(root / "training_args.bin", "training_args.bin")
        except CheckpointError as error:
            notes.append(f"{error.message}: the schedule's type and warmup are not known from it")
        else:
            facts["training_args"] = {key: args[key] for key in _ARGS if key in args}
    schedule = _schedule(facts)
    if schedule:
        facts["schedule"] = schedule
    return facts, notes


_ARGS = (
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "learning_rate", "max_steps",
    "num_train_epochs", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
    "max_grad_norm", "gradient_accumulation_steps", "per_device_train_batch_size", "bf16", "fp16", "seed",
)  # fmt: skip


def _scheduler(root: Path, name: str) -> dict[str, Any]:
    tree = plain(read_torch_file(root / name, name).tree)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{name}: expected a scheduler's state dict, found a {type(tree).__name__}")
    found: dict[str, Any] = {}
    for fact, field in (("base_lrs", "base_lrs"), ("last_lrs", "_last_lr")):
        rates = tree.get(field)
        if isinstance(rates, list) and rates and all(isinstance(r, (int, float)) for r in rates):
            found[fact] = [float(rate) for rate in rates]
    if isinstance(tree.get("last_epoch"), int):
        found["last_epoch"] = tree["last_epoch"]
    return found


def _schedule(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Type, warmup, peak and minimum, as far as they are known."""
    args = facts.get("training_args", {})
    rates = facts.get("base_lrs")
    peak = max(rates) if rates else args.get("learning_rate")
    schedule: dict[str, Any] = {} if peak is None else {"peak": float(peak)}
    kind = args.get("lr_scheduler_type")
    if not isinstance(kind, str):
        return schedule
    kwargs = args.get("lr_scheduler_kwargs")
    schedule["type"] = kind
    schedule["kwargs"] = dict(kwargs) if isinstance(kwargs, dict) else {}
    steps = warmup_steps(args, facts.get("max_steps") or args.get("max_steps"))
    if steps is not None:
        schedule["warmup_steps"] = steps
    if kind in _TO_ZERO:
        schedule["minimum"] = 0.0
    return schedule


def curve_facts(peak: float, total: float | None = None, warmup: float = 0, **options: Any) -> dict[str, Any]:
    """Facts of a schedule that is one of this program's curves; of its peak alone, where no more is known.

    Args:
        peak: its highest rate.
        total: steps of the whole run.
        warmup: of them before the peak.
        options: of the curve (``schedule.curves.Curve``).
    """
    if total is None:
        return {"schedule": {"peak": float(peak)}}
    curve = {"peak": float(peak), "type": "curve", "warmup_steps": int(warmup), "kwargs": options}
    return {"schedule": curve, "max_steps": int(total)}


def warmup_steps(args: Mapping[str, Any], total: int | None) -> int | None:
    """Warmup in steps, as the Trainer counts it: below one (or by ``warmup_ratio``) it is a share.

    Args:
        args: the training arguments.
        total: steps of the whole run.
    """
    steps = args.get("warmup_steps") or 0
    ratio = args.get("warmup_ratio") or 0.0
    if not isinstance(steps, (int, float)) or not isinstance(ratio, (int, float)):
        return None
    if steps >= 1:
        return int(steps)
    share = steps or ratio
    if not share:
        return 0
    return math.ceil(total * share) if total and total > 0 else None


#: endings of the parts of a quantized moment
_PARTS = "|".join(f"{re.escape(end)}$" for end in (CODES, PACKED_CODES, SCALES, LEVELS))


def optimizer_class(
    states: Sequence[ParamState], groups: Sequence[Mapping[str, Any]], args: Mapping[str, Any]
) -> str | None:
    """The optimizer's class, from its state's names and its groups' options; None if several fit."""
    found = {name for state in states for name in (*state.tensors, *state.scalars)}
    if any(base_name(name) == "state1" for name in found):
        return "optimizer of bitsandbytes"
    names = frozenset(re.sub(_PARTS, "", name) for name in found) - {"step"}
    options = frozenset(option for group in groups for option in group)
    if "ns_steps" in options or "ns_coefficients" in options:
        return "Muon" if names <= {"momentum_buffer"} else "Muon with AdamW"
    if names in ({"exp_avg", "exp_avg_sq"}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}):
        decoupled = next((group["decoupled_weight_decay"] for group in groups if _decoupled(group)), None)
        if decoupled is None:
            return "AdamW" if str(args.get("optim", "adamw")).startswith("adamw") else None
        return "AdamW" if decoupled else "Adam"
    if names == {"momentum_buffer"} and "dampening" in options:
        return "SGD"
    if names == {"momentum_buffer", "exp_avg", "exp_avg_sq"} and "dampening" not in options:
        return "Muon with AdamW"
    if names == {"exp_avg"}:
        return "Lion"
    if names == {"z", "exp_avg_sq"}:
        return "AdamWScheduleFree"
    if {"exp_avg_sq_row", "row_var"} & names:
        return "Adafactor"
    return None


def _decoupled(group: Mapping[str, Any]) -> bool:
    return isinstance(group.get("decoupled_weight_decay"), bool)
