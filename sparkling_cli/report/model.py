"""The facts of a report. ``report.json`` is this model as JSON; ``report.html`` shows the same facts.

Nothing here depends on when or where the expansion ran, so equal expansions give equal bytes.
"""

from __future__ import annotations

import json
from math import inf
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

#: r of Eq. 3 may move by this share before a layer is named.
DEVIATION_LIMIT = 0.10

Level = Literal["good", "note", "attention"]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AxisChange(_Facts):
    """One axis that grew."""

    axis: str
    before: Annotated[int, Field(ge=1, description="entries before this expansion")]
    after: Annotated[int, Field(ge=1, description="entries after it")]
    original: Annotated[int, Field(ge=1, description="entries before the first expansion of all")]

    @property
    def factor(self) -> float:
        """After / before."""
        return self.after / self.before


class TensorChange(_Facts):
    """All tensors that one pattern of the layout stands for, where any of their axes grew."""

    name: Annotated[str, Field(description="name template, e.g. layers.{layers}.mlp.up_proj.weight")]
    layout: Annotated[str, Field(description="in the layout language")]
    before: tuple[int, ...]
    after: tuple[int, ...]
    new_dims: Annotated[tuple[int, ...], Field(description="dims along which new entries lie")]
    role: Annotated[
        Literal["fan-out", "fan-in", "both", "elementwise"], Field(description="side of the grown axes")
    ]
    scale: Annotated[
        tuple[float, float], Field(description="smallest and largest factor on old and copied entries")
    ]
    fill: Annotated[tuple[str, ...], Field(description="how new entries were filled: copy, random, zero")]
    count: Annotated[int, Field(ge=1, description="tensors of this kind")]


class Size(_Facts):
    """How large a model and its checkpoint are."""

    parameters: int
    active: Annotated[int | None, Field(description="parameters that work on one token; null if unknown")]
    weight_bytes: int
    state_bytes: int


class LayerActivation(_Facts):
    """One linear layer on the same tokens before and after."""

    name: str
    role: Annotated[str, Field(description="last part of the module's name, e.g. up_proj")]
    layer: Annotated[int | None, Field(description="index of its block; null outside of blocks")]
    widened: bool
    x_before: Annotated[float | None, Field(description="RMS of the input (Eq. 1); null: not finite")]
    x_after: float | None
    y_before: Annotated[float | None, Field(description="RMS of the output")]
    y_after: float | None
    r_before: Annotated[float | None, Field(description="RMS(y)/RMS(x) (Eq. 3)")]
    r_after: float | None
    deviation: Annotated[float | None, Field(description="r_after / r_before - 1; null: not finite")]

    @property
    def moved(self) -> float:
        """How far r moved, as a share; infinite where it is not finite any more."""
        return inf if self.deviation is None else abs(self.deviation)


class ResidualPoint(_Facts):
    """RMS of the residual stream behind one block."""

    layer: int
    before: float | None
    after: float | None


class Activations(_Facts):
    """Activation RMS, loss and logits on the same tokens before and after."""

    data: Annotated[str, Field(description="what was measured on, in words")]
    random_tokens: Annotated[bool, Field(description="true: random tokens, the loss means little")]
    tokens: int
    layers: tuple[LayerActivation, ...]
    residual: tuple[ResidualPoint, ...]
    loss_before: float | None
    loss_after: float | None
    logit_change: Annotated[
        float | None, Field(description="RMS of the logits' change / RMS of the logits before")
    ]

    def worst(self, limit: int) -> list[LayerActivation]:
        """Layers by how far r moved, the farthest first; of equal ones the widened first."""
        return sorted(self.layers, key=lambda entry: (-entry.moved, not entry.widened))[:limit]

    @property
    def offenders(self) -> list[LayerActivation]:
        """Layers whose r moved by more than the limit, the farthest first."""
        return [e for e in self.worst(len(self.layers)) if e.moved > DEVIATION_LIMIT]


class LearningRate(_Facts):
    """Learning rates of old and new entries (Eq. 25-28)."""

    baseline: Annotated[str, Field(description="cosine, linear, constant or wsd")]
    expansion_step: int
    total_steps: int
    rho: float
    rewarmup_steps: int
    rate_at_expansion: float
    peak_new: float
    minimum: float
    bias_correction: str
    steps: Annotated[tuple[int, ...], Field(description="steps of the curve, a selection")]
    old: tuple[float, ...]
    new: Annotated[tuple[float | None, ...], Field(description="null before the expansion")]
    earlier: Annotated[
        tuple[tuple[float | None, ...], ...],
        Field(description="the same for the entries of every earlier expansion, the oldest first"),
    ] = ()


class StateSlot(_Facts):
    """One kind of optimizer state over all parameters."""

    slot: Annotated[str, Field(description="e.g. exp_avg")]
    tensors: int
    entries: Annotated[int, Field(description="after the expansion")]
    kept: Annotated[int, Field(description="entries whose value comes from the source")]
    bytes: int


class OptimizerSummary(_Facts):
    """What became of the optimizer's state."""

    treatment: Annotated[str, Field(description="asymmetric, asymmetric-scaled, copy or drop")]
    name: str | None
    slots: tuple[StateSlot, ...]
    beta2: float | None


class Compute(_Facts):
    """Training compute of the whole run against the wide model from scratch, same steps."""

    expansion_step: int
    total_steps: int
    saved: Annotated[float, Field(description="share of the from-scratch compute that is not spent")]


class Provenance(_Facts):
    """Where the output comes from."""

    tool: str
    version: str
    source: Annotated[str, Field(description="name of the source, without its path")]
    format: str
    tensors: int
    source_digest: Annotated[str, Field(description="CRC-32 over the CRC-32s of all source tensors")]
    stages: Annotated[tuple[str, ...], Field(description="one line per expansion, the oldest first")]


class Finding(_Facts):
    """One sentence of the verdict."""

    level: Level
    text: str


class Verdict(_Facts):
    """What the facts mean, in plain words."""

    level: Level
    headline: str
    findings: tuple[Finding, ...]


class ReportData(_Facts):
    """Everything that a report says. ``format_version`` rises when a field changes its meaning or goes."""

    format_version: Literal[1] = 1
    source: str
    destination: str
    model: Annotated[str, Field(description="the model's class or the layout's name")]
    command: Annotated[str, Field(description="the command that does the same again")]
    spec: dict[str, Any]
    axes: tuple[AxisChange, ...]
    tensors: tuple[TensorChange, ...]
    before: Size
    after: Size
    activations: Activations | None
    activations_missing: Annotated[str, Field(description="why activations is null")] = ""
    learning_rate: LearningRate | None
    learning_rate_missing: Annotated[str, Field(description="why learning_rate is null")] = ""
    optimizer: OptimizerSummary | None
    compute: Compute | None
    provenance: Provenance
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    verdict: Verdict

    def to_json(self) -> bytes:
        """``report.json``: stable order, no NaN, a newline at the end."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False, ensure_ascii=False)
        return (text + "\n").encode(errors="replace")  # file names may be no text
