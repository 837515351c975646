"""The expansion spec: every choice that a user can make, with the paper's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from sparkling_cli.spec.choices import (
    BaselineType,
    BiasCorrection,
    DecayShape,
    Init,
    LayerMode,
    LayerPlace,
    Names,
    OptimizerTreatment,
    Scaling,
    StateTreatment,
    VocabFill,
)

#: initialization pairs under which the function can be kept
KEEPING = ("copy-copy", "random-zero")
_TokenId = Annotated[int, Field(ge=0)]
#: a layer's number, or all layers that are not named
_Layer = Literal["all"] | Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)


class AxisSpec(_Strict):
    """One axis to widen, by a factor or to a size; by neither, to a multiple of ``multiple_of``."""

    axis: Annotated[str, Field(min_length=1, description="logical axis, e.g. ffn, hidden, heads")]
    factor: Annotated[float | None, Field(gt=1, description="new size / old size, above 1")] = None
    to: Annotated[int | None, Field(ge=2, description="new size, instead of a factor")] = None

    @model_validator(mode="after")
    def _one_of(self) -> AxisSpec:
        if self.factor is not None and self.to is not None:
            raise ValueError(f"axis {self.axis!r} needs either a factor or a size (to), both given")
        return self


class RewarmupSpec(_Strict):
    """Re-warmup of the new entries' learning rate (Eq. 27-28)."""

    rho: Annotated[float, Field(gt=0, description="peak of the new entries' rate / rate at expansion")] = 1.3
    steps: Annotated[int, Field(ge=0, description="re-warmup steps (tau_w)")] = 250
    bias_correction: Annotated[
        BiasCorrection,
        Field(description="fresh: new entries' first updates as if Adam's step counter started anew"),
    ] = "inherit"
    keep_step: Annotated[
        bool,
        Field(description="old entries step as far as before, where steps follow a shape (Muon) or a width"),
    ] = False


class BaselineSpec(_Strict):
    """The old entries' schedule, where it cannot be read from the trainer's files."""

    type: BaselineType | None = None
    peak: Annotated[float | None, Field(gt=0, description="maximum learning rate")] = None
    minimum: Annotated[float | None, Field(ge=0, description="final learning rate")] = None
    initial: Annotated[float | None, Field(ge=0, description="learning rate at step 0")] = None
    warmup_steps: Annotated[int | None, Field(ge=0)] = None
    decay_steps: Annotated[int | None, Field(ge=0, description="length of the decay of wsd")] = None
    decay: Annotated[DecayShape | None, Field(description="shape of that decay; default: cosine")] = None
    total_steps: Annotated[int | None, Field(ge=1)] = None
    expansion_step: Annotated[int | None, Field(ge=0)] = None


def _listed(axes: Any) -> Any:
    """``{"ffn": 2}``, axis -> factor, as a list of axes."""
    if isinstance(axes, Mapping):
        return [{"axis": name, "factor": factor} for name, factor in axes.items()]
    return axes


