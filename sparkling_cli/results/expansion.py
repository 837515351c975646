"""``sparkling expand``: the report of what was done.

Nothing in a report depends on when or where the expansion ran, so equal expansions give equal bytes.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from sparkling_cli.errors import CheckpointError
from sparkling_cli.results.account import Account
from sparkling_cli.results.base import Result, Verdict
from sparkling_cli.results.measured import Activations
from sparkling_cli.results.plan import Fill


class AxisChange(Result):
    """One axis that grew."""

    axis: str
    before: Annotated[int, Field(ge=1, description="entries before this expansion")]
    after: Annotated[int, Field(ge=1, description="entries after it")]
    original: Annotated[int, Field(ge=1, description="entries before the first expansion of all")]

    @property
    def factor(self) -> float:
        """After / before."""
        return self.after / self.before


class TensorChange(Result):
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
    fill: Annotated[tuple[Fill, ...], Field(description="how new entries were filled")]
    count: Annotated[int, Field(ge=1, description="tensors of this kind")]


class Size(Result):
    """How large a model and its checkpoint are."""

    parameters: int
    active: Annotated[int | None, Field(description="parameters that work on one token; null if unknown")]
    embedding: Annotated[int, Field(description="parameters by vocabulary entry, a tied head once")]
    weight_bytes: int
    state_bytes: int


class LearningRate(Result):
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


class StateSlot(Result):
    """One kind of optimizer state over all parameters."""

    slot: Annotated[str, Field(description="e.g. exp_avg")]
    tensors: int
    entries: Annotated[int, Field(description="after the expansion")]
    kept: Annotated[int, Field(description="entries whose value comes from the source")]
    bytes: int


class OptimizerSummary(Result):
    """What became of the optimizer's state."""

    treatment: Annotated[str, Field(description="asymmetric, asymmetric-scaled, copy or drop")]
    name: str | None
    slots: tuple[StateSlot, ...]
    beta2: float | None


class Compute(Result):
    """Training compute of the whole run against the wide model from scratch, same steps."""

    expansion_step: int
    total_steps: int
    saved: Annotated[float, Field(description="share of the from-scratch compute that is not spent")]


class Provenance(Result):
    """Where the output comes from."""

    tool: str
    version: str
    source: Annotated[str, Field(description="name of the source, without its path")]
    format: str
    tensors: int
    source_digest: Annotated[str, Field(description="CRC-32 over the CRC-32s of all source tensors")]
    stages: Annotated[tuple[str, ...], Field(description="one line per expansion, the oldest first")]


class Report(Result):
    """Everything that a report says. ``format_version`` rises when a field changes its meaning or goes."""

    format_version: Literal[2] = 2
    source: str
    destination: str
    model: Annotated[str, Field(description="the model's class or the layout's name")]
    command: Annotated[str, Field(description="the command that does the same again")]
    spec: dict[str, Any]
    axes: tuple[AxisChange, ...]
    tensors: tuple[TensorChange, ...]
    account: Annotated[Account, Field(description="every tensor of the source, and what became of it")]
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

    def __repr__(self) -> str:
        return f"Report({self.source} to {self.destination}: {self.verdict.headline})"

    @classmethod
    def read(cls, content: bytes, where: str) -> Report:
        """The inverse of :meth:`to_json`.

        Raises:
            CheckpointError: it is of another version, or damaged.
        """
        try:
            data = json.loads(content)
            version = data.get("format_version")
            if version == 2:
                return cls.model_validate(data)
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{where} is damaged: {str(error).splitlines()[0]}") from None
        raise CheckpointError(
            f"{where} has format_version {version!r}; this version reads 2",
            hint="make the output again with this version: its `command` is in that file",
        )

    def to_json(self) -> bytes:
        """``report.json``: stable order, no NaN, a newline at the end."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False, ensure_ascii=False)
        return (text + "\n").encode(errors="replace")  # file names may be no text
