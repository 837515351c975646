"""What lingua keeps beside its DCP files: sizes and schedule in ``params.json``, the step in its train state.

The width of lingua's MLPs is no number of its config. It follows from ``ffn_dim_multiplier``, which is
computed here for the width that a model is to have.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, nextafter
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.directory import read_json
from sparkling_cli.formats.trainer_facts import curve_facts

CONFIG = "params.json"
STATE = "train_state_00000.json"
#: weights in one file, which lingua makes of the others and uses again wherever they are there
CONSOLIDATED = "consolidated/"
MULTIPLIER = "model.ffn_dim_multiplier"
_GATE = "layers.0.feed_forward.w1.weight"


def facts_of(root: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Step, peak, and the schedule where it is one of this program's curves."""
    facts: dict[str, Any] = {}
    if (root / STATE).is_file():
        step = read_json(root, STATE).get("step")
        facts.update({"global_step": step} if type(step) is int else {})
    optim = config.get("optim")
    options = optim if isinstance(optim, dict) else {}
    peak, share, warmup = (options.get(name) for name in ("lr", "lr_min_ratio", "warmup"))
    if not isinstance(peak, (int, float)):
        return facts
    plain = options.get("cycle_length", 1.0) == 1.0 and options.get("cosine_theta", 1.0) == 1.0
    kind = options.get("scheduler")
    known = kind == "linear" or (kind == "cosine" and plain)
    if known and isinstance(share, (int, float)) and type(warmup) is int and type(config.get("steps")) is int:
        return facts | curve_facts(peak, config["steps"], warmup, type=kind, minimum=peak * share)
    return facts | curve_facts(peak)


def with_multiplier(
    config: Mapping[str, Any], changes: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Changes of the config with the multiplier that gives the MLPs their new width.

    Args:
        config: ``params.json``.
        changes: dotted key -> value.
        shapes: of the weights in the output, by name.

    Raises:
        CheckpointError: no multiplier gives that width.
    """
    model = config.get("model")
    model = model if isinstance(model, dict) else {}
    width, unit = changes.get("model.dim", model.get("dim")), model.get("multiple_of", 256)
    if _GATE not in shapes or type(width) is not int or type(unit) is not int or unit < 1:
        return dict(changes)
    ffn, base = shapes[_GATE][0], int(2 * (4 * width) / 3)
    if _width(base, model.get("ffn_dim_multiplier"), unit) == ffn:
        return dict(changes)
    multiplier = ffn / base
    while int(multiplier * base) < ffn:
        multiplier = nextafter(multiplier, inf)
    if _width(base, multiplier, unit) != ffn:
        raise CheckpointError(
            f"lingua's MLPs are a multiple of model.multiple_of = {unit} wide, which {ffn} is not",
            hint=f"choose another factor, or round up to it: --multiple-of {unit}",
        )
    return {**changes, MULTIPLIER: multiplier}


def _width(base: int, multiplier: float | None, unit: int) -> int:
    inner = base if multiplier is None else int(multiplier * base)
    return unit * ((inner + unit - 1) // unit)
