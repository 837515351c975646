"""What was measured in a model's forward passes, and how two models compare.

``r = RMS(y) / RMS(x)`` of every linear layer ``y = W x`` (Eq. 3) with ``RMS(h) = ||h||_2 / sqrt(d)``
(Eq. 1), pooled over all tokens: the square root of the mean square. ``y`` is what the layer gives out,
its bias included where one call adds it. A stack of experts is one layer; its tokens are those that the
router sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite, nan, sqrt
from typing import Any

#: Deviation of r above which a layer is named (the method's "within 10%").
TOLERANCE = 0.10
#: Largest relative change of the logits that rounding in float32 explains.
ROUNDING = 1e-5


@dataclass(frozen=True)
class LayerStat:
    """One linear layer: RMS of what goes in and what comes out."""

    name: str
    x_rms: float
    y_rms: float
    calls: int

    @property
    def ratio(self) -> float:
        """The r of Eq. 3; NaN when nothing went in."""
        return self.y_rms / self.x_rms if self.x_rms else nan


@dataclass(frozen=True)
class StreamStat:
    """RMS of the residual stream at one place."""

    name: str
    rms: float


@dataclass(frozen=True)
class Measurement:
    """One model's forward passes over all the tokens.

    Attributes:
        layers: every linear layer, in the order of the first pass.
        stream: the residual stream before the first block and after every one.
        logits_rms: over all positions and the vocabulary.
        loss: next-token cross-entropy in nats per token; None where the model gives no logits for
            every position.
        unused: weights on disk that the model does not use.
    """

    layers: tuple[LayerStat, ...]
    stream: tuple[StreamStat, ...]
    logits_rms: float
    loss: float | None
    unused: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data; what is not finite becomes null."""
        data = asdict(self)
        for layer, stat in zip(data["layers"], self.layers, strict=True):
            layer["r"] = stat.ratio
        return {key: plain(value) for key, value in data.items()}


@dataclass(frozen=True)
class LogitsChange:
    """How far the logits moved, over all tokens.

    Attributes:
        largest: max |after - before|.
        relative: max |after - before| / max |before|.
        rms: ||after - before|| / ||before||.
    """

    largest: float
    relative: float
    rms: float


@dataclass(frozen=True)
class Change:
    """One number before and after; ``deviation`` is |after / before - 1|."""

    name: str
    before: float
    after: float

    @property
    def signed(self) -> float:
        """The value of after / before - 1; infinite when one is no number or ``before`` is zero."""
        if self.before == self.after:
            return 0.0
        if not (isfinite(self.before) and isfinite(self.after)) or self.before == 0:
            return 0.0 if self.before != self.before and self.after != self.after else inf
        return self.after / self.before - 1

    @property
    def deviation(self) -> float:
        """|after / before - 1|."""
        return abs(self.signed)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "before": plain(self.before),
            "after": plain(self.after),
            "deviation": plain(self.deviation),
        }


@dataclass(frozen=True)
class LayerChange(Change):
    """r of a linear layer before and after, and what it is made of."""

    x_before: float = nan
    x_after: float = nan
    y_before: float = nan
    y_after: float = nan

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        parts = ("x_before", "x_after", "y_before", "y_after")
        return {**super().to_dict(), **{part: plain(getattr(self, part)) for part in parts}}


