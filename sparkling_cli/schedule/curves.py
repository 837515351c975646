"""Learning-rate curves: Eq. 25-28 of arXiv 2602.02472, and the other shapes that baselines have.

All numbers are float64 and follow the equations as they are written; shapes that transformers offers are
computed in the order of its own operations, so that the rates are the same to the last digits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import cos, inf, pi, sqrt
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from sparkling_cli.spec.choices import DecayShape

CurveType = Literal[
    "cosine", "linear", "constant", "wsd", "polynomial", "inverse_sqrt", "cosine_with_restarts"
]

_Count = Annotated[int, Field(ge=0)]
_Number = Annotated[float, Field(ge=0)]

#: the number of cosine waves that is a single fall
HALF_WAVE = 0.5


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Curve:
    """``f(t; Tw, T, e0, emax, emin)``: a warmup, then a shape (Eq. 25-26 for ``cosine``).

    Attributes:
        type: ``cosine``, ``linear`` and ``polynomial`` fall from ``peak`` to ``minimum`` between the end of
            the warmup and ``total_steps``; ``cosine_with_restarts`` does so ``cycles`` times; ``constant``
            stays at ``peak``; ``inverse_sqrt`` falls for ever and has no minimum; ``wsd`` stays at ``peak``,
            falls to ``minimum`` over ``decay_steps``, and stays there.
        peak: emax.
        minimum: emin (not used by ``constant`` and ``inverse_sqrt``).
        initial: e0, the rate at step 0.
        warmup_steps: Tw.
        total_steps: T. From it on the rate is what it is there.
        decay_steps: of ``wsd``.
        decay: how ``wsd`` falls.
        decay_start: the step at which ``wsd`` begins to fall; None: so that it ends at ``total_steps``.
        warmup: how it rises.
        cycles: waves of ``cosine`` and of the decay of ``wsd`` (a half is one fall), or the number of falls
            of ``cosine_with_restarts``.
        power: of ``polynomial``.
        timescale: of ``inverse_sqrt``, in steps.
        lead: steps that the curve is ahead of the optimizer's.
    """

    type: CurveType
    peak: _Number
    minimum: _Number
    initial: float  # below zero where the warmup would begin before step 0
    warmup_steps: _Count
    total_steps: _Count
    decay_steps: _Count = 0
    decay: DecayShape = "cosine"
    decay_start: _Count | None = None
    warmup: DecayShape = "linear"
    cycles: _Number = HALF_WAVE
    power: _Number = 1.0
    timescale: Annotated[float, Field(gt=0)] = 1.0
    lead: _Count = 0

    def __call__(self, step: float) -> float:
        """The learning rate at a step."""
        step = min(step, self.total_steps) + self.lead
        if step < self.warmup_steps:
            return self.initial + (self.peak - self.initial) * _rise(self.warmup, step / self.warmup_steps)
        start, length = self.fall
        if step < start:
            return self.peak
        if self.type == "inverse_sqrt":
            return self.peak / sqrt((step + self.timescale - start) / self.timescale)
        done = (step - start) / max(1, length)
        if self.type == "wsd" and (done >= 1 or length == 0):
            return self.minimum
        return max(0.0, self.minimum + (self.peak - self.minimum) * self._share(done))

    @property
    def fall(self) -> tuple[float, int]:
        """First step and number of steps of what follows after the stable phase."""
        if self.type == "constant":
            return inf, 0
        if self.type != "wsd":
            return self.warmup_steps, self.total_steps - self.warmup_steps
        start = self.total_steps - self.decay_steps if self.decay_start is None else self.decay_start
        return start, self.decay_steps

    def is_one_fall(self, step: int) -> bool:
        """Whether what remains from ``step`` on is one fall that reaches ``minimum`` at ``total_steps``.

        Not so for ``1-sqrt``, which is steepest where it begins: begun anew, it would fall below the old one.
        """
        if self.type != "wsd":
            return self.type in ("linear", "polynomial") or (self.type, self.cycles) == ("cosine", HALF_WAVE)
        whole = self.decay == "linear" or (self.decay, self.cycles) == ("cosine", HALF_WAVE)
        start, length = self.fall
        return whole and start <= step and start + length == self.total_steps

    def _share(self, done: float) -> float:
        """How much of the way from minimum to peak is left, ``done`` of 1 into the fall."""
        if self.type == "polynomial":
            left: float = max(0.0, 1.0 - done) ** self.power
            return left
        if self.type == "cosine_with_restarts":
            return 0.0 if done >= 1 else 0.5 * (1.0 + cos(pi * ((self.cycles * done) % 1.0)))
        shape = self.decay if self.type == "wsd" else self.type
        if shape == "cosine":
            return 0.5 * (1.0 + cos(pi * self.cycles * 2.0 * done))
        return max(0.0, 1.0 - (done if shape == "linear" else sqrt(done)))


def _rise(shape: DecayShape, done: float) -> float:
    if shape == "cosine":
        return 0.5 * (1.0 - cos(pi * done))
    return done if shape == "linear" else 1.0 - sqrt(1.0 - done)


@dataclass(frozen=True)
class Rewarmed:
    """The new entries' curve, by steps since the expansion (Eq. 27-28).

    ``eta_new(t) = f(t - te; tau_w, T - te, eta_e, rho eta_e, emin)`` with ``eta_e = eta(te)``: a re-warmup
    from eta_e to rho eta_e, and then the baseline's own shape. The paper has the cosine alone. What follows
    for other baselines is our reading:

    - What remains is one fall to emin at T (``cosine``, ``linear``, ``polynomial``; ``wsd`` inside its
      decay): as it is written, with that fall begun anew over what remains of the run. With emin = 0 the
      ratio to the old entries' rate is constant for the powers: rho ((T - te)/(T - te - tau_w))^power.
    - What remains is made of phases (``wsd``: stable, decay, floor; restarts; waves) or has no floor
      (``constant``, ``inverse_sqrt``). To begin it anew would move the phases. There new entries go through
      the baseline's own phases, times a factor that rises from 1 to rho over tau_w: on a stable rate that
      is Eq. 27 itself, and afterwards the ratio is rho whatever the baseline does.

    Attributes:
        baseline: the old entries' curve.
        expansion_step: te.
        rho: peak of the new entries' rate over the rate at the expansion.
        steps: tau_w.
    """

    baseline: Curve
    expansion_step: int
    rho: float
    steps: int

    @property
    def eta_e(self) -> float:
        """The baseline's rate at the expansion."""
        return self.baseline(self.expansion_step)

    @property
    def peak(self) -> float:
        """What new entries re-warm to from ``eta_e``."""
        return self.rho * self.eta_e

    def __call__(self, since: float) -> float:
        """The learning rate ``since`` steps after the expansion."""
        if self._anew is not None:
            return self._anew(since)
        gain = self.rho if since >= self.steps else 1 + (self.rho - 1) * since / self.steps
        return gain * self.baseline(self.expansion_step + since)

    def eta_new(self, step: int) -> float:
        """The rate at a step of the whole run, te <= step."""
        return self(step - self.expansion_step)

    def ratio(self, step: int) -> float:
        """eta_new / eta_old, the factor on the update of the stage's entries; 1 where both are zero.

        ``step`` counts the optimizer steps done: the next one uses this ratio.
        """
        old = self.baseline(step)
        return self.eta_new(step) / old if old > 0 else 1.0

    @cached_property
    def _anew(self) -> Curve | None:
        """Eq. 27-28 as they are written: the baseline's own fall, begun anew over what remains."""
        if not self.baseline.is_one_fall(self.expansion_step):
            return None
        remaining = self.baseline.total_steps - self.expansion_step
        return replace(
            self.baseline,
            peak=self.peak,
            initial=self.eta_e,
            warmup_steps=self.steps,
            warmup="linear",
            total_steps=remaining,
            decay_start=None,
            decay_steps=max(0, remaining - self.steps),
            lead=0,
        )


def fresh_factor(beta1: float, beta2: float, k: int, n: int | None = None) -> float:
    """The factor that gives new entries' k-th Adam update the bias correction of a k-th step.

    New entries' moments start from zero while the tensor's step counter n goes on, so that Adam divides
    by ``1 - beta1**n`` where ``1 - beta1**k`` belongs: at a steady gradient the update is
    ``(1-beta1**k)/sqrt(1-beta2**k)`` times what it should be. The factor is the inverse,
    ``sqrt(1-beta2**k)/(1-beta1**k)``, over the same for n, which is 1 but for runs younger than 1/(1-beta2)
    steps.

    Args:
        beta1: of Adam.
        beta2: of Adam.
        k: steps since the entries were born, from 1.
        n: the tensor's own step counter at this step; None for a long run.
    """
    due = sqrt(1 - beta2**k) / (1 - beta1**k)
    return due if n is None else due * (1 - beta1**n) / sqrt(1 - beta2**n)
