"""Bytes and tensors, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sparkling_cli.formats.model import OutputFile
from sparkling_cli.plan.model import Plan
from sparkling_cli.storage.tensors import ITEM_BYTES


@dataclass(frozen=True)
class Totals:
    """What an expansion amounts to.

    Attributes:
        bytes_before: tensor data of the source, optimizer state included.
        bytes_after: tensor data of the output, optimizer state included.
        bytes_to_write: size of all output files that are written anew.
        tensors: rows of the plan.
        widened: rows whose shape changes.
    """

    bytes_before: int
    bytes_after: int
    bytes_to_write: int
    tensors: int
    widened: int


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Attributes:
        weight_bytes: tensor data of the weights.
        state_bytes: tensor data of the optimizer state.
    """

    weight_bytes: int
    state_bytes: int


def content_of(plan: Plan, *, after: bool) -> Content:
    """Count a plan's source, or what it makes."""
    weights = states = 0
    for row in plan.rows:
        size = prod(row.shape if after else row.recipe.before) * ITEM_BYTES[row.dtype]
        if row.slot:
            states += size
        else:
            weights += size
    return Content(weights, states)


def totals_of(plan: Plan, files: tuple[OutputFile, ...]) -> Totals:
    """Count a plan."""
    before, after = content_of(plan, after=False), content_of(plan, after=True)
    return Totals(
        bytes_before=before.weight_bytes + before.state_bytes,
        bytes_after=after.weight_bytes + after.state_bytes,
        bytes_to_write=sum(file.size for file in files),
        tensors=len(plan.rows),
        widened=sum(row.shape != row.recipe.before for row in plan.rows),
    )
