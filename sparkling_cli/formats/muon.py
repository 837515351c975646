"""How far Muon's step moves the entries of a matrix, by its shape.

An orthogonalized update of a x b has ``min(a, b)`` singular values of one, so its entries have an RMS of
``1 / sqrt(max(a, b))``. Every variant multiplies that by a factor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

#: rule -> the factor on an orthogonalized update of so many rows and columns, up to a constant
FACTORS: Mapping[str, Callable[[int, int], float]] = {
    # torch's default; Keller Jordan's; nanochat's; Megatron's shape_scaling
    "original": lambda rows, columns: sqrt(max(1.0, rows / columns)),
    # torch's match_rms_adamw; Moonlight's; Dion's rms_norm; Megatron's spectral: alike for all shapes
    "match_rms": lambda rows, columns: sqrt(max(rows, columns)),
    # Dion's spectral_norm; Megatron's unit_rms_norm
    "spectral_norm": lambda rows, columns: sqrt(rows / columns),
    "none": lambda rows, columns: 1.0,
}

#: what Dion's package calls its rules
_DION = {"spectral_norm": "spectral_norm", "rms_norm": "match_rms", None: "none"}
#: what the state of an orthogonalizing optimizer's matrices is called
MOMENTUM = frozenset({"momentum_buffer", "momentum"})


def step_rms(rule: str, rows: int, columns: int) -> float:
    """RMS of a step's entries at full rank, up to a constant.

    Args:
        rule: of :data:`FACTORS`.
        rows: of the matrix.
        columns: of the matrix.
    """
    return FACTORS[rule](rows, columns) / sqrt(max(rows, columns))


def rule_of(group: Mapping[str, Any]) -> str | None:
    """The rule that a group's options tell; None where they are not a Muon's.

    Args:
        group: of an optimizer's ``param_groups``.
    """
    if group.get("algorithm") in ("muon", "normuon"):
        return _DION.get(group.get("adjust_lr"))
    if group.get("use_muon") is False:
        return None
    steps = {"ns_steps", "ns_coefficients"} & group.keys()
    if not (steps or group.get("use_muon") is True or group.get("kind") == "muon"):
        return None
    if group.get("use_adjusted_lr") or group.get("update_scale") == "match_rms":  # pytorch_optimizer
        return "match_rms"
    if {"wd", "adamw_betas"} <= group.keys():  # Moonlight's own class
        return "match_rms"
    adjusted = group.get("adjust_lr_fn") or "original"
    return {"original": "original", "match_rms_adamw": "match_rms"}.get(adjusted, "none")
