"""Scaling an optimizer's update after the fact, on slices.

A step moves a parameter from ``old`` to ``p``. New entries shall move ``m`` times as far, as they would
under ``m`` times the learning rate: ``old + m (p - old)``. That is exact for every optimizer whose update
is proportional to the rate, weight decay included. For Adam ``p - old`` follows from the state, so that
nothing needs to be kept; for SGD with momentum it is the momentum buffer itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    """One Adam step of one parameter: ``p = old (1 - decay) - size m / (sqrt(v) + eps)``.

    That is torch's ``lr/c m / (sqrt(v)/root + eps)``, with ``root`` taken into both, which saves a pass.

    Attributes:
        count: how many steps the parameter has made.
    """

    count: float
    decay: float
    size: float
    eps: float
    state: Mapping[str, Any]
    second: str

    @classmethod
    def of(cls, optimizer: Optimizer, group: Mapping[str, Any], param: Tensor, step: float) -> AdamStep:
        """The step that a parameter of ``group`` has just made, its ``step``-th."""
        beta1, beta2 = (float(b) for b in group["betas"])
        lr = float(group["lr"])
        root = (1 - beta2**step) ** 0.5
        # before torch 2.7 the class alone says it
        decoupled = bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))
        return cls(
            count=step,
            decay=lr * float(group["weight_decay"]) if decoupled else 0.0,
            size=lr / (1 - beta1**step) * root,
            eps=float(group["eps"]) * root,
            state=optimizer.state[param],
            second="max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq",
        )

    def moments(self, entries: NewEntries, stage: int) -> Iterator[tuple[Tensor, Tensor]]:
        """First moment and denominator of the stage's entries, piece by piece."""
        first = entries.of(self.state["exp_avg"], stage)
        second = entries.of(self.state[self.second], stage)
        for m, v in zip(first, second, strict=True):
            yield m, v.sqrt().add_(self.eps)


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
        denominator = v.float().sqrt_().add_(step.eps)
        moved = old.float().mul_(1 - factor.rate * step.decay)
        p.copy_(moved.addcdiv_(m.float(), denominator, value=-factor.rate * factor.moment * step.size))


def keep(param: Tensor, entries: NewEntries, stage: int) -> list[Tensor]:
    """The new entries as they are before a step."""
    return [piece.clone() for piece in entries.of(param, stage)]


def interpolate(param: Tensor, kept: list[Tensor], entries: NewEntries, stage: int, rate: float) -> None:
    """``old + rate (p - old)`` in place, exact for any optimizer whose update is proportional to the rate."""
    for p, old in zip(entries.of(param, stage), kept, strict=True):
        if p.dtype in PRECISE:
            p.lerp_(old, 1 - rate)
        else:
            p.copy_(torch.lerp(old.float(), p.float(), rate))


class StepCounts:
    """Adam's step counters of parameters, read again only where they have not just been counted on.

    Reading a counter that lies on an accelerator waits for all work there. A counter that is the same tensor
    as after the last step, and has been written once since then, is one further.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int, float]] = {}

    def steps(self, optimizer: Optimizer, params: Iterable[Tensor]) -> dict[int, AdamStep]:
        """The steps that parameters have just made, by id."""
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        held = list({id(p): p for p in params}.values())
        both = zip(held, self.of(optimizer, held), strict=True)
        return {id(p): AdamStep.of(optimizer, groups[id(p)], p, count) for p, count in both}

    def of(self, optimizer: Optimizer, params: list[Tensor]) -> list[float]:
        """After a step; one transfer for all that have to be read from an accelerator."""
        counters = [optimizer.state[p]["step"] for p in params]
        counts = [self._counted(counter) for counter in counters]
        unknown = [i for i, count in enumerate(counts) if count is None]
        for i, value in zip(unknown, _read([counters[i] for i in unknown]), strict=True):
            counts[i] = value
        found = [count for count in counts if count is not None]
        both = zip(counters, found, strict=True)
        versioned = [(c, n) for c, n in both if isinstance(c, Tensor) and not c.is_inference()]
        self._known |= {id(c): (c, c._version, n) for c, n in versioned}
        return found

    def _counted(self, counter: Any) -> float | None:
        known = self._known.get(id(counter))
        return known[2] + 1 if known is not None and counter._version == known[1] + 1 else None


def _read(counters: list[Any]) -> list[float]:
    if any(isinstance(c, Tensor) and c.device.type != "cpu" for c in counters):
        return [float(x) for x in torch.stack([local_tensor(c).reshape(()) for c in counters]).tolist()]
    return [float(c) for c in counters]
