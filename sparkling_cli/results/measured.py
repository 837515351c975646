"""Measurements of checkpoints: ``sparkling inspect``, and the activations in a report.

``r = RMS(y) / RMS(x)`` with ``RMS(h) = ||h||_2 / sqrt(d)`` (Eq. 1, 3), pooled over all tokens: the square
root of the mean square. Of a linear layer, y is what it gives out, a bias included where one call adds it;
a stack of experts is one layer, whose tokens are those that the router sends. Of a block's *function*
(attention, MLP, mixer), x is the residual stream h that it reads through its norm, and y is what it adds
to the stream: ``r = RMS(f(Norm h)) / RMS(h)`` (Sec. 3.1, App. B).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from sparkling_cli.results.base import Change, Number, Result, Rows, Verdict, deviation_of

#: A ratio r may move by this share before it is named.
DEVIATION_LIMIT = 0.10
#: Streams and logits that differ by less than this share of their RMS are the same up to rounding.
STREAM_ROUNDING = 1e-4


class LayerStat(Result):
    """One linear layer, or one function of a block, in the forward passes of one model."""

    name: str
    x_rms: Annotated[Number, Field(description="RMS of what goes in; of a function: the residual stream")]
    y_rms: Annotated[Number, Field(description="RMS of what comes out")]
    calls: int
    r: Annotated[Number, Field(description="RMS(y)/RMS(x) (Eq. 3); null when nothing went in")]

    @classmethod
    def of(cls, name: str, x_rms: float, y_rms: float, calls: int) -> LayerStat:
        """With its ratio."""
        return cls(name=name, x_rms=x_rms, y_rms=y_rms, calls=calls, r=y_rms / x_rms if x_rms else None)


class StreamStat(Result):
    """RMS of the residual stream at one place."""

    name: str
    rms: Number


class Measurement(Rows):
    """One model's forward passes over all the tokens."""

    layers: Annotated[tuple[LayerStat, ...], Field(description="linear layers, in the order of the pass")]
    functions: Annotated[tuple[LayerStat, ...], Field(description="of the blocks: what each adds")]
    stream: Annotated[
        tuple[StreamStat, ...], Field(description="before the first block and behind every one")
    ]
    logits_rms: Annotated[Number, Field(description="over all positions and the vocabulary")]
    loss: Annotated[
        Number,
        Field(description="cross-entropy in nats per token; null without logits for every position"),
    ]
    vocabulary: Annotated[int, Field(description="entries of the logits")]
    unused: Annotated[tuple[str, ...], Field(description="weights on disk that the model does not use")] = ()


class LayerActivation(Result):
    """A linear layer, or a function of a block, on the same tokens before and after."""

    name: str
    role: Annotated[str, Field(description="the name without its block and numbers, e.g. mlp.up_proj")]
    layer: Annotated[int | None, Field(description="index of its block; null outside of blocks")]
    widened: Annotated[bool, Field(description="whether its own weight grew")]
    x_before: Annotated[Number, Field(description="RMS of the input (Eq. 1); null: not finite")]
    x_after: Number
    y_before: Annotated[Number, Field(description="RMS of the output")]
    y_after: Number
    r_before: Annotated[Number, Field(description="RMS(y)/RMS(x) (Eq. 3)")]
    r_after: Number
    deviation: Annotated[Number, Field(description="r_after / r_before - 1; null: not finite, or 0 before")]

    @classmethod
    def of(cls, before: LayerStat, after: LayerStat, factor: float = 1.0, **place: Any) -> LayerActivation:
        """The same layer in two models.

        Args:
            before: in the first one.
            after: in the second one.
            factor: that the input got in the weight's stead (a tied head's): taken out again, so that
                the layer is compared as if its weight had it.
            place: ``role``, ``layer`` and ``widened``.
        """
        r_after = None if after.r is None else after.r * factor
        return cls(
            name=before.name,
            **place,
            x_before=before.x_rms,
            x_after=None if after.x_rms is None else after.x_rms / factor,
            y_before=before.y_rms,
            y_after=after.y_rms,
            r_before=before.r,
            r_after=r_after,
            deviation=deviation_of(before.r, r_after),
        )

    @property
    def moved(self) -> float:
        """How far r moved, as a share; one that was zero, by what it is now; infinite where not finite."""
        if self.deviation is not None:
            return abs(self.deviation)
        return self.r_after if self.r_before == 0 and self.r_after is not None else float("inf")

    def far(self, share: float = 1.0) -> bool:
        """Whether r moved further than this share of ``DEVIATION_LIMIT``."""
        return self.moved > share * DEVIATION_LIMIT


