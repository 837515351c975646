"""How far an optimizer's step of a matrix is by its shape, and what of it is weight decay.

Found by steps of its own code on small matrices, not by its name; the optimizer itself stays as it is.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparkling_cli.errors import SparklingError
from sparkling_cli.formats.muon import FACTORS, rule_of, step_rms

#: rows and columns of the small matrices: no two rules give the three the same ratios
SQUARE, WIDE, TALL = (32, 32), (32, 128), (128, 32)
_RATE, _DECAY = 0.5, 0.1
#: how far a measured ratio may lie from a rule's: rules are at least twice apart, Newton-Schulz errs by 5 %
_NEAR = 0.25

UNKNOWN_DECAY = "and is not the rate times the decay times the weight: the step cannot be told from it"

#: least over largest singular value of an orthogonalized step, at least: Newton-Schulz leaves 0.6 and more
_ORTHOGONAL = 0.4

Decay = Literal["plain", "cautious", "unknown"]


@dataclass(frozen=True)
class Rule:
    """How an optimizer's step of a matrix depends on its shape, and what of it is weight decay.

    Attributes:
        factor: a name of :data:`FACTORS`.
        decay: ``plain``: the rate times the decay times the weight; ``cautious``: the same, where the step
            goes the same way; ``unknown``: neither, or none at all.
    """

    factor: str
    decay: Decay


#: entries step alone, as far as the rate says
ADAM = Rule("none", "plain")


def decay_of(group: Mapping[str, Any]) -> float:
    """A group's weight decay, under either of its names."""
    return float(group.get("weight_decay", group.get("wd", 0.0)) or 0.0)


def is_candidate(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a group may be one whose matrices are orthogonalized, by its options or the class's name."""
    return rule_of(group) is not None or "muon" in type(optimizer).__name__.lower()


def refused(optimizer: Optimizer, why: str) -> SparklingError:
    """The one error of steps that cannot be kept."""
    return SparklingError(
        f"{type(optimizer).__name__} {why}: how to keep the step of old entries (--keep-step) is not known",
        hint="expand without --keep-step, and see docs/how-to/optimizers.md for a rate of their own",
    )


def rule_for(
    optimizer: Optimizer, group: Mapping[str, Any], flags: Mapping[str, bool | str], device: torch.device
) -> Rule | None:
    """The rule by which the optimizer's own first step of small matrices goes; None if entries step alone.

    Raises:
        SparklingError: there is none, or the optimizer cannot step such matrices by themselves.
    """
    inner = [name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if inner:
        raise refused(optimizer, f"holds another optimizer ({inner[0]})")
    drawn = torch.Generator().manual_seed(0)
    gradients = {shape: torch.randn(shape, generator=drawn) for shape in (WIDE, TALL)}
    left, _, right = torch.linalg.svd(gradients[WIDE], full_matrices=False)
    gradients[WIDE] = left * torch.linspace(1, 0.1, len(left)) @ right
    gradients[SQUARE] = gradients[WIDE][:, : SQUARE[1]]
    weight = torch.randn(SQUARE, generator=drawn) * 0.1

    def step(shape: tuple[int, int], start: Tensor | None = None, decay: float = 0.0) -> Tensor:
        from_ = torch.zeros(shape) if start is None else start
        rates = {name: decay for name in ("weight_decay", "wd") if name in group}
        return _step(optimizer, {**group, **rates}, flags, from_.to(device), gradients[shape].to(device))

    try:
        steps = {shape: step(shape) for shape in (SQUARE, WIDE, TALL)}
        decayed = step(SQUARE, weight, _DECAY)
    except Exception as error:
        raise refused(
            optimizer, f"does not step a matrix by itself ({type(error).__name__}: {error})"
        ) from error
    if torch.allclose(steps[WIDE][:, : SQUARE[1]], steps[SQUARE], rtol=1e-4, atol=1e-7):
        return None
    lengths = {shape: float(one.square().mean().sqrt()) for shape, one in steps.items()}
    singular = torch.linalg.svdvals(steps[WIDE].double())  # of the gradient, from 1 to 0.1
    if not lengths[SQUARE] or float(singular[-1] / singular[0]) < _ORTHOGONAL:
        raise refused(optimizer, "neither steps entries alone nor makes orthogonal steps")
    for name in FACTORS:
        ratios = (
            lengths[s] / lengths[SQUARE] / step_rms(name, *s) * step_rms(name, *SQUARE) for s in (WIDE, TALL)
        )
        if all(abs(ratio - 1) < _NEAR for ratio in ratios):
            form = _decay(steps[SQUARE], decayed, weight.to(device))
            if form == "unknown" and decay_of(group):
                raise refused(optimizer, f"has a weight decay {UNKNOWN_DECAY}")
            return Rule(name, form)
    wide, tall = (lengths[shape] / lengths[SQUARE] for shape in (WIDE, TALL))
    raise refused(
        optimizer,
        f"steps 32 x 128 and 128 x 32 matrices {wide:.2f} and {tall:.2f} times as far as 32 x 32 ones",
    )


def _decay(free: Tensor, decayed: Tensor, weight: Tensor) -> Decay:
    """What of a step is weight decay, by a step with it and one without."""
    more, own = decayed - free, -_RATE * _DECAY * weight
    forms: dict[Decay, Tensor] = {"plain": own, "cautious": own * (decayed * weight <= 0)}
    for name, form in forms.items():
        if torch.allclose(more, form, rtol=1e-3, atol=1e-5):
            return name
    return "unknown"


def _step(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    flags: Mapping[str, bool | str],
    start: Tensor,
    gradient: Tensor,
) -> Tensor:
    """The first step of one matrix under the optimizer's own code; the optimizer itself stays as it is."""
    param = nn.Parameter(start.clone())
    param.grad = gradient.clone()
    rate = group["lr"]
    own = torch.full_like(rate, _RATE) if isinstance(rate, Tensor) else _RATE
    twin = object.__new__(type(optimizer))
    # schedulers put a bound `step` of the real one there
    twin.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    twin.param_groups = [{**group, "params": [param], "lr": own}]
    twin.state = defaultdict(dict, {param: dict(flags)} if flags else {})
    type(optimizer).step(twin)
    return param.detach() - start
