"""Old entries of a matrix that has grown step as far as before, under an optimizer that orthogonalizes.

Muon's step moves the entries of an a x b matrix by an RMS that follows from the shape, and shares it out
among old and new entries by their momentum. With ``r(a, b)`` the RMS by shape, and the update's RMS over
the whole matrix and over its old entries, the whole update is multiplied by ::

    r(before) / r(now) * rms(whole) / rms(old)

so that old entries have the RMS of the matrix as it was: in the first steps, when new entries have hardly any
momentum yet, and later, when all have alike.

A tensor whose entries carry a factor c because the model multiplies what they make by a number of its width
(``sqrt(hidden)`` on embeddings, ``1 / hidden`` on logits) moves what the model computes 1/c times as far by
the same step. Its steps are multiplied by c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparkling_cli.errors import SparklingError, SpecError
from sparkling_cli.formats.muon import step_rms
from sparkling_cli.training.history import History
from sparkling_cli.training.rules import ADAM, UNKNOWN_DECAY, Rule, decay_of, is_candidate, refused, rule_for
from sparkling_cli.training.slices import NewEntries, Piece, local_tensor, new_entries
from sparkling_cli.training.update import PRECISE, AdamStep, is_adam

#: the largest quotient of both RMS: where old entries have hardly any momentum (frozen by a mask, say), new
#: ones would be thrown far
MOST = 2.0


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
        if not is_candidate(optimizer, group):
            self._check_carries_nothing(optimizer)
            return None
        state = optimizer.state.get(self.param, {})
        flags = {key: value for key, value in state.items() if isinstance(value, (bool, str))}
        key = (id(optimizer), number, self.param.device, tuple(sorted(flags.items())))
        if key not in known:
            known[key] = rule_for(optimizer, group, flags, self.param.device)
        rule = known[key]
        if rule is None or self.param.ndim < 2:
            self._check_carries_nothing(optimizer)
            return None
        if self.param.ndim != 2:
            raise refused(optimizer, f"orthogonalizes a tensor of shape {tuple(self.param.shape)} in parts")
        return self._found(optimizer, rule)

    def _check_carries_nothing(self, optimizer: Optimizer) -> None:
        if self.carried != 1:
            raise refused(optimizer, f"steps {self.name}, which carries a factor of {self.carried:.3g}")

    def _found(self, optimizer: Optimizer, rule: Rule) -> KeptStep:
        if self.param.dtype not in PRECISE:
            raise refused(optimizer, f"steps {self.param.dtype} parameters, which round most of a step away")
        return replace(self, rule=rule)

    def scaled(self, made: AdamStep) -> AdamStep:
        """Adam's step just made, after the whole parameter's has been scaled in place by what it carries."""
        first, second = (local_tensor(made.state[slot]) for slot in ("exp_avg", made.second))
        denominator = second.sqrt().add_(made.eps)
        local_tensor(self.param).addcdiv_(first, denominator, value=(1 - self.carried) * made.size)
        return replace(made, size=self.carried * made.size)

    def scale(self, start: Tensor, group: Mapping[str, Any]) -> None:
        """Scale the step just made, in place; weight decay stays as it is.

        Args:
            start: what this process held of the matrix before it.
            group: that the optimizer has it in.
        """
        if self.rule is None:
            return
        local = local_tensor(self.param)
        moved = local - start
        decay = float(group["lr"]) * decay_of(group)
        if decay:
            if self.rule.decay == "unknown":
                raise SparklingError(f"the optimizer's weight decay is {decay_of(group)}, {UNKNOWN_DECAY}")
            decayed = start * decay * moved.any()  # what made no step has not decayed either
            moved += decayed.mul_(moved * start <= 0) if self.rule.decay == "cautious" else decayed
        local.add_(moved.mul_(self._factor(moved) - 1))

    def _factor(self, moved: Tensor) -> Tensor | float:
        """By what the update is multiplied: one number where the update lies, which nothing waits for."""
        assert self.rule is not None
        (rows, columns), (rows_before, columns_before) = self.param.shape, self.before
        by_shape = step_rms(self.rule.factor, rows_before, columns_before)
        by_shape /= step_rms(self.rule.factor, rows, columns)
        by_shape *= self.carried
        if not self.old:
            return by_shape
        wide = torch.float32 if moved.device.type == "mps" else torch.float64
        new = moved.new_zeros((), dtype=wide)
        for stage in self.entries.stages:
            if stage >= self.since:
                for piece in self.entries.of(moved, stage):
                    new += piece.square().sum(dtype=wide)
        whole, newer = _of_all_ranks(self.param, torch.stack([moved.square().sum(dtype=wide), new]))
        old = (whole - newer) / self.old
        share = (whole / (rows * columns) / old).sqrt().clamp(max=MOST)
        return torch.where(old > 0, by_shape * share, 1.0)  # old entries may not move at all


def kept_steps(
    pairs: Sequence[tuple[str, Tensor]], pieces: Sequence[Piece], history: History
) -> list[KeptStep]:
    """What may step otherwise since it is asked to be kept, whether this process holds new entries or not.

    Raises:
        SpecError: something of it lies in flat tensors.
    """
    since = history.rewarmup.kept_since
    found: list[KeptStep] = []
    if since is None:
        return found
    flat = next((piece.name for piece in pieces if history.carried(piece.name, since) != 1), None)
    if flat is not None:
        raise SpecError(
            f"{flat} lies in a flat tensor: its step cannot be kept there (--keep-step)",
            hint="expand without --keep-step",
        )
    for name, param in pairs:
        region, carried = history.region(name, tuple(param.shape)), history.carried(name, since)
        if carried != 1 or (param.ndim > 1 and max(region.stages) >= since):
            old = sum(region.count(stage) for stage in region.stages if stage < since)
            entries = new_entries(param, region) or NewEntries(())
            before = history.shape_before(name, since)
            found.append(KeptStep(name, param, entries, since, before, old, carried))
    return found


def scale_others(optimizer: Optimizer, kept: Mapping[int, KeptStep], starts: Mapping[int, Tensor]) -> None:
    """Scale the step just made of everything that was kept before it."""
    for group in optimizer.param_groups:
        for param in group["params"] if starts else ():
            if id(param) in starts:
                kept[id(param)].scale(starts[id(param)], group)


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
