"""The plan's types. A plan is made from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.layout.model import ModelLayout, TensorPattern
from sparkling_cli.storage.tensors import StoredTensor
from sparkling_cli.widening.geometry import Growth, View


class Row(NamedTuple):
    """What happens to one tensor.

    The source is read as ``view`` (its dims split at flattened factors); entry by entry the target is
    ``scale * run_scales * source + offset``, in float32 (float64 for float64), rounded once to
    ``dtype``; new entries whose fill is zero are 0, random ones are ``std * N(0, 1)`` with the
    source tensor's standard deviation times the fan-in scale of their columns.

    Attributes:
        key: key of the output tensor.
        name: weight name in the output, or the parameter's module name for state.
        slot: "" for a weight, else the state's name (``exp_avg``).
        source: where the source's bytes are.
        dtype: of source and target.
        shape: of the target.
        view: sizes and runs, per view dim.
        scale: factor on all entries (compensations).
        offset: see :class:`~sparkling_cli.layout.model.Compensation`; already folded: added after scale.
        zero: the whole tensor becomes zero (dropped state).
        stream: name of the random stream (the parameter's name): the same on disk and in state.
        pattern: of the layout, that stands for a weight; None for state.
    """

    key: str
    name: str
    slot: str
    source: StoredTensor
    dtype: str
    shape: tuple[int, ...]
    view: View
    scale: float = 1.0
    offset: float = 0.0
    zero: bool = False
    stream: str = ""
    pattern: TensorPattern | None = None


@dataclass(frozen=True)
class Plan:
    """A whole widening, ready to be executed, printed or compared.

    Attributes:
        source: the opened checkpoint.
        layout: the model's layout.
        spec: the resolved spec as plain data (for the manifest).
        growth: axis -> sizes before and after, axes that grow only.
        rows: every output tensor, in the output's order.
        config: config key -> new value.
        scalars: state scalars to overwrite.
        seed: of random fills.
        notes: what the user should know; warnings: what the user should act on.
    """

    source: Checkpoint
    layout: ModelLayout
    spec: Mapping[str, Any]
    growth: Mapping[str, Growth]
    rows: tuple[Row, ...]
    config: Mapping[str, Any]
    scalars: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
