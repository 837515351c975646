"""Training compute: ``C = 6 N D`` (Eq. 29), from scratch and progressive.

N is the number of active parameters, D the number of tokens. A progressive run pays for the small
model until the expansion and for the wide one after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from sparkling_cli.compute.shape import ModelShape
from sparkling_cli.errors import SpecError
from sparkling_cli.results.numbers import count
from sparkling_cli.widening.geometry import Growth

if TYPE_CHECKING:
    from sparkling_cli.results.commands import Flops, Phase


def train_flops(active: int, tokens: int) -> int:
    """``6 N D`` (Eq. 29): FLOPs of forward and backward over all tokens."""
    return 6 * active * tokens


def plan_compute(
    shape: ModelShape,
    expansions: Sequence[tuple[int, Mapping[str, Growth]]],
    tokens: int,
    *,
    bytes_per_parameter: float = 0.0,
) -> tuple[Phase, ...]:
    """The phases of a run that widens at the given moments; the first is of the smallest model.

    Args:
        shape: the model at the start.
        expansions: (tokens seen at the expansion, axes that grow), in order.
        tokens: length of the whole run.
        bytes_per_parameter: of its checkpoints.

    Raises:
        SpecError: moments that are not in order or not inside the run.
    """
    from sparkling_cli.results.commands import Phase

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
            shape = shape.grown(expansions[i - 1][1])
        found = shape.count()
        phases.append(
            Phase(
                start_tokens=start,
                stop_tokens=stop,
                sizes={axis: shape.layout.sizes[axis] for axis in dict.fromkeys(shown)},
                parameters=found.total,
                active_parameters=found.active,
                embedding_parameters=found.embedding,
                flops=train_flops(found.active, stop - start),
                checkpoint_bytes=round(found.total * bytes_per_parameter),
            )
        )
    return tuple(phases)


def run_flops(phases: Sequence[Phase]) -> Flops:
    """Compute of the run, and of its smallest and its widest model on all its tokens."""
    from sparkling_cli.results.commands import Flops

    tokens = phases[-1].stop_tokens
    return Flops(
        small=train_flops(phases[0].active_parameters, tokens),
        scratch=train_flops(phases[-1].active_parameters, tokens),
        progressive=sum(phase.flops for phase in phases),
    )


def share_saved(progressive: float, scratch: float) -> float:
    """Share of the compute of the widest model from scratch that a progressive run does not spend."""
    return 1.0 - progressive / scratch


def step_saving(before: int, after: int, expansion_step: int, total_steps: int) -> float:
    """The same by steps of equal batch, where the number of tokens is not known.

    Args:
        before: active parameters before the expansion.
        after: active parameters after it.
        expansion_step: optimizer steps before the expansion.
        total_steps: optimizer steps of the whole run.
    """
    spent = before * expansion_step + after * (total_steps - expansion_step)
    return share_saved(float(spent), float(after * total_steps))
