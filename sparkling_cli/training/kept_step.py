"""Old entries of a matrix that has grown step as far as before, under an optimizer that orthogonalizes.

Muon's step moves the entries of an a x b matrix by an RMS that follows from the shape, and shares it out
among old and new entries by their momentum. With ``r(a, b)`` the RMS by shape, and the update's RMS over
the whole matrix and over its old entries, the whole update is multiplied by ::

    r(before) / r(now) * rms(whole) / rms(old)

so that old entries have the RMS of the matrix as it was: in the first steps, when new entries have hardly any
momentum yet, and later, when all have alike. How an optimizer's step depends on the shape, and what of it is
weight decay, is found by steps of its own on small matrices, not by its name.

A tensor whose entries carry a factor c because the model multiplies what they make by a number of its width
(``sqrt(hidden)`` on embeddings, ``1 / hidden`` on logits) moves what the model computes 1/c times as far by
the same step. Its steps are multiplied by c.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparkling_cli.errors import SparklingError
from sparkling_cli.formats.muon import FACTORS, rule_of, step_rms
from sparkling_cli.training.slices import NewEntries, local_tensor
from sparkling_cli.training.update import PRECISE, AdamStep, is_adam

#: rows and columns of the small matrices: no two rules give the three the same ratios
SQUARE, WIDE, TALL = (32, 32), (32, 128), (128, 32)
_RATE, _DECAY = 0.5, 0.1
#: how far a measured ratio may lie from a rule's: rules are at least twice apart, Newton-Schulz errs by 5 %
_NEAR = 0.25

_UNKNOWN_DECAY = "and is not the rate times the decay times the weight: the step cannot be told from it"

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


@dataclass(frozen=True)
class KeptStep:
    """A parameter whose step is scaled.

    Attributes:
        name: of the parameter.
        param: the optimizer's tensor.
        entries: what this process holds of its new entries.
        since: the expansion that was asked to keep the step: entries of it and of later ones are new.
        before: rows and columns before that expansion.
        old: how many entries are older, in the whole matrix.
        carried: the factor that the entries carry for the width, 1 of most.
        rule: see :class:`Rule`.
    """

    name: str
    param: Tensor
    entries: NewEntries
    since: int
    before: tuple[int, ...]
    old: int
    carried: float = 1.0
    rule: Rule | None = None

    def found_for(self, optimizer: Optimizer, known: dict[Any, Rule | None]) -> KeptStep | None:
        """The same with the rule of the optimizer that holds it; None if it steps as far as before by itself.

        Args:
            optimizer: holds the matrix.
            known: rules that were found before, which is added to.

        Raises:
            SparklingError: the optimizer orthogonalizes by a rule that is not known, the matrix is one of
                a stack, its dtype is too coarse to see a step by, or its entries carry a factor under an
                optimizer that is none of torch's Adam, AdamW and those that orthogonalize.
        """
        if is_adam(optimizer):
            return self._found(optimizer, ADAM) if self.carried != 1 else None
        number, group = next(
            (i, g) for i, g in enumerate(optimizer.param_groups) if any(p is self.param for p in g["params"])
        )
        if not _is_candidate(optimizer, group):
            self._check_carries_nothing(optimizer)
            return None
        state = optimizer.state.get(self.param, {})  # Moonlight's class has there which are orthogonalized
        flags = {key: value for key, value in state.items() if isinstance(value, bool)}
        key = (id(optimizer), number, self.param.device, tuple(sorted(flags.items())))
        if key not in known:
            known[key] = _probed(optimizer, group, flags, self.param.device)
        rule = known[key]
        if rule is None or self.param.ndim < 2:
            self._check_carries_nothing(optimizer)
            return None
        if self.param.ndim != 2:
            raise _refused(optimizer, f"orthogonalizes a tensor of shape {tuple(self.param.shape)} in parts")
        return self._found(optimizer, rule)

    def _check_carries_nothing(self, optimizer: Optimizer) -> None:
        if self.carried != 1:
            raise _refused(optimizer, f"steps {self.name}, which carries a factor of {self.carried:.3g}")

    def _found(self, optimizer: Optimizer, rule: Rule) -> KeptStep:
        if self.param.dtype not in PRECISE:
            raise _refused(optimizer, f"steps {self.param.dtype} parameters, which round most of a step away")
        return replace(self, rule=rule)

    def scaled(self, made: AdamStep) -> AdamStep:
        """Adam's step just made, after the whole parameter's has been scaled in place by what it carries."""
        first, second = (local_tensor(made.state[slot]) for slot in ("exp_avg", made.second))
        denominator = second.sqrt().div_(made.root).add_(made.eps)
        local_tensor(self.param).addcdiv_(first, denominator, value=(1 - self.carried) * made.size)
        return replace(made, size=self.carried * made.size)

    def scale(self, start: Tensor, group: Mapping[str, Any]) -> None:
        """Scale the step just made, in place; weight decay stays as it is.

        Args:
            start: what this process held of the matrix before it.
            group: that the optimizer has it in.
        """
        if self.param.grad is None or self.rule is None:
            return
        local = local_tensor(self.param)
        moved = local - start
        decay = float(group["lr"]) * _decay_of(group)
        if decay:
            if self.rule.decay == "unknown":
                raise SparklingError(f"the optimizer's weight decay is {_decay_of(group)}, {_UNKNOWN_DECAY}")
            decayed = start * decay
            moved += decayed.mul_(moved * start <= 0) if self.rule.decay == "cautious" else decayed
        factor = self._factor(moved)
        if factor is not None:
            local.add_(moved, alpha=factor - 1)

    def _factor(self, moved: Tensor) -> float | None:
        """By what the update is multiplied; None where nothing moves."""
        assert self.rule is not None
        (rows, columns), (rows_before, columns_before) = self.param.shape, self.before
        by_shape = step_rms(self.rule.factor, rows_before, columns_before)
        by_shape /= step_rms(self.rule.factor, rows, columns)
        by_shape *= self.carried
        if not self.old:
            return by_shape
        new = moved.new_zeros((), dtype=torch.float64)
        for stage in self.entries.stages:
            if stage >= self.since:
                for piece in self.entries.of(moved, stage):
                    new += piece.square().sum(dtype=torch.float64)
        sums = _of_all_ranks(self.param, torch.stack([moved.square().sum(dtype=torch.float64), new]))
        whole, newer = sums.tolist()
        old = (whole - newer) / self.old
        if old <= 0 or not isfinite(whole):
            return None
        return by_shape * sqrt(whole / (rows * columns) / old)


def _of_all_ranks(param: Tensor, sums: Tensor) -> Tensor:
    """Sums over the entries that a process holds, added up over the processes that share the parameter."""
    placements = getattr(param, "placements", None)
    if placements is None:
        return sums
    from torch.distributed.tensor import DTensor, Partial, Replicate

    shared = [Replicate() if getattr(p, "dim", None) is None else Partial() for p in placements]
    mesh = param.device_mesh  # type: ignore[attr-defined]
    whole: Tensor = DTensor.from_local(sums, mesh, shared, run_check=False).full_tensor()
    return whole


def _decay_of(group: Mapping[str, Any]) -> float:
    return float(group.get("weight_decay", group.get("wd", 0.0)) or 0.0)


def _is_candidate(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether a group may be one whose matrices are orthogonalized, by its options or the class's name."""
    return rule_of(group) is not None or "muon" in type(optimizer).__name__.lower()


