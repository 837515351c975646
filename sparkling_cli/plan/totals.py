"""Parameters and bytes, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sparkling_cli.checkpoint.model import ITEM_BYTES, OutputFile
from sparkling_cli.plan.model import Plan


@dataclass(frozen=True)
class Totals:
    """What an expansion amounts to.

    Attributes:
        parameters_before: entries of all weights, tied ones counted once.
        parameters_after: the same after widening.
        bytes_before: tensor data of the source, optimizer state included.
        bytes_after: size of all output files that are written anew.
        tensors: rows of the plan.
        widened: rows whose shape changes.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    tensors: int
    widened: int


def totals_of(plan: Plan, files: tuple[OutputFile, ...]) -> Totals:
    """Count a plan."""
    before = after = bytes_before = widened = 0
    counted: set[str] = set()
    for row in plan.rows:
        bytes_before += prod(row.source.shape) * ITEM_BYTES[row.dtype]
        widened += row.shape != row.source.shape
        if row.slot or row.stream in counted:
            continue
        counted.add(row.stream)
        before += prod(row.source.shape)
        after += prod(row.shape)
    return Totals(before, after, bytes_before, sum(file.size for file in files), len(plan.rows), widened)
