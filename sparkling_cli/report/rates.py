"""A re-warmup as facts of a report."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from sparkling_cli.results.expansion import LearningRate
from sparkling_cli.schedule.rewarmup import Rewarmup

#: Points of a learning-rate curve in the report; every step is in rewarmup.csv.
CURVE_POINTS = 240


def learning_rate_of(rewarmup: Rewarmup, window: tuple[int, int] | None = None) -> LearningRate:
    """The facts of a re-warmup: the curves at a selection of steps, corners included.

    Args:
        rewarmup: all stages; the last one is the report's.
        window: first and last step of the curves; the whole run by default.
    """
    stage, curve, baseline = rewarmup.stages[-1], rewarmup.curves[-1], rewarmup.baseline
    total = baseline.total_steps
    corners = {
        0,
        total,
        baseline.warmup_steps,
        *(int(step) for step in (baseline.fall[0], sum(baseline.fall)) if step < inf),
        *(s.expansion_step for s in rewarmup.stages),
        *(s.expansion_step + s.steps for s in rewarmup.stages),
    }
    first, last = window or (0, total)
    spread = thin(range(first, last + 1), CURVE_POINTS)
    steps = sorted({*spread, *(c for c in corners if first <= c <= last)})
    curves = [tuple(None if t < s.expansion_step else s.eta_new(t) for t in steps) for s in rewarmup.curves]
    return LearningRate(
        baseline=baseline.type,
        expansion_step=stage.expansion_step,
        total_steps=total,
        rho=stage.rho,
        rewarmup_steps=stage.steps,
        rate_at_expansion=curve.eta_e,
        peak_new=curve.peak,
        minimum=curve(total - stage.expansion_step),
        bias_correction=stage.bias_correction,
        steps=tuple(steps),
        old=tuple(baseline(t) for t in steps),
        new=curves[-1],
        earlier=tuple(curves[:-1]),
    )


def thin(values: Sequence[int], at_most: int) -> list[int]:
    """At most so many of the values, evenly spread, the first and the last among them."""
    if len(values) <= at_most:
        return list(values)
    last = len(values) - 1
    return [values[round(i * last / (at_most - 1))] for i in range(at_most)]
