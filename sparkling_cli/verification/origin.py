"""What is said when an output holds, but does not come from the checkpoint that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparkling_cli.errors import VerificationError
from sparkling_cli.manifest import Manifest

_SHOWN = 8


def listed(faults: Sequence[str]) -> str:
    """The first faults, one a line, and how many more there are."""
    shown = "\n  ".join(faults[:_SHOWN])
    return shown + (f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else "")


def other_source(source: Path, output: Path, manifest: Manifest, faults: Sequence[str]) -> VerificationError:
    """The error for a source that is not the one that was widened; it puts no blame on the output."""
    made, given = manifest.source.name, source.resolve().name
    if made != given:
        names = f"this output was made from {made}, you gave {given}"
        hint = f"give the {made} that was widened; nothing is known to be wrong with the output"
    else:
        names = f"{given} was changed since, or is another checkpoint of this name"
        hint = (
            "give the checkpoint as it was when it was widened; nothing is known to be wrong with the output"
        )
    return VerificationError(
        f"{source} is not what {output} was made from: {names}\n  {listed(faults)}", hint=hint
    )
