"""Outputs that are none any more: what was trained on from one is not damaged, and may be days of work."""

from __future__ import annotations

import shlex
from pathlib import Path

from sparkling_cli.errors import SparklingError, VerificationError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.manifest import manifest_of, output_behind
from sparkling_cli.storage.sidecar import DIGESTS, REPORT_JSON, sidecar_root


def not_as_written(output: Path, source: Path | None, faults: str, hint: str | None) -> VerificationError:
    """The error for a checkpoint with a manifest that is not what the manifest says.

    Args:
        output: it.
        source: what it was compared with.
        faults: what does not hold, listed.
        hint: what to do if it was damaged; by default it is to be made again.
    """
    step, began = _steps(output)
    if _carried_on(output) or (step is not None and began is not None and step > began):
        return _trained_on(output, source, step, began)
    if hint is None:
        hint = "do not train on it: expand again, under another name"
        if step is None or began is None:
            hint += (
                "; if it was trained on since, it is no output any more, and `verify` says nothing about it"
            )
    return VerificationError(f"{output} is not what was written:\n  {faults}", hint=hint)


def _steps(output: Path) -> tuple[int | None, int | None]:
    """The step of a checkpoint, and that of its last expansion, where they are known."""
    began = step = None
    try:
        manifest = manifest_of(output)
        began = None if manifest is None or not manifest.stages else manifest.stages[-1].step
        step = open_checkpoint(output).facts.get("global_step")
    except SparklingError:  # it is damaged as well
        pass
    return step if isinstance(step, int) else None, began


def _carried_on(output: Path) -> bool:
    """Whether the history was copied by the training side, which leaves out what is of the output alone."""
    root = sidecar_root(output)
    return not (root / DIGESTS).exists() and not (root / REPORT_JSON).exists()


def _trained_on(output: Path, source: Path | None, step: int | None, began: int | None) -> VerificationError:
    made = output_behind(output, *([] if source is None else [source]))
    command = shlex.join(["sparkling", "inspect", str(output), "--against", str(made or "OUTPUT")])
    where = "" if step is None or began is None else f" (it is at step {step:,}, the expansion at {began:,})"
    return VerificationError(
        f"{output} is a later checkpoint, trained on from an output of `sparkling expand`{where}: "
        "`verify` proves only the output itself",
        hint=f"to look at this one: {command}"
        + ("" if made else ", where OUTPUT is what `sparkling expand` wrote"),
    )
