"""What all results share."""

from __future__ import annotations

from math import inf, isfinite
from textwrap import shorten
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sparkling_cli.errors import MissingDependencyError


def finite(value: Any) -> Any:
    """The value; None for a float that is not finite, as JSON has none."""
    return None if isinstance(value, float) and not isfinite(value) else value


#: A measured number; None where it is not finite.
Number = Annotated[float | None, BeforeValidator(finite)]

Level = Literal["good", "note", "attention"]


class Result(BaseModel):
    """A part of a result, or a whole one."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    def __repr__(self) -> str:
        """Its plain values, and how many there are of what it holds several of."""
        words = []
        for name, value in self:
            if isinstance(value, (tuple, list, dict)):
                words += [f"{len(value)} {name}"] if value else []
            elif isinstance(value, str):
                words.append(f"{name}={shorten(value, 60, placeholder=' ...')!r}")
            elif isinstance(value, (int, float)):
                words.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(words)})"

    def __str__(self) -> str:
        return repr(self)

    def to_dict(self) -> dict[str, Any]:
        """The same facts as plain data, as JSON has them."""
        return self.model_dump(mode="json")


class Rows(Result):
    """A result that is a table: its rows are the first of its fields that holds several of something."""

    def to_pandas(self, field: str = "") -> Any:
        """The rows as a ``pandas.DataFrame``, a column for each of their numbers and names.

        Args:
            field: that holds other rows (``functions`` of activations).

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise MissingDependencyError(
                "a table for pandas needs pandas, which is not installed", hint="pip install pandas"
            ) from None
        rows = getattr(self, field) if field else next(value for _, value in self if isinstance(value, tuple))
        return pandas.DataFrame([row.to_dict() for row in rows])


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
    deviation: Annotated[Number, Field(description="after / before - 1; null: not finite, or 0 before")]

    @property
    def moved(self) -> float:
        """How far it moved, as a share; infinite where it was zero, or is not finite any more."""
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

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"- {finding.text}" for finding in self.findings)])