class ResidualPoint(Change):
    """The residual stream before the first block, or behind one: its RMS, and how far it differs.

    ``difference`` is ||after - before|| / ||before|| over the tokens, in the entries that the first model
    has: zero behind every block where the function is kept; else it tells where it begins to be another.
    """

    name: str
    layer: Annotated[int | None, Field(description="index of the block; null before the first one")]
    difference: Annotated[
        Number, Field(description="RMS of the change of the entries that both have / their RMS before")
    ] = None
    cosine: Annotated[Number, Field(description="between these entries before and after")] = None


class Routing(Result):
    """The experts that one router chose for the same tokens."""

    name: Annotated[str, Field(description="the block")]
    layer: int | None
    tokens: int
    kept: Annotated[
        float, Field(description="share of tokens that go to their experts of before, or to copies of them")
    ]


class Activations(Rows):
    """Two models on the same tokens: RMS of activations, residual stream, logits, loss, routing."""

    data: Annotated[str, Field(description="what was measured on, in words")]
    random_tokens: Annotated[bool, Field(description="true: random tokens, the loss means little")]
    tokens: int
    layers: Annotated[tuple[LayerActivation, ...], Field(description="linear layers that both have")]
    functions: Annotated[
        tuple[LayerActivation, ...],
        Field(description="functions of the blocks; x is the residual stream, y what is added to it"),
    ]
    residual: tuple[ResidualPoint, ...]
    logits: Annotated[Change, Field(description="RMS of the logits")]
    logit_change: Annotated[
        Number, Field(description="RMS of the logits' change / RMS of the logits before; null: other shapes")
    ]
    logit_largest: Annotated[
        Number, Field(description="largest change of a logit / largest logit before; null: other shapes")
    ]
    loss_before: Annotated[Number, Field(description="nats per token")]
    loss_after: Number
    vocabulary: Annotated[int, Field(description="entries of the logits; uniform prediction costs its log")]
    routing: Annotated[tuple[Routing, ...], Field(description="routers of a mixture of experts")]
    only_before: Annotated[tuple[str, ...], Field(description="layers that only the first model has")]
    only_after: Annotated[tuple[str, ...], Field(description="layers that only the second model has")]

    def worst(self, limit: int | None = None) -> list[LayerActivation]:
        """Linear layers by how far r moved, the farthest first; of equal ones the widened first."""
        return sorted(self.layers, key=lambda entry: (-entry.moved, not entry.widened))[:limit]

    @property
    def growth(self) -> tuple[tuple[ResidualPoint, float | None], ...]:
        """Behind each block, how far the growth of the residual stream since the embeddings moved.

        New hidden channels that start at zero lower the RMS of every place alike, and the norms take
        that out again; what the blocks see is the stream's size relative to where it began.
        """
        if not self.residual or not self.residual[0].before or not self.residual[0].after:
            return ()
        first = self.residual[0]
        return tuple(
            (
                point,
                deviation_of(
                    None if point.before is None else point.before / (first.before or 1.0),
                    None if point.after is None else point.after / (first.after or 1.0),
                ),
            )
            for point in self.residual[1:]
        )

    @property
    def diverging(self) -> tuple[ResidualPoint, ...]:
        """How far the stream differs behind every block; empty where it does so nowhere beyond rounding."""
        known = tuple(p for p in self.residual if p.layer is not None and p.difference is not None)
        return known if any((p.difference or 0.0) > STREAM_ROUNDING for p in known) else ()

    @property
    def routed_as_before(self) -> float | None:
        """Share of tokens, over all routers, that go to the same experts; None without routers."""
        total = sum(router.tokens for router in self.routing)
        return sum(router.kept * router.tokens for router in self.routing) / total if total else None


class TensorStat(Result):
    """Statistics of all tensors of one name without numbers, in one layer, of one kind of state."""

    role: Annotated[str, Field(description="the name without its numbers: model.layers.*.mlp.up_proj.weight")]
    layer: Annotated[int | None, Field(description="the first number in the name; null where there is none")]
    slot: Annotated[str, Field(description="empty for weights, else the optimizer state's name")]
    tensors: int
    entries: int
    rms: Annotated[Number, Field(description="over all finite entries")]
    largest: Annotated[Number, Field(description="largest finite magnitude")]
    zeros: Annotated[int, Field(description="entries that are exactly zero")]
    nan: int
    inf: int

    @property
    def label(self) -> str:
        """The name with its layer put back in: what a person looks for."""
        return self.role if self.layer is None else self.role.replace("*", str(self.layer), 1)


