"""OLMo's unsharded steps: ``model.pt``, ``optim.pt``, ``train.pt`` and ``config.yaml``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError, UnsafePickleError
from sparkling_cli.formats.directory import list_files, read_yaml, rewritten_file
from sparkling_cli.formats.model import Checkpoint, OutputFile, OutputRequest
from sparkling_cli.formats.singlefile import Section, Sections, SingleFile, read_sections
from sparkling_cli.formats.statefiles import read_optimizer_file, read_weights_file
from sparkling_cli.formats.torchfile import read_torch_file
from sparkling_cli.formats.trainer_facts import curve_facts

MODEL, OPTIMIZER, TRAIN, CONFIG = "model.pt", "optim.pt", "train.pt", "config.yaml"
#: schedules that are one curve, by OLMo's names
_CURVES = {"cosine_with_warmup": "cosine", "linear_with_warmup": "linear", "constant": "constant"}


class OlmoStep(SingleFile):
    """A folder ``stepN-unsharded``. Order of calls: ``claims``, ``open``, ``outputs``."""

    name = "olmo"

    def claims(self, root: Path) -> bool:
        """Weights beside a config.

        Raises:
            CheckpointError: one without the other, a sharded step, or a folder of steps.
        """
        if not root.is_dir():
            return False
        if (root / MODEL).is_file() and (root / CONFIG).is_file():
            return True
        sharded = any((root / MODEL.removesuffix(".pt")).glob("rank*.pt"))
        if sharded and (root / CONFIG).is_file():
            command = shlex.join(["python", "scripts/unshard.py", str(root), f"{root}-unsharded"])
            raise CheckpointError(
                f"{root} is a sharded step of OLMo, whose files hold flat parts of the parameters",
                hint=f"unshard it, and expand the result: {command}",
            )
        if (root / OPTIMIZER).is_file() and (root / TRAIN).is_file():
            lost = MODEL if not (root / MODEL).is_file() else CONFIG
            raise CheckpointError(f"{root / lost} is missing, which OLMo writes beside {OPTIMIZER}")
        return False

    def open(self, root: Path) -> Checkpoint:
        """Names, shapes and places; sizes and schedule from ``config.yaml``.

        Raises:
            CheckpointError: missing, damaged or contradictory files.
            UnsafePickleError: a torch file that is not weights-only-safe; it was not executed.
        """
        present = list_files(root)
        config = read_yaml(root, CONFIG)
        sizes = config.get("model")
        if not isinstance(sizes, dict):
            raise CheckpointError(f"{root / CONFIG}: there is no block model, the model's sizes, in it")
        files, sections = {MODEL: read_weights_file(root, MODEL)}, Sections("OLMo", Section(MODEL, ()))
        if OPTIMIZER in present:
            files[OPTIMIZER] = read_optimizer_file(root, OPTIMIZER)
            sections = replace(sections, optimizers=(Section(OPTIMIZER, ()),))
        carried = tuple(name for name in present if name != CONFIG and name not in files)
        found = read_sections(
            root, self.name, files, sections, config=sizes, config_file=f"{CONFIG}: model", carried=carried
        )
        notes = [] if OPTIMIZER in present else [f"there is no {OPTIMIZER}: weights only"]
        if OPTIMIZER in present and TRAIN not in present:
            notes.append(f"{TRAIN} is missing, without which OLMo does not resume, nor is the step known")
        facts = {name: found.facts[name] for name in ("kind", "optimizer_class") if name in found.facts}
        facts |= {**_steps(root, present), **_schedule(config)}
        return replace(found, facts=facts, notes=tuple(notes))

    def outputs(self, checkpoint: Checkpoint, request: OutputRequest) -> tuple[OutputFile, ...]:
        """Both torch files, and the config, whose other lines stay as they are."""
        changes = {f"model.{key}": value for key, value in request.config.items()}
        config = rewritten_file(checkpoint.root, CONFIG, changes)
        return (config, *super().outputs(checkpoint, request))


def _steps(root: Path, present: tuple[str, ...]) -> dict[str, int]:
    """The step, from the trainer's state.

    Raises:
        CheckpointError: the file is damaged.
    """
    if TRAIN not in present:
        return {}
    try:
        tree = read_torch_file(root / TRAIN, TRAIN).tree
    except UnsafePickleError:
        return {}  # carried over as it is, whatever it holds
    step = tree.get("global_step") if isinstance(tree, dict) else None
    return {"global_step": step} if type(step) is int else {}


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """Peak, and the whole curve where it is counted in steps."""
    optimizer, scheduler = config.get("optimizer"), config.get("scheduler")
    if not isinstance(optimizer, dict) or not isinstance(scheduler, dict):
        return {}
    peak, total = optimizer.get("learning_rate"), scheduler.get("t_max") or config.get("max_duration")
    if not isinstance(peak, (int, float)):
        return {}
    if isinstance(total, str) and total.replace(".", "", 1).replace("e", "", 1).isdigit():
        total = int(float(total))
    kind, warmup, share = (scheduler.get(name) for name in ("name", "t_warmup", "alpha_f"))
    whole = all(isinstance(number, (int, float)) for number in (total, warmup, share))
    if not whole or kind not in _CURVES or scheduler.get("units", "steps") != "steps":
        return curve_facts(peak)
    assert total is not None and warmup is not None and share is not None
    first = scheduler.get("warmup_min_lr")
    initial = float(first) if isinstance(first, (int, float)) else 0.1 * peak
    return curve_facts(peak, total, warmup, type=_CURVES[kind], minimum=peak * share, initial=initial)