def _refused(optimizer: Optimizer, why: str) -> SparklingError:
    return SparklingError(
        f"{type(optimizer).__name__} {why}: how to keep the step of old entries (--keep-step) is not known",
        hint="expand without --keep-step, and see docs/how-to/optimizers.md for a rate of their own",
    )


def _probed(
    optimizer: Optimizer, group: Mapping[str, Any], flags: Mapping[str, bool], device: torch.device
) -> Rule | None:
    """The rule by which the optimizer's own first step of small matrices goes; None if entries step alone.

    Raises:
        SparklingError: there is none, or the optimizer cannot step such matrices by themselves.
    """
    inner = [name for name, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    if inner:
        raise _refused(optimizer, f"holds another optimizer ({inner[0]})")
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
        raise _refused(
            optimizer, f"does not step a matrix by itself ({type(error).__name__}: {error})"
        ) from error
    if torch.allclose(steps[WIDE][:, : SQUARE[1]], steps[SQUARE], rtol=1e-4, atol=1e-7):
        return None
    lengths = {shape: float(one.square().mean().sqrt()) for shape, one in steps.items()}
    singular = torch.linalg.svdvals(steps[WIDE].double())  # of the gradient, from 1 to 0.1
    if not lengths[SQUARE] or float(singular[-1] / singular[0]) < _ORTHOGONAL:
        raise _refused(optimizer, "neither steps entries alone nor makes orthogonal steps")
    for name in FACTORS:
        ratios = (
            lengths[s] / lengths[SQUARE] / step_rms(name, *s) * step_rms(name, *SQUARE) for s in (WIDE, TALL)
        )
        if all(abs(ratio - 1) < _NEAR for ratio in ratios):
            form = _decay(steps[SQUARE], decayed, weight.to(device))
            if form == "unknown" and _decay_of(group):
                raise _refused(optimizer, f"has a weight decay {_UNKNOWN_DECAY}")
            return Rule(name, form)
    wide, tall = (lengths[shape] / lengths[SQUARE] for shape in (WIDE, TALL))
    raise _refused(
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
    optimizer: Optimizer, group: Mapping[str, Any], flags: Mapping[str, bool], start: Tensor, gradient: Tensor
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
