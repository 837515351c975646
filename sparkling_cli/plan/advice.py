"""What a user should know, and what a user should act on, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping

from sparkling_cli.checkpoint.model import Checkpoint
from sparkling_cli.layout.geometry import Growth
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.spec.model import ExpansionSpec

#: above this beta2, Adam's shared step counter makes the new entries' first updates far too large
_BETA2_LIMIT = 0.99


def notes_for(
    checkpoint: Checkpoint,
    layout: ModelLayout,
    spec: ExpansionSpec,
    growth: Mapping[str, Growth],
    renamed: bool,
) -> tuple[str, ...]:
    """Facts about this expansion."""
    notes = [*checkpoint.notes]
    if not checkpoint.states:
        notes.append("no optimizer state in the source: the output has weights only")
    if renamed:
        notes.append(
            "weights are written under the module's names: resuming a Trainer run skips the name "
            "conversion of this class; from_pretrained reads both"
        )
    asked = {layout.aliases.get(axis.axis, axis.axis) for axis in spec.axes}
    if "kv_heads" in asked and "heads" not in asked and "q_per_kv" in layout.axes:
        kv = growth["kv_heads"]
        per_kv = layout.axes["q_per_kv"].size
        notes.append(f"query heads grow with their groups: {kv.source * per_kv} -> {kv.target * per_kv}")
    fractional = [a for a, g in growth.items() if g.target % g.source]
    if fractional and spec.init == "copy-copy" and spec.scaling == "rms":
        notes.append(
            f"fractional growth of {', '.join(fractional)} keeps RMS, not the function: the loss may jump"
        )
    return tuple(notes)


def warnings_for(checkpoint: Checkpoint, spec: ExpansionSpec) -> tuple[str, ...]:
    """What calls for a decision."""
    warnings = []
    betas = [found for group in checkpoint.param_groups if (found := _betas(group)) is not None]
    beta1, beta2 = max(betas, key=lambda pair: pair[1], default=(0.0, 0.0))
    fresh = spec.rewarmup.bias_correction == "fresh"
    if beta2 >= _BETA2_LIMIT and spec.optimizer.startswith("asymmetric") and not fresh:
        warnings.append(
            f"Adam's beta2 is {beta2:g}: with the step counter shared, the new entries' first updates are up "
            f"to {_overshoot(beta1, beta2):.1f}x too large; consider --bias-correction fresh"
        )
    if spec.optimizer in ("copy", "drop") and spec.init == "copy-copy":
        warnings.append(
            f"optimizer treatment {spec.optimizer!r} is symmetric: copied weights stay copies for ever"
        )
    return tuple(warnings)


def _betas(group: Mapping[str, object]) -> tuple[float, float] | None:
    betas = group.get("betas")
    if isinstance(betas, (tuple, list)) and len(betas) == 2:
        return float(betas[0]), float(betas[1])
    return None


def _overshoot(beta1: float, beta2: float) -> float:
    """Largest ``(1-b1^t) / sqrt(1-b2^t)`` over the first steps, at a steady gradient."""
    return float(max((1 - beta1**t) / (1 - beta2**t) ** 0.5 for t in range(1, 1001)))
