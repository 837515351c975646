"""What a user should know, and what a user should act on, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping

from sparkling_cli.checkpoint.model import Checkpoint
from sparkling_cli.layout.geometry import Growth
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.spec.model import ExpansionSpec


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


def warnings_for(spec: ExpansionSpec) -> tuple[str, ...]:
    """What calls for a decision."""
    warnings = []
    if spec.optimizer in ("copy", "drop") and spec.init == "copy-copy":
        warnings.append(
            f"optimizer treatment {spec.optimizer!r} is symmetric: copied weights stay copies for ever"
        )
    return tuple(warnings)
