"""Learning-rate curves: Eq. 25-28 of arXiv 2602.02472, and the other shapes that baselines have.

All numbers are float64 and follow the equations as they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import cos, pi, sqrt
from typing import Any, Literal

CurveType = Literal["cosine", "linear", "constant", "wsd"]
DecayShape = Literal["cosine", "linear", "1-sqrt"]

_FALLS: Mapping[str, Callable[[float, float], float]] = {
    "cosine": lambda done, length: (1 + cos(pi * done / length)) / 2,
    "linear": lambda done, length: 1 - done / length,
    "1-sqrt": lambda done, length: 1 - sqrt(done / length),
}


@dataclass(frozen=True)
class Curve:
    """``f(t; Tw, T, e0, emax, emin)``: a warmup, then a shape (Eq. 25-26 for ``cosine``).

    Attributes:
        type: ``cosine`` and ``linear`` fall from ``peak`` to ``minimum`` between the end of the warmup and
            ``total_steps``; ``constant`` stays at ``peak``; ``wsd`` stays and falls over the last
            ``decay_steps``.
        peak: emax.
        minimum: emin, the rate at ``total_steps`` and after it (not used by ``constant``).
        initial: e0, the rate at step 0.
        warmup_steps: Tw.
        total_steps: T.
        decay_steps: of ``wsd``.
        decay: how ``wsd`` falls.
    """

    type: CurveType
    peak: float
    minimum: float
    initial: float
    warmup_steps: int
    total_steps: int
    decay_steps: int = 0
    decay: DecayShape = "cosine"

    def __call__(self, step: float) -> float:
        """The learning rate at a step."""
        if step < self.warmup_steps:
            return self.initial + (self.peak - self.initial) * step / self.warmup_steps
        if self.type == "constant":
            return self.peak
        start = self.warmup_steps if self.type != "wsd" else self.total_steps - self.decay_steps
        if step < start:
            return self.peak
        if step >= self.total_steps:
            return self.minimum
        fall = _FALLS[self.decay if self.type == "wsd" else self.type]
        share = fall(step - start, self.total_steps - start)
        return self.minimum + (self.peak - self.minimum) * share

    def as_data(self) -> dict[str, Any]:
        """Plain data; ``Curve(**data)`` gives it back."""
        return asdict(self)


def rewarmed(baseline: Curve, expansion_step: int, rho: float, tau_w: int) -> Curve:
    """The new entries' curve, by steps since the expansion (Eq. 27-28).

    ``eta_new(t) = f(t - te; tau_w, T - te, eta_e, rho eta_e, emin)`` with ``eta_e = eta(te)``: the
    baseline's own shape begun anew over what remains of the run. What follows for the shapes that the
    paper does not treat:

    - ``linear``: from rho eta_e straight down to emin at T.
    - ``constant``: rho eta_e to the end. There is no decay that could bring the two rates together.
    - ``wsd``: rho eta_e while the baseline is stable, then its decay over the same last steps, so that
      with emin = 0 the ratio is rho throughout. Begun inside the decay, it falls over all that remains.
    """
    eta_e = baseline(expansion_step)
    remaining = baseline.total_steps - expansion_step
    return replace(
        baseline,
        peak=rho * eta_e,
        initial=eta_e,
        warmup_steps=tau_w,
        total_steps=remaining,
        decay_steps=max(0, min(baseline.decay_steps, remaining - tau_w)),
    )


def fresh_factor(beta1: float, beta2: float, k: int, n: int | None = None) -> float:
    """The factor that gives new entries' k-th Adam update the bias correction of a k-th step.

    New entries' moments start from zero while the tensor's step counter n goes on, so that Adam divides
    by ``1 - b1**n`` where ``1 - b1**k`` belongs: at a steady gradient the update is
    ``(1-b1**k)/sqrt(1-b2**k)`` times what it should be. The factor is the inverse,
    ``sqrt(1-b2**k)/(1-b1**k)``, over the same for n, which is 1 but for runs younger than 1/(1-b2) steps.

    Args:
        beta1: b1.
        beta2: b2.
        k: steps since the entries were born, from 1.
        n: the tensor's own step counter at this step; None for a long run.
    """
    due = sqrt(1 - beta2**k) / (1 - beta1**k)
    return due if n is None else due * (1 - beta1**n) / sqrt(1 - beta2**n)
