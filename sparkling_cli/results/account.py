"""The account: every tensor of every file of the source, and what becomes of it."""

from __future__ import annotations

from enum import Enum

from sparkling_cli.results.base import Result


class Kind(str, Enum):
    """What a tensor of a checkpoint is."""

    WEIGHT = "weight"
    COPY = "weight copy"
    """another copy of a weight: an average, a master copy, a second file; widened like it"""
    MOMENT = "moment"
    """parameter-shaped optimizer state: new entries start from zero (Eq. 24)"""
    FACTOR = "factor"
    """a factor of optimizer state: means of rows or of columns, or a preconditioner of one dim"""
    SCALAR = "scalar"
    """one number"""
    OTHER = "other"
    """nothing that grows: random states, tables, state of parameters that keep their size"""


class Fate(str, Enum):
    """What becomes of a tensor."""

    WIDENED = "widened"
    CARRIED = "carried"
    LEFT_OUT = "left out"


class AccountLine(Result):
    """Tensors of one kind that meet the same fate; bytes of their data before and after."""

    kind: Kind
    fate: Fate
    tensors: int
    bytes_before: int
    bytes_after: int


class AccountEntry(Result):
    """A tensor that is neither a weight nor state of a parameter."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    fate: Fate


class Account(Result):
    """Every tensor of the source.

    Attributes:
        lines: all of them, by kind and fate.
        entries: one by one, those that are neither weights nor state of parameters, scalars aside.
    """

    lines: tuple[AccountLine, ...] = ()
    entries: tuple[AccountEntry, ...] = ()

    @property
    def tensors(self) -> int:
        """Of the source, all files together; one under several names that share its bytes counts once."""
        return sum(line.tensors for line in self.lines)

    @property
    def bytes_before(self) -> int:
        """Of the source's tensors."""
        return sum(line.bytes_before for line in self.lines)

    @property
    def bytes_after(self) -> int:
        """Of the output's tensors that come from them."""
        return sum(line.bytes_after for line in self.lines)