class Weights(Rows):
    """Weights and optimizer state of a checkpoint, in the order of its tensors."""

    tensors: tuple[TensorStat, ...]
    nonfinite: Annotated[tuple[str, ...], Field(description="names of those with NaN or Inf in them")]

    @classmethod
    def of(cls, stats: tuple[TensorStat, ...]) -> Weights:
        """With the names of what is not finite."""
        bad = (stat for stat in stats if stat.nan or stat.inf)
        names = tuple(stat.label + (f" {stat.slot}" if stat.slot else "") for stat in bad)
        return cls(tensors=stats, nonfinite=names)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state there is, in order of appearance."""
        return tuple(dict.fromkeys(stat.slot for stat in self.tensors if stat.slot))


class ChannelSymmetry(Result):
    """New channels of one axis in one layer, against the channels that they were copied from."""

    layer: Annotated[int | None, Field(description="null outside the layers (embedding, head)")]
    axis: str
    channels: Annotated[int, Field(description="new ones, all experts counted")]
    cosine: Annotated[Number, Field(description="mean cosine between a new channel and its source")]
    distance: Annotated[Number, Field(description="mean of ||new - source|| / ||source||")]
    locked: Annotated[Number, Field(description="share of channels that are still equal to their source")]


class Symmetry(Rows):
    """The same over all layers and axes."""

    cosine: Number
    distance: Number
    locked: Number
    update_rms_new: Annotated[
        Number, Field(description="RMS of how far new entries are from where they began; null: not known")
    ] = None
    update_rms_old: Annotated[Number, Field(description="the same of old entries of the same tensors")] = None
    layers: tuple[ChannelSymmetry, ...]

    @classmethod
    def of(cls, layers: tuple[ChannelSymmetry, ...], **updates: float) -> Symmetry:
        """With means over all new channels.

        Args:
            layers: the rows.
            updates: ``update_rms_new`` and ``update_rms_old``.
        """
        total = sum(row.channels for row in layers)

        def mean(values: list[float | None]) -> float:
            return sum((v or 0.0) * row.channels for v, row in zip(values, layers, strict=True)) / total

        return cls(
            cosine=mean([row.cosine for row in layers]),
            distance=mean([row.distance for row in layers]),
            locked=mean([row.locked for row in layers]),
            layers=layers,
            **updates,
        )

    @property
    def moved(self) -> float | None:
        """How far new entries have moved, over how far old ones have; None where nothing has, or is known."""
        new, old = self.update_rms_new, self.update_rms_old
        return new / old if new is not None and old else None


class LoggedLoss(Result):
    """The loss in the log of training since an expansion, against a forecast from the log before it."""

    values: Annotated[int, Field(description="logged values that are compared: the last ones")]
    loss: Annotated[Number, Field(description="their mean")]
    forecast: Annotated[
        Number, Field(description="mean of the forecast for their steps, had the run gone on as it was")
    ]
    spread: Annotated[
        Number, Field(description="standard deviation of the log about the forecast before the expansion")
    ]


class Inspection(Result):
    """What was found in a checkpoint, or between two."""

    checkpoint: str
    against: Annotated[str | None, Field(description="the other checkpoint; null without")]
    format: str
    parameters: int
    weights_bytes: int
    state_bytes: int
    dtypes: tuple[str, ...]
    weight_tensors: int
    state_tensors: int
    step: int | None
    optimizer: str | None
    model_type: str | None
    notes: tuple[str, ...]
    doubt: Annotated[
        str | None, Field(description="what stands against the comparison as a whole; null if nothing does")
    ]
    weights: Weights
    activations: Annotated[Measurement | None, Field(description="null where no model could be built")]
    tokens: Annotated[str | None, Field(description="what the activations were measured on, in words")]
    random_tokens: bool
    change: Annotated[
        Activations | None, Field(description="from the other checkpoint to this one; null without it")
    ]
    symmetry: Annotated[
        Symmetry | None,
        Field(description="null unless this checkpoint was trained on from the other, an expansion's output"),
    ]
    logged_loss: Annotated[
        LoggedLoss | None, Field(description="null without a log of both before and after an expansion")
    ] = None
    verdict: Annotated[Verdict | None, Field(description="what the change means; null without one")]

    def __repr__(self) -> str:
        other = f" against {self.against}" if self.against else ""
        verdict = f": {self.verdict.headline}" if self.verdict else ""
        return f"Inspection({self.checkpoint}{other}, {self.parameters:,} parameters{verdict})"