@dataclass(frozen=True)
class ActivationReport:
    """Two models on the same tokens.

    Attributes:
        tokens: where the tokens come from, in words.
        random: they are random.
        layers: r of every linear layer that both have.
        stream: RMS of the residual stream.
        logits: RMS of the logits.
        logits_change: None where their shapes differ.
        loss_before: nats per token.
        loss_after: nats per token.
        count: how many tokens.
        only_before: linear layers that only the first model has.
        only_after: linear layers that only the second model has.
        tolerance: deviation above which a layer is named.
    """

    tokens: str
    random: bool
    layers: tuple[LayerChange, ...]
    stream: tuple[Change, ...]
    logits: Change
    logits_change: LogitsChange | None
    loss_before: float | None
    loss_after: float | None
    count: int = 0
    only_before: tuple[str, ...] = ()
    only_after: tuple[str, ...] = ()
    tolerance: float = TOLERANCE

    @property
    def worst(self) -> tuple[LayerChange, ...]:
        """All layers, the largest deviation first."""
        return tuple(sorted(self.layers, key=lambda change: -change.deviation))

    @property
    def offenders(self) -> tuple[LayerChange, ...]:
        """Layers whose r deviates by more than the tolerance, worst first."""
        return tuple(change for change in self.worst if change.deviation > self.tolerance)

    @property
    def verdict(self) -> str:
        """One line for a person."""
        where = "Measured on random tokens." if self.random else ""
        parts = (self._signal(), self._function(), self._loss(), where)
        return " ".join(part for part in parts if part)

    def _signal(self) -> str:
        if not self.layers:
            return "No linear layer was seen in both models."
        count, limit = len(self.layers), f"{self.tolerance:.0%}"
        worst = self.worst[0]
        broken = [c.name for c in (*self.layers, *self.stream, self.logits) if not isfinite(c.after)]
        if broken:
            return f"NOT FINITE after: {len(broken)} place(s), the first {broken[0]}."
        if not self.offenders:
            return (
                f"Signal kept: r = RMS(y)/RMS(x) is within {limit} of before in all {count} linear layers "
                f"(largest deviation {percent(worst.deviation)}, {worst.name})."
            )
        return (
            f"Signal changed: r = RMS(y)/RMS(x) moved by more than {limit} in {len(self.offenders)} of "
            f"{count} linear layers, most in {worst.name} ({percent(worst.signed, signed=True)})."
        )

    def _function(self) -> str:
        if self.logits_change is None:
            return ""
        relative = self.logits_change.relative
        if relative <= ROUNDING:
            return f"The function is preserved to rounding (logits within {relative:.1e})."
        return f"Logits moved by {percent(self.logits_change.rms)} of their norm."

    def _loss(self) -> str:
        if self.loss_before is None or self.loss_after is None:
            return ""
        change = self.loss_after - self.loss_before
        return f"Loss {self.loss_before:.4f} -> {self.loss_after:.4f} ({change:+.4f})."

    def to_dict(self) -> dict[str, Any]:
        """As plain data; what is not finite becomes null."""
        change = self.logits_change
        return {
            "tokens": self.tokens,
            "random_tokens": self.random,
            "count": self.count,
            "tolerance": self.tolerance,
            "verdict": self.verdict,
            "offenders": [layer.name for layer in self.offenders],
            "layers": [layer.to_dict() for layer in self.layers],
            "residual": [place.to_dict() for place in self.stream],
            "logits": self.logits.to_dict(),
            "logits_change": None if change is None else {k: plain(v) for k, v in asdict(change).items()},
            "loss": {"before": plain(self.loss_before), "after": plain(self.loss_after)},
            "only_before": list(self.only_before),
            "only_after": list(self.only_after),
        }


def compare(
    before: Measurement,
    after: Measurement,
    *,
    logits: LogitsChange | None = None,
    tokens: str = "",
    random: bool = False,
    tolerance: float = TOLERANCE,
    count: int = 0,
    carried: Mapping[str, float] | None = None,
) -> ActivationReport:
    """Compare two measurements that were made on the same tokens, layer by layer, by name.

    ``carried`` are factors that a layer's input got in its weight's stead (a tied head's): the ratio
    after is multiplied by them, so that it is compared as if the weight had taken the factor.
    """
    factor = {} if carried is None else carried
    old = {layer.name: layer for layer in before.layers}
    new = {layer.name: layer for layer in after.layers}
    old_stream = {place.name: place.rms for place in before.stream}
    new_stream = {place.name: place.rms for place in after.stream}
    return ActivationReport(
        tokens=tokens,
        random=random,
        layers=tuple(
            LayerChange(
                name,
                a.ratio,
                new[name].ratio * factor.get(name, 1.0),
                a.x_rms,
                new[name].x_rms / factor.get(name, 1.0),
                a.y_rms,
                new[name].y_rms,
            )
            for name, a in old.items()
            if name in new
        ),
        stream=tuple(
            Change(name, rms, new_stream[name]) for name, rms in old_stream.items() if name in new_stream
        ),
        logits=Change("logits", before.logits_rms, after.logits_rms),
        logits_change=logits,
        loss_before=before.loss,
        loss_after=after.loss,
        count=count,
        only_before=tuple(name for name in old if name not in new),
        only_after=tuple(name for name in new if name not in old),
        tolerance=tolerance,
    )


def percent(share: float, *, signed: bool = False) -> str:
    """A share as a person reads it: ``12%``, ``3.1%``, ``0.02%``, ``<0.001%``."""
    if not isfinite(share):
        return "not finite"
    size = abs(share) * 100
    sign = "+" if signed and share >= 0 else ""
    if size == 0:
        return "0%"
    if size < 0.001:
        return "<0.001%"
    digits = 0 if size >= 10 else 1 if size >= 1 else 2 if size >= 0.1 else 3
    return f"{sign}{share * 100:.{digits}f}%"


def plain(value: Any) -> Any:
    """JSON-ready: numbers that are not finite become None, tuples lists."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def root_mean(squares: float, count: int) -> float:
    """sqrt(squares / count), 0 for nothing, NaN for what is not finite."""
    if not count:
        return 0.0
    return sqrt(squares / count) if isfinite(squares) else nan
