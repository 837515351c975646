"""What a user should know, and what a user should act on, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping

from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.plan.state_checks import stateless_warning
from sparkling_cli.plan.symmetry import locked_axes
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.widening.geometry import Growth

#: the format of ``transformers`` directories, as ``checkpoint.trainer`` names it
TRAINER = "trainer"


def notes_for(
    checkpoint: Checkpoint,
    layout: ModelLayout,
    spec: ExpansionSpec,
    growth: Mapping[str, Growth],
    renamed: bool,
) -> tuple[str, ...]:
    """Facts about this expansion."""
    notes = [*checkpoint.notes]
    if not checkpoint.states and not any("no optimizer state" in note for note in notes):
        notes.append("there is no optimizer state in the source: the output has weights only")
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


def warnings_for(
    checkpoint: Checkpoint, spec: ExpansionSpec, growth: Mapping[str, Growth]
) -> tuple[str, ...]:
    """What calls for a decision."""
    state = spec.optimizer if checkpoint.states else None
    found = (symmetry_warning(growth, state, checkpoint.format), stateless_warning(checkpoint))
    return tuple(warning for warning in found if warning is not None)


def symmetry_warning(growth: Mapping[str, Growth], optimizer: str | None, form: str) -> str | None:
    """The one sentence on copies that no optimizer state tells from their sources; None where they part.

    Args:
        growth: of the plan.
        optimizer: what becomes of the state; None where there is none.
        form: the checkpoint's format.
    """
    if not locked_axes(growth, optimizer):
        return None
    if optimizer is None:
        there = "copy optimizer.pt into the checkpoint" if form == TRAINER else "widen with the state"
        return (
            "there is no optimizer state: under a fresh optimizer copies and their sources get equal updates "
            f"and stay equal for ever; {there}, or choose --init random-copy"
        )
    word = "copied" if optimizer == "copy" else "dropped"
    return (
        f"the optimizer state is {word}: copies and their sources get equal updates and stay equal for ever; "
        "use --optimizer asymmetric unless this is an experiment"
    )
