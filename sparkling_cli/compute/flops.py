"""Training compute: ``C = 6 N D`` (Eq. 29), from scratch and progressive.

N is the number of active parameters, D the number of tokens. A progressive run pays for the small
model until the expansion and for the wide one after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sparkling_cli.compute.shape import ModelShape, ParameterCount
from sparkling_cli.errors import SpecError
from sparkling_cli.results.numbers import count
from sparkling_cli.widening.geometry import Growth


def train_flops(active: int, tokens: int) -> int:
    """``6 N D`` (Eq. 29): FLOPs of forward and backward over all tokens."""
    return 6 * active * tokens


@dataclass(frozen=True)
class Phase:
    """One part of a run, between two expansions.

    Attributes:
        start: tokens seen before it.
        stop: tokens seen after it.
        sizes: axis -> entries, of axes that grow anywhere in the run.
        parameters: of the model in this phase.
    """

    start: int
    stop: int
    sizes: Mapping[str, int]
    parameters: ParameterCount

    @property
    def flops(self) -> int:
        """FLOPs of this phase."""
        return train_flops(self.parameters.active, self.stop - self.start)


@dataclass(frozen=True)
class Saving:
    """Compute of a progressive run against the widest model from scratch, same tokens."""

    progressive: float
    scratch: float

    @property
    def saved(self) -> float:
        """Share of the from-scratch compute that is not spent."""
        return 1.0 - self.progressive / self.scratch


@dataclass(frozen=True)
class ComputePlan:
    """A run with zero or more expansions; the first phase is the smallest model."""

    tokens: int
    phases: tuple[Phase, ...]

    @property
    def flops_small(self) -> int:
        """The smallest model on all tokens."""
        return train_flops(self.phases[0].parameters.active, self.tokens)

    @property
    def flops_scratch(self) -> int:
        """The widest model on all tokens."""
        return train_flops(self.phases[-1].parameters.active, self.tokens)

    @property
    def flops_progressive(self) -> int:
        """All phases."""
        return sum(phase.flops for phase in self.phases)

    @property
    def saved(self) -> float:
        """Share of the from-scratch compute that is not spent."""
        return Saving(self.flops_progressive, self.flops_scratch).saved


def plan_compute(
    shape: ModelShape, expansions: Sequence[tuple[int, Mapping[str, Growth]]], tokens: int
) -> ComputePlan:
    """Compute of a run that widens at the given moments.

    Args:
        shape: the model at the start.
        expansions: (tokens seen at the expansion, axes that grow), in order.
        tokens: length of the whole run.

    Raises:
        SpecError: moments that are not in order or not inside the run; an axis that does not fit.
    """
    moments = [0, *(at for at, _ in expansions), tokens]
    for before, after in pairwise(moments):
        if after <= before:
            raise SpecError(
                f"expansions must lie inside the run and in order: {count(after)} tokens does "
                f"not come after {count(before)}",
                hint="give --expand-at below --tokens, and each --then later than the one before it",
            )
    shown = [axis for _, growth in expansions for axis in growth]
    phases = []
    for i, (start, stop) in enumerate(pairwise(moments)):
        if i:
            shape = _widened(shape, expansions[i - 1][1])
        sizes = {axis: shape.sizes[axis] for axis in dict.fromkeys(shown)}
        phases.append(Phase(start, stop, sizes, shape.count()))
    return ComputePlan(tokens, tuple(phases))


def _widened(shape: ModelShape, growth: Mapping[str, Growth]) -> ModelShape:
    for axis, grown in growth.items():
        if shape.sizes.get(axis) != grown.source:
            raise SpecError(f"axis {axis!r} has {shape.sizes.get(axis)} entries, not {grown.source}")
    return shape.grown(growth)


def step_saving(before: int, after: int, expansion_step: int, total_steps: int) -> Saving:
    """The same by steps of equal batch, where the number of tokens is not known.

    Args:
        before: active parameters before the expansion.
        after: active parameters after it.
        expansion_step: optimizer steps before the expansion.
        total_steps: optimizer steps of the whole run.
    """
    spent = before * expansion_step + after * (total_steps - expansion_step)
    return Saving(float(spent), float(after * total_steps))
