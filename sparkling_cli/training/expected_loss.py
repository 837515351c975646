"""The loss that a run would have had, had it gone on as it was before an expansion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import fsum, isfinite, log, sqrt
from statistics import linear_regression
from typing import Any

#: logged losses that a forecast is made from, at least
FEWEST = 8


@dataclass(frozen=True)
class LossForecast:
    """A line in the logarithm of the step, fitted to the last half of the run before the expansion.

    While a rate is constant, losses fall about so; as it decays they fall faster, and a run that is above the
    line has lost something. It is a yardstick of ours, not of the paper.

    Attributes:
        level: loss at step 1, as the line has it.
        slope: by which it changes while the step grows by a factor of e.
        spread: standard deviation of the logged losses about the line.
        first: step that the fit begins with.
        last: step of the expansion.
    """

    level: float
    slope: float
    spread: float
    first: int
    last: int

    @classmethod
    def of(cls, losses: Iterable[tuple[int, float]], expansion: int) -> LossForecast | None:
        """From (step, loss) of a log; None where it has too few before the expansion."""
        points = [(s, loss) for s, loss in losses if s <= expansion <= 2 * s and s > 0 and isfinite(loss)]
        if len(points) < FEWEST or len({step for step, _ in points}) < 2:
            return None
        xs, ys = [log(step) for step, _ in points], [loss for _, loss in points]
        slope, level = linear_regression(xs, ys)
        rest = fsum((b - level - slope * a) ** 2 for a, b in zip(xs, ys, strict=True))
        return cls(level, slope, sqrt(rest / (len(points) - 2)), points[0][0], expansion)

    def at(self, step: float) -> float:
        """Loss at a step."""
        return self.level + self.slope * log(step)


def losses(log_history: Iterable[Any]) -> list[tuple[int, float]]:
    """(step, loss) of the Trainer's log: of its training, not of evaluations."""
    return [
        (entry["step"], float(entry["loss"]))
        for entry in log_history
        if isinstance(entry, Mapping)
        and type(entry.get("step")) is int
        and isinstance(entry.get("loss"), (int, float))
    ]
