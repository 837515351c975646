"""Scaling an optimizer's update after the fact, on slices.

A step moves a parameter from ``old`` to ``p``. New entries shall move ``m`` times as far, as they would
under ``m`` times the learning rate: ``old + m (p - old)``. That is exact for every optimizer whose update
is proportional to the rate, weight decay included. For Adam ``p - old`` follows from the state, so that
nothing needs to be kept; for SGD with momentum it is the momentum buffer itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparkling_cli.training.slices import NewEntries, local_tensor

#: dtypes in which one rounding more or less does not matter
PRECISE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Factor:
    """What new entries' update is multiplied by.

    Attributes:
        rate: eta_new / eta_old, on the whole update.
        moment: on Adam's own part of it, weight decay left out (fresh bias correction).
    """

    rate: float
    moment: float = 1.0

    @property
    def nothing(self) -> bool:
        """Whether new entries move like old ones."""
        return self.rate == 1.0 and self.moment == 1.0


def is_adam(optimizer: Optimizer) -> bool:
    """Whether the update follows from the state: torch's own Adam or AdamW, not a subclass of it."""
    return type(optimizer) in (Adam, AdamW)


def is_heavy_ball(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a group's update is its rate times the momentum buffer: torch's SGD, without Nesterov's."""
    return type(optimizer) is SGD and bool(group["momentum"]) and not group["nesterov"]


def in_closed_form(optimizer: Optimizer, group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether new entries can be corrected after the step without having been kept."""
    return param.dtype in PRECISE and (is_adam(optimizer) or is_heavy_ball(optimizer, group))


@dataclass(frozen=True)
class AdamStep:
    """One Adam step of one parameter: ``p = old (1 - decay) - size m / (sqrt(v)/root + eps)``."""

    decay: float
    size: float
    root: float
    eps: float
    state: Mapping[str, Any]
    second: str

    @classmethod
    def of(cls, group: Mapping[str, Any], state: Mapping[str, Any], step: float) -> AdamStep:
        """The step that a parameter of ``group`` has just made, its ``step``-th."""
        beta1, beta2 = (float(b) for b in group["betas"])
        lr = float(group["lr"])
        decoupled = bool(group.get("decoupled_weight_decay"))
        return cls(
            decay=lr * float(group["weight_decay"]) if decoupled else 0.0,
            size=lr / (1 - beta1**step),
            root=(1 - beta2**step) ** 0.5,
            eps=float(group["eps"]),
            state=state,
            second="max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq",
        )

    def moments(self, entries: NewEntries, stage: int) -> Iterator[tuple[Tensor, Tensor]]:
        """First moment and denominator of the stage's entries, piece by piece."""
        first = entries.of(self.state["exp_avg"], stage)
        second = entries.of(self.state[self.second], stage)
        for m, v in zip(first, second, strict=True):
            yield m, v.sqrt().div_(self.root).add_(self.eps)


def correct_adam(param: Tensor, entries: NewEntries, stage: int, step: AdamStep, factor: Factor) -> None:
    """Scale the new entries' update in place, from the state alone.

    With ``u = size m / denominator``: ``p = old (1-d) - u``, so ``old = (p + u)/(1-d)``, and wanted is
    ``old (1 - r d) - r c u``, that is ``a p + (a - r c) u`` with ``a = (1 - r d)/(1 - d)``.
    """
    keep = (1 - factor.rate * step.decay) / (1 - step.decay)
    weight = keep - factor.rate * factor.moment
    pieces = zip(entries.of(param, stage), step.moments(entries, stage), strict=True)
    for p, (m, denominator) in pieces:
        if keep != 1.0:
            p.mul_(keep)
        p.addcdiv_(m, denominator, value=weight * step.size)


def correct_heavy_ball(param: Tensor, buffer: Tensor, entries: NewEntries, stage: int, more: float) -> None:
    """Move new entries ``more`` times further along the momentum buffer, in place.

    ``p = old - lr b``, with weight decay inside ``b``; wanted is ``old - r lr b``, so ``more = (r - 1) lr``.
    """
    for p, b in zip(entries.of(param, stage), entries.of(buffer, stage), strict=True):
        p.sub_(b, alpha=more)


def redo_adam(
    param: Tensor, kept: list[Tensor], entries: NewEntries, stage: int, step: AdamStep, factor: Factor
) -> None:
    """The new entries' step made again from their old values, for parameters of low precision.

    Correcting the rounded result would lose what the rounding took; so the whole step is computed in
    float32 and rounded once.
    """
    pieces = zip(entries.of(param, stage), kept, entries.of(step.state["exp_avg"], stage),
                 entries.of(step.state[step.second], stage), strict=True)  # fmt: skip
    for p, old, m, v in pieces:
        denominator = v.float().sqrt_().div_(step.root).add_(step.eps)
        moved = old.float().mul_(1 - factor.rate * step.decay)
        p.copy_(moved.addcdiv_(m.float(), denominator, value=-factor.rate * factor.moment * step.size))


def keep(param: Tensor, entries: NewEntries, stage: int) -> list[Tensor]:
    """The new entries as they are before a step."""
    return [piece.clone() for piece in entries.of(param, stage)]


def interpolate(param: Tensor, kept: list[Tensor], entries: NewEntries, stage: int, rate: float) -> None:
    """``old + rate (p - old)`` in place, exact for any optimizer whose update is proportional to the rate."""
    for p, old in zip(entries.of(param, stage), kept, strict=True):
        if p.dtype in PRECISE:
            p.copy_(torch.lerp(old, p, rate))
        else:
            p.copy_(torch.lerp(old.float(), p.float(), rate))


def step_counts(optimizer: Optimizer, params: list[Tensor]) -> list[float]:
    """Adam's step counter of each parameter; one transfer when they lie on an accelerator."""
    counters = [optimizer.state[p]["step"] for p in params]
    if not counters:
        return []
    if any(isinstance(c, Tensor) and c.device.type != "cpu" for c in counters):
        return [float(x) for x in torch.stack([local_tensor(c).reshape(()) for c in counters]).tolist()]
    return [float(c) for c in counters]