class ExpansionSpec(_Strict):
    """A whole expansion. Defaults are the paper's choices."""

    axes: Annotated[
        tuple[AxisSpec, ...],
        BeforeValidator(_listed, json_schema_input_type=tuple[AxisSpec, ...] | dict[str, float]),
        Field(min_length=1, description="axes to widen, jointly; or axis -> factor"),
    ]
    multiple_of: Annotated[
        int | None,
        Field(ge=1, description="round each axis that is not given by its size up to a multiple of this"),
    ] = None
    init: Annotated[
        Init,
        Field(
            description="fan-out - fan-in initialization of new entries; auto: what was ahead in our "
            "measurements (docs/evidence.md)"
        ),
    ] = "copy-copy"
    scaling: Annotated[
        Scaling,
        Field(
            description="rms: keep RMS (Eq. 14-17); calibrated: and fit it per layer on tokens; function: "
            "Net2Net's 1/multiplicity, or 1 where new columns are zero; none"
        ),
    ] = "rms"
    optimizer: Annotated[OptimizerTreatment, Field(description="what becomes of optimizer state")] = (
        "asymmetric"
    )
    rewarmup: RewarmupSpec = RewarmupSpec()
    baseline: BaselineSpec = BaselineSpec()
    seed: Annotated[int, Field(ge=0, lt=2**63, description="of random fills")] = 0
    names: Annotated[
        Names,
        Field(description="weight names in the output, for classes whose names differ on disk"),
    ] = "auto"
    allow_locked: Annotated[
        bool, Field(description="go on where copies would stay equal to their sources for ever")
    ] = False
    carry: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
        Field(description="patterns of tensors that stay as they are although their shape is one that grows"),
    ] = ()
    state: Annotated[
        dict[str, StateTreatment],
        Field(description="state name -> weight (widened like it), moment or carry (stays as it is)"),
    ] = {}
    vocab_fill: Annotated[
        VocabFill, Field(description="new rows of embedding and head: the mean of all old ones, random, zero")
    ] = "mean"
    vocab_from: Annotated[
        dict[_TokenId, Annotated[tuple[_TokenId, ...], Field(min_length=1)]],
        Field(description="new token id -> old ids whose mean its rows are; all others get the mean of all"),
    ] = {}
    copies: Annotated[
        dict[_Layer, Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]],
        Field(
            description="layer's number, or all -> how many there shall be of each expert, itself included; "
            "default: equally many"
        ),
    ] = {}
    expert_load: Annotated[
        dict[_Layer, Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]],
        Field(
            description="the same by load: layer's number, or all -> what each expert has to do, e.g. tokens"
        ),
    ] = {}
    router_noise: Annotated[
        float,
        Field(
            ge=0, lt=1, description="noise on new experts' router rows / standard deviation of the old rows"
        ),
    ] = 0.0
    layer_mode: Annotated[
        LayerMode,
        Field(
            description="new layers: identity adds nothing yet; interleave copies each layer behind itself, "
            "stack all layers behind the last"
        ),
    ] = "identity"
    at: Annotated[
        LayerPlace | tuple[Annotated[int, Field(ge=0)], ...],
        Field(description="where identity layers go: even, end, or behind which layers (the first is 0)"),
    ] = "even"
    allow_nonfinite: Annotated[bool, Field(description="go on where weights or state hold NaN or Inf")] = (
        False
    )

    @field_validator("at", mode="before")
    @classmethod
    def _places(cls, given: Any) -> Any:
        """Layers in one text (``3,7,11``), as on the command line, as a list."""
        if not isinstance(given, str) or given in get_args(LayerPlace):
            return given
        parts = [part.strip() for part in given.split(",")]
        if not all(part.isdigit() for part in parts):
            raise ValueError(f"expected even, end, or layers such as 3,7,11; found {given!r}")
        return [int(part) for part in parts]

    @model_validator(mode="after")
    def _sound(self) -> ExpansionSpec:
        names = [axis.axis for axis in self.axes]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"axis {repeated[0]!r} is given more than once: give it once")
        bare = [axis.axis for axis in self.axes if axis.factor is None and axis.to is None]
        if bare and self.multiple_of is None:
            raise ValueError(f"axis {bare[0]!r} needs either a factor or a size (to), neither given")
        if bare and any(axis.to is not None for axis in self.axes):
            raise ValueError(f"axis {bare[0]!r} needs a size (to) of its own, as another axis has one")
        if self.vocab_from and self.vocab_fill != "mean":
            raise ValueError(f"vocab_from gives means: it does not go with vocab_fill {self.vocab_fill!r}")
        if self.copies and self.expert_load:
            raise ValueError(
                "copies and expert_load both say how many there shall be of each expert: give one"
            )
        idle = next((key for key, load in self.expert_load.items() if not any(load)), None)
        if idle is not None:
            raise ValueError(f"expert_load.{idle}: no expert has any load, so nothing follows from it")
        if self.at != "even" and self.layer_mode != "identity":
            raise ValueError(
                f"at places identity layers: layer_mode {self.layer_mode!r} has places of its own"
            )
        if self.at == ():
            raise ValueError("at: name at least one layer, or even, or end")
        if self.scaling == "function" and self.init not in (*KEEPING, "auto"):
            raise ValueError(
                f"scaling 'function' needs init {' or '.join(map(repr, KEEPING))}, found {self.init!r}: "
                "copies of both sides keep it, or new columns of zeros"
            )
        return self

    def as_data(self) -> dict[str, Any]:
        """The spec as plain JSON data, defaults included."""
        return self.model_dump(mode="json")
