"""What all results share."""

from __future__ import annotations

from math import inf, isfinite
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def finite(value: Any) -> Any:
    """The value; None for a float that is not finite, as JSON has none."""
    return None if isinstance(value, float) and not isfinite(value) else value


#: A measured number; None where it is not finite.
Number = Annotated[float | None, BeforeValidator(finite)]

Level = Literal["good", "note", "attention"]


class Result(BaseModel):
    """A part of a result, or a whole one."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def deviation_of(before: float | None, after: float | None) -> float | None:
    """The value of after / before - 1; None where one is not finite or ``before`` is zero."""
    before, after = finite(before), finite(after)
    if before == after:
        return 0.0
    if before is None or after is None or before == 0:
        return None
    return after / before - 1


class Change(Result):
    """A measured number before and after."""

    before: Number
    after: Number
    deviation: Annotated[Number, Field(description="after / before - 1; null: not finite")]

    @property
    def moved(self) -> float:
        """How far it moved, as a share; infinite where it is not finite any more."""
        return inf if self.deviation is None else abs(self.deviation)


def change(before: float | None, after: float | None) -> Change:
    """A number before and after, with its deviation."""
    return Change(before=before, after=after, deviation=deviation_of(before, after))


class Count(Result):
    """A count before and after."""

    before: int
    after: int


class Finding(Result):
    """One sentence of a verdict."""

    level: Level
    text: str


class Verdict(Result):
    """What the facts mean, in plain words."""

    level: Level
    headline: str
    findings: tuple[Finding, ...]
