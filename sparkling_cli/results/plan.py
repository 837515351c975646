"""``sparkling expand --dry-run``: what will be done."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sparkling_cli.results.account import Account
from sparkling_cli.results.base import Count, Result

Fill = Literal["copy", "noisy", "mean", "random", "zero", "average", "diagonal", "unit"]


class Bytes(Result):
    """Sizes in bytes."""

    before: Annotated[int, Field(description="tensor data of the source, optimizer state included")]
    after: Annotated[int, Field(description="tensor data of the output, optimizer state included")]
    to_write: Annotated[int, Field(description="all files with tensors in them, headers and config included")]
    free: Annotated[int, Field(description="on the disk that the output would lie on")]


class TensorKind(Result):
    """Tensors that differ only in their indices."""

    name: Annotated[str, Field(description="with * for indices")]
    slot: Annotated[str, Field(description="empty for weights, else the optimizer state's name")]
    count: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    dtype: str
    scale: Annotated[tuple[float, float], Field(description="smallest, largest factor")]
    fill: tuple[Fill, ...]
    zero: Annotated[bool, Field(description="the whole tensor becomes zero")]


class ExpansionPlan(Result):
    """What an expansion does, before a byte is written."""

    dry_run: Literal[True] = True
    source: str
    destination: str
    format: str
    model: str
    axes: dict[str, Count]
    parameters: Count
    active_parameters: Count | None
    embedding_parameters: Annotated[Count, Field(description="those by vocabulary entry, a tied head once")]
    bytes: Bytes
    tensors: int
    widened: int
    config: Annotated[dict[str, Any], Field(description="config keys whose value changes")]
    kinds: tuple[TensorKind, ...]
    account: Annotated[Account, Field(description="every tensor of the source, and what becomes of it")]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    spec: dict[str, Any]
