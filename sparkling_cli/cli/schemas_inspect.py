"""The JSON of ``sparkling inspect``: measurements and comparisons."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sparkling_cli.cli.documents import Data, Document


class TensorStat(Data):
    """RMS of all tensors of one role, layer and kind of state."""

    role: str
    layer: int | None
    slot: str
    tensors: int
    entries: int
    rms: float | None
    largest: float | None
    zeros: int
    nan: int
    inf: int


class Weights(Data):
    """Weights and optimizer state."""

    tensors: list[TensorStat]
    nonfinite: list[str]


class LayerStat(Data):
    """One linear layer in the forward passes (Eq. 1, 3)."""

    name: str
    x_rms: float | None
    y_rms: float | None
    calls: int
    r: float | None


class StreamStat(Data):
    """The residual stream at one place."""

    name: str
    rms: float | None


class Measurement(Data):
    """One model's forward passes."""

    layers: list[LayerStat]
    stream: list[StreamStat]
    logits_rms: float | None
    loss: float | None
    unused: list[str]


class ValueChange(Data):
    """One number before and after; ``deviation`` is \\|after / before - 1\\|."""

    name: str
    before: float | None
    after: float | None
    deviation: float | None


class LayerChange(ValueChange):
    """r = RMS(y)/RMS(x) of a linear layer before and after."""

    x_before: float | None
    x_after: float | None
    y_before: float | None
    y_after: float | None


class LogitsChange(Data):
    """How far the logits moved."""

    largest: float | None
    relative: float | None
    rms: float | None


class LossChange(Data):
    """Nats per token."""

    before: float | None
    after: float | None


class ActivationChange(Data):
    """Two models on the same tokens."""

    tokens: str
    random_tokens: bool
    count: int
    tolerance: float
    verdict: str
    offenders: list[str]
    layers: list[LayerChange]
    residual: list[ValueChange]
    logits: ValueChange
    logits_change: LogitsChange | None
    loss: LossChange
    only_before: list[str]
    only_after: list[str]


class SymmetryLayer(Data):
    """How far new channels have moved from their sources, in one layer."""

    layer: int | None
    axis: str
    channels: int
    cosine: float | None
    distance: float | None
    locked: float | None


class Symmetry(Data):
    """The same over all layers."""

    cosine: float | None
    distance: float | None
    locked: float | None
    layers: list[SymmetryLayer]


class Inspect(Document):
    """``sparkling inspect --json``."""

    schema_: Annotated[Literal["sparkling/inspect"], Field(alias="schema")]
    checkpoint: str
    against: str | None
    format: str
    parameters: int
    weights_bytes: int
    state_bytes: int
    dtypes: list[str]
    weight_tensors: int
    state_tensors: int
    step: int | None
    optimizer: str | None
    model_type: str | None
    notes: list[str]
    doubt: Annotated[
        str | None, Field(description="what stands against the comparison as a whole; null if nothing does")
    ]
    weights: Weights
    activations: Measurement | None
    tokens: str | None
    random_tokens: bool
    change: ActivationChange | None
    symmetry: Symmetry | None
