"""Parameters and bytes, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sparkling_cli.formats.model import OutputFile
from sparkling_cli.plan.model import Plan
from sparkling_cli.results.account import Kind
from sparkling_cli.storage.tensors import ITEM_BYTES


@dataclass(frozen=True)
class Totals:
    """What an expansion amounts to.

    Attributes:
        parameters_before: entries of all weights, tied ones counted once.
        parameters_after: the same after widening.
        bytes_before: tensor data of the source, optimizer state included.
        bytes_after: tensor data of the output, optimizer state included.
        bytes_to_write: size of all output files that are written anew.
        tensors: rows of the plan.
        widened: rows whose shape changes.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    bytes_to_write: int
    tensors: int
    widened: int


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    Attributes:
        parameters: entries of all weights, tied ones counted once.
        weight_bytes: tensor data of the weights.
        state_bytes: tensor data of the optimizer state.
    """

    parameters: int
    weight_bytes: int
    state_bytes: int


def content_of(plan: Plan, *, after: bool) -> Content:
    """Count a plan's source, or what it makes."""
    counted: set[str] = set()
    parameters = weights = states = 0
    for row in plan.rows:
        entries = prod(row.shape if after else row.recipe.before)
        if row.recipe.kind is not Kind.WEIGHT:
            states += entries * ITEM_BYTES[row.dtype]
            continue
        weights += entries * ITEM_BYTES[row.dtype]
        if row.stream not in counted:
            counted.add(row.stream)
            parameters += entries
    return Content(parameters, weights, states)


def totals_of(plan: Plan, files: tuple[OutputFile, ...]) -> Totals:
    """Count a plan."""
    before, after = content_of(plan, after=False), content_of(plan, after=True)
    return Totals(
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        bytes_before=before.weight_bytes + before.state_bytes,
        bytes_after=after.weight_bytes + after.state_bytes,
        bytes_to_write=sum(file.size for file in files),
        tensors=len(plan.rows),
        widened=sum(row.shape != row.recipe.before for row in plan.rows),
    )
