"""Hooks around ``optimizer.step()`` that give new entries a learning rate of their own (Eq. 27-28)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparkling_cli.errors import SparklingError, SpecError
from sparkling_cli.schedule.curves import fresh_factor
from sparkling_cli.schedule.rewarmup import Rewarmup
from sparkling_cli.training import fsdp1, megatron
from sparkling_cli.training.attached_once import attach, detach
from sparkling_cli.training.copies import copies
from sparkling_cli.training.history import History, read_history
from sparkling_cli.training.kept_step import KeptStep, kept_steps, scale_others
from sparkling_cli.training.moved import Moved, moved
from sparkling_cli.training.rules import Rule
from sparkling_cli.training.slices import (
    NewEntries,
    Piece,
    local_tensor,
    new_entries,
    new_entries_of_pieces,
)
from sparkling_cli.training.update import (
    Factor,
    StepCounts,
    correct_adam,
    correct_heavy_ball,
    in_closed_form,
    interpolate,
    is_adam,
    is_heavy_ball,
    keep,
    redo_adam,
)
from sparkling_cli.training.zero import base_of, is_zero, pieces_of
from sparkling_cli.widening.geometry import View


def rewarm(
    optimizer: Optimizer | Sequence[Optimizer],
    model: nn.Module | Iterable[tuple[str, Tensor] | Piece],
    checkpoint: Path | str | History,
    *,
    step: int | None = None,
    announce: bool = True,
    measure_every: int | None = None,
) -> Rewarming:
    r"""Give the new entries of an expanded model their own learning rate from now on.

    At every ``optimizer.step()`` the update of the entries that an expansion added is multiplied by
    ``eta_new(t)/eta_old(t)`` of ``sparkling/rewarmup.json``; weight decay with it, as under a larger rate.
    Old entries, the optimizer's class and its state stay as they are. After ``--keep-step``, updates of
    matrices that the optimizer orthogonalizes (Muon) are scaled as a whole, for good, so that old entries
    move as far as before; that takes a copy of these matrices at every step. A second call for the same
    parameters of the same optimizer takes the place of the first one.

    Args:
        optimizer: the optimizer, or several that share the model's parameters. Any torch optimizer, with
            any scheduler; wrapped by accelerate too; or a DeepSpeed engine's ``optimizer`` under ZeRO, or
            Megatron's distributed one. Call after loading its state, or before: all the same.
        model: the model, compiled, DDP-wrapped, sharded by ``fully_shard`` or ``FullyShardedDataParallel``,
            of Megatron its list of them too; or pairs of name and parameter as the optimizer holds them
            (master weights, say); or, where it holds flat tensors, all :class:`Piece`\ s of them.
        checkpoint: what ``sparkling expand`` wrote.
        step: optimizer steps done in the whole run. Default: the last expansion's step, which is right
            when training goes on from the expanded checkpoint itself. After a later one pass the step
            or load :meth:`Rewarming.state_dict`.
        announce: print one line on what begins to stderr, on the first rank.
        measure_every: also measure how far entries move, in every step whose number in the whole run is a
            multiple of this, for :meth:`Rewarming.metrics`. Such a step holds a copy of the parameters that
            have new entries.

    Returns:
        The handle: for its state in checkpoints, and to take the hooks off.

    Raises:
        SpecError: ``step`` lies before the expansion, or ``measure_every`` is less than 1, or the optimizer
            has made steps since an earlier call and ``step`` is not given.
        SparklingError: the checkpoint has no history, the model is not the expanded one, something is no
            torch optimizer or holds none of the model's parameters, fresh bias correction is asked of an
            optimizer without it, or a kept step of one for which it is not known how to.
    """
    history = checkpoint if isinstance(checkpoint, History) else read_history(checkpoint)
    optimizers, given = _optimizers(optimizer, model)
    pieces = [one for one in given if isinstance(one, Piece)]
    pairs = [one for one in given if not isinstance(one, Piece)]
    regions = [(p, new_entries(p, history.region(name, tuple(p.shape)))) for name, p in pairs]
    regions += _flat(pieces, history)
    found = {id(p): _Param(p, entries) for p, entries in regions if entries is not None}
    known = {id(p) for p, _ in regions}
    start = history.rewarmup.expansion_step if step is None else step
    if start < history.rewarmup.expansion_step:
        raise SpecError(
            f"step {start} lies before the expansion at step {history.rewarmup.expansion_step}",
            hint="pass the optimizer steps done in the whole run, or resume from the expanded checkpoint",
        )
    if measure_every is not None and measure_every < 1:
        raise SpecError(f"measure_every is {measure_every}, it counts steps from 1 on")
    flat = _flat_by_optimizer(optimizers, {id(piece.tensor) for piece in pieces})
    matrices = kept_steps(pairs, pieces, history)
    both = zip(optimizers, flat, strict=True)
    attached = [_made(o, found, known, own, history.rewarmup, start, matrices) for o, own in both]
    for one in attached:
        one.measure_every = measure_every
    replaced = attach(attached, step)
    if announce and _is_first_rank():
        held = {id(p.tensor): p for one in attached for p in one.params.values()}
        left = [name for name, p in pairs if id(p) in found.keys() - held.keys() and p.requires_grad]
        line = _line(held.values(), left, history.rewarmup, start)
        if history.rewarmup.kept_since is not None:
            line += f"; old entries' step is kept in {sum(len(one.matrices) for one in attached)} tensors"
        line += "; the hooks of an earlier call are off" if replaced else ""
        print(line, file=sys.stderr, flush=True)
    grown = tuple((p, history.view(name)) for name, p in pairs if id(p) in found) if history.growth else ()
    return Rewarming(tuple(attached), history, grown)


def _flat(pieces: Sequence[Piece], history: History) -> list[tuple[Tensor, NewEntries | None]]:
    """Flat tensors and their new entries."""
    by_tensor: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_tensor.setdefault(id(piece.tensor), []).append(piece)
    return [
        (held[0].tensor, new_entries_of_pieces((p, history.region(p.name, p.shape)) for p in held))
        for held in by_tensor.values()
    ]


def _flat_by_optimizer(optimizers: Sequence[Optimizer], flat: set[int]) -> list[set[int]]:
    """The flat tensors of every optimizer; one alone may hold them in turn, and none of them now."""
    if len(optimizers) == 1:
        return [flat]
    shares = [flat & _held(one) for one in optimizers]
    if flat - set().union(*shares):
        raise SpecError(
            "which of several optimizers steps which flat tensors cannot be seen: their groups are empty",
            hint="call rewarm() for each optimizer, with its own pieces",
        )
    return shares


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _optimizers(given: Any, model: Any) -> tuple[list[Optimizer], list[tuple[str, Tensor] | Piece]]:
    """The torch optimizers inside of wrappers, and what of the model they hold."""
    if isinstance(given, nn.Module) and isinstance(model, Optimizer):
        raise SpecError(
            "the model stands in the optimizer's place, and the optimizer in the model's",
            hint="rewarm(optimizer, model, checkpoint)",
        )
    single = isinstance(given, (Optimizer, str)) or is_zero(given) or not isinstance(given, Iterable)
    several = [part for one in ([given] if single else given) for part in megatron.chained(_unwrapped(one))]
    parts: list[tuple[str, Tensor] | Piece] = []
    for one in several:
        if megatron.is_distributed(one):
            parts += megatron.pieces_of(one, model)
        elif is_zero(one) and isinstance(model, nn.Module):
            parts += pieces_of(one, model)
    bases = [_checked(_base(one)) for one in several]
    if not parts and isinstance(model, nn.Module):
        wrapped = fsdp1.parts_of(model, set().union(*map(_held, bases)))
        parts += model.named_parameters() if wrapped is None else wrapped
    elif not parts:
        parts += model
    return bases, parts


def _base(one: Any) -> Any:
    """The torch optimizer that steps flat tensors inside of a framework's; any other as it is."""
    if megatron.is_distributed(one):
        return megatron.base_of(one)
    return base_of(one) if is_zero(one) else one


def _checked(one: Any) -> Optimizer:
    if not isinstance(one, Optimizer):
        inner = getattr(one, "optimizer", None)
        raise SpecError(
            f"{type(one).__name__} is no torch.optim.Optimizer: there is no step() to act on",
            hint=f"pass the {type(inner).__name__} that it holds as .optimizer, with the model's named "
            "parameters"
            if isinstance(inner, Optimizer)
            else "pass the torch optimizer whose step() changes the model's parameters",
        )
    if hasattr(one, "param_d2h_map"):  # torchao's, without a base class to tell it by
        raise SpecError(
            f"{type(one).__name__} steps copies of the parameters in the host's memory and overwrites "
            "the parameters by them: what is changed beside it would be lost",
            hint="train with an optimizer that holds the model's own parameters, at least until the "
            "re-warmup has ended",
        )
    return one


def _is_first_rank() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _line(params: Iterable[_Param], left: Sequence[str], rewarmup: Rewarmup, start: int) -> str:
    """One line on what begins: how many entries, until when, and to which rate; and what is left out."""
    stage = rewarmup.stages[-1]
    own = [param for param in params if stage.stage in param.entries.stages]
    count = sum(piece.numel() for p in own for piece in p.entries.of(p.tensor, stage.stage))
    parts = any(local_tensor(p.tensor) is not p.tensor or p.entries.windows[0].start is not None for p in own)
    place = " of this process" if parts else ""
    end = stage.expansion_step + stage.steps
    until = f"until step {end:,}: {stage.rho:g} x" if start < end else f"past step {end:,}: {stage.rho:g} x"
    line = f"re-warming {count:,} entries in {len(own)} tensors{place} {until}, then as the rest"
    if left:
        line += f"; {len(left)} more are in none of these optimizers ({left[0]}{', …' if left[1:] else ''})"
    return line


@dataclass(frozen=True)
class _Param:
    tensor: Tensor  # holds it, so that its id stays its own
    entries: NewEntries


@dataclass
class Rewarming:
    """A running re-warmup: its state for checkpoints, and the way to end it."""

    _attached: tuple[_Attached, ...]
    history: History
    _grown: tuple[tuple[Tensor, View], ...] = ()

    @property
    def step(self) -> int:
        """Optimizer steps done in the whole run (skipped ones not counted)."""
        return self._attached[0].step

    def metrics(self) -> dict[str, float]:
        """For a logger: what the step just made gave the last expansion's new entries.

        ``learning_rate_new`` is eta_new on the scale of the first parameter group that holds some, and
        ``learning_rate_ratio`` is eta_new / eta_old. Before the first step both are those of the next one.
        ``share_locked`` is the share of these entries that are as near to the entries that they were copied
        from as 1 % of their tensor's RMS, and ``cosine_of_copies`` the cosine between both, in tensors that
        lie in this process as a whole; this takes a few copies of one tensor at a time.
        ``update_rms_new`` and ``update_rms_old`` are the root mean squares of the updates of these entries
        and of all others in the same parameters, as far as this process holds them, in the last step that
        ``measure_every`` chose; they are there from that step on.
        """
        rate, ratio = self._rate_and_ratio()
        found = {"learning_rate_new": ratio * rate, "learning_rate_ratio": ratio, **self.update_rms}
        return {**found, **copies(self._grown)}

    @property
    def update_rms(self) -> dict[str, float]:
        """``update_rms_new`` and ``update_rms_old`` of :meth:`metrics`, once they have been measured."""
        moved = sum((a.moved for a in self._attached), Moved())
        return moved.rms()

    @property
    def learning_rate_new(self) -> float:
        """See :meth:`metrics`; without the cost of looking at weights."""
        rate, ratio = self._rate_and_ratio()
        return ratio * rate

    def figures(self) -> dict[str, float]:
        """For a log: the new entries' rate, which costs nothing; with ``measure_every`` all metrics."""
        measures = any(one.measure_every for one in self._attached)
        return self.metrics() if measures else {"learning_rate_new": self.learning_rate_new}

    def _rate_and_ratio(self) -> tuple[float, float]:
        attached = next((a for a in self._attached if a.params), self._attached[0])
        return attached.applied or attached.rate_and_ratio()

    def state_dict(self) -> dict[str, Any]:
        """The step counters: all that a later process needs beside the expanded checkpoint."""
        return {"steps": [a.step for a in self._attached]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; counters from before the last expansion count as its step.

        Raises:
            SpecError: it was made with another number of optimizers.
        """
        steps, first = state["steps"], self.history.rewarmup.expansion_step
        if len(steps) != len(self._attached):
            raise SpecError(f"state of {len(steps)} optimizer(s), but {len(self._attached)} are attached")
        for attached, step in zip(self._attached, steps, strict=True):
            attached.step = max(int(step), first)  # the ratios are defined from there on
            attached.reference.clear()

    def remove(self) -> None:
        """Take the hooks off; the optimizer is as it was."""
        for attached in self._attached:
            detach(attached)


@dataclass(eq=False)
class _Attached:
    """One optimizer with its hooks."""

    optimizer: Optimizer
    params: dict[int, _Param]
    rewarmup: Rewarmup
    step: int
    handles: list[Any] = field(default_factory=list)
    kept: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    #: group -> the step at which its rate was first compared, and its ratio to the baseline there
    reference: dict[int, tuple[int, float]] = field(default_factory=dict)
    warned: bool = False
    looked: bool = False
    #: rate of old entries, and eta_new / eta_old of the last expansion, in the step just made
    applied: tuple[float, float] | None = None
    measure_every: int | None = None
    #: flat tensors that are stepped in turn: all of them make one step of the run; empty for usual optimizers
    flat: frozenset[int] = frozenset()
    stepped: set[int] = field(default_factory=set)
    #: what is scaled so that old entries step as far as before, and what this process held of it before
    matrices: dict[int, KeptStep] = field(default_factory=dict)
    starts: dict[int, Tensor] = field(default_factory=dict)
    #: parameters with new entries before a step that is measured, and how far they have moved in the last one
    copies: dict[int, Tensor] = field(default_factory=dict)
    counts: StepCounts = field(default_factory=StepCounts)
    #: the call that is running makes no step of the run
    no_step: bool = False
    moved: Moved = field(default_factory=Moved)

    def rate_and_ratio(self) -> tuple[float, float]:
        """The rate of the first group with new entries now, and eta_new / eta_old at this step."""
        groups = self.optimizer.param_groups
        rates = [float(g["lr"]) for g in groups if any(id(p) in self.params for p in g["params"])]
        return (rates or [float(groups[0]["lr"])])[0], self.rewarmup.curves[-1].ratio(self.step)

    @torch.no_grad()
    def before(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        """Keep new entries whose update cannot be found again after the step."""
        self.no_step = self._only_makes_state()
        if self.no_step:
            return
        rates = self._rates()
        self._compare_rates()
        self._look_for_state()
        if self.measure_every is not None and (self.step + 1) % self.measure_every == 0:
            self.copies = {id(p.tensor): local_tensor(p.tensor).clone() for _, p in self._live()}
        if not is_adam(self.optimizer):
            self.starts = {i: local_tensor(kept.param).clone() for i, kept in self.matrices.items()}
        for group, param in self._live():
            if in_closed_form(self.optimizer, group, param.tensor):
                continue
            for stage in param.entries.stages:
                if rates[stage] != 1.0 or stage in self._fresh:
                    self.kept[id(param.tensor), stage] = keep(param.tensor, param.entries, stage)

    @torch.no_grad()
    def after(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        """Scale the new entries' update, and count the step unless GradScaler skipped it."""
        kept, self.kept = self.kept, {}
        copies, self.copies = self.copies, {}
        starts, self.starts = self.starts, {}
        if self.no_step or self._skipped():
            return
        rates = self._rates()
        self.applied = self.rate_and_ratio()
        if is_adam(self.optimizer):
            self._correct_adam(rates, kept)
        else:
            scale_others(self.optimizer, self.matrices, starts)
            self._correct_others(rates, kept)
        if copies:
            self.moved = self._moved(copies) + (self.moved if self.stepped else Moved())
        self._count()

    def _count(self) -> None:
        """One more step, or a part of one, of an optimizer that is given its flat tensors in turn."""
        self.stepped |= _held(self.optimizer) & self.flat
        if self.stepped == self.flat:
            self.stepped.clear()
            self.step += 1

    def _moved(self, copies: Mapping[int, Tensor]) -> Moved:
        last = self.rewarmup.stages[-1].stage
        held = [p for _, p in self._live()]
        return sum((moved(p.tensor, copies[id(p.tensor)], p.entries, last) for p in held), Moved())

    def _correct_adam(self, rates: Mapping[int, float], kept: Mapping[tuple[int, int], list[Tensor]]) -> None:
        # a parameter without a gradient made no step
        live = [(g, p) for g, p in self._live() if p.tensor.grad is not None]
        if all(rates[s] == 1.0 and s not in self._fresh for _, p in live for s in p.entries.stages):
            live = []
        scaled = [one for one in self.matrices.values() if one.param.grad is not None]
        params = [*(p.tensor for _, p in live), *(one.param for one in scaled)]
        steps = self.counts.steps(self.optimizer, params)
        for one in scaled:
            steps[id(one.param)] = one.scaled(steps[id(one.param)])
        for group, param in live:
            made = steps[id(param.tensor)]
            for stage in param.entries.stages:
                factor = Factor(rates[stage], self._moment(stage, group, made.count))
                if factor.nothing:
                    continue
                old = kept.get((id(param.tensor), stage))
                if old is None:
                    correct_adam(param.tensor, param.entries, stage, made, factor)
                else:
                    redo_adam(param.tensor, old, param.entries, stage, made, factor)

    def _correct_others(
        self, rates: Mapping[int, float], kept: Mapping[tuple[int, int], list[Tensor]]
    ) -> None:
        for group, param in self._live():
            buffer = self.optimizer.state.get(param.tensor, {}).get("momentum_buffer")
            for stage in param.entries.stages:
                old = kept.get((id(param.tensor), stage))
                if old is not None:
                    interpolate(param.tensor, old, param.entries, stage, rates[stage])
                elif is_heavy_ball(self.optimizer, group) and param.tensor.grad is not None:
                    more = (rates[stage] - 1) * float(group["lr"])
                    correct_heavy_ball(param.tensor, buffer, param.entries, stage, more)

    def _rates(self) -> dict[int, float]:
        """eta_new / eta_old of every stage at this step; stages without a schedule stay at 1."""
        known = {
            s.stage: curve.ratio(self.step)
            for s, curve in zip(self.rewarmup.stages, self.rewarmup.curves, strict=True)
        }
        stages = {stage for p in self.params.values() for stage in p.entries.stages}
        return {stage: known.get(stage, 1.0) for stage in stages}

    @cached_property
    def _fresh(self) -> dict[int, int]:
        """Stages whose new entries get the bias correction of a fresh Adam -> the step of their expansion."""
        return {s.stage: s.expansion_step for s in self.rewarmup.stages if s.bias_correction == "fresh"}

    def _moment(self, stage: int, group: Mapping[str, Any], count: float) -> float:
        if stage not in self._fresh:
            return 1.0
        beta1, beta2 = (float(b) for b in group["betas"])
        return fresh_factor(beta1, beta2, self.step - self._fresh[stage] + 1, int(count))

    def _live(self) -> list[tuple[dict[str, Any], _Param]]:
        """Group and parameter of all that the optimizer holds now."""
        live = [
            (group, self.params[id(p)])
            for group in self.optimizer.param_groups
            for p in group["params"]
            if id(p) in self.params
        ]
        if self.stepped & _held(self.optimizer) or (not self.flat and len(live) != len(self.params)):
            raise SparklingError(
                "the optimizer's parameters are not those that it had when rewarm() was called",
                hint="call rewarm() after the model is sharded, moved and cast",
            )
        return live

    def _only_makes_state(self) -> bool:
        """Whether it is the call by which ``torch.distributed.checkpoint`` makes state to load into.

        It is made of an optimizer without any, with gradients of zero and a rate of zero.
        """
        groups = self.optimizer.param_groups
        if self.optimizer.state or any(float(group["lr"]) != 0 for group in groups):
            return False
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        return bool(gradients) and not any(bool(local_tensor(one).any()) for one in gradients)

    def _skipped(self) -> bool:
        """Whether a fused optimizer found Inf under GradScaler and did nothing."""
        found = getattr(self.optimizer, "found_inf", None)
        return isinstance(found, Tensor) and bool(found.item())

    def _look_for_state(self) -> None:
        """Warn at the first step of an optimizer that starts from nothing: copies then stay copies."""
        if self.looked:
            return
        self.looked = True
        has_momentum = any(group.get("momentum", True) for group in self.optimizer.param_groups)
        if (
            has_momentum
            and self.params
            and not any(self.optimizer.state.get(p.tensor) for p in self.params.values())
        ):
            warnings.warn(
                f"{type(self.optimizer).__name__} has no state at step {self.step}: old and new entries "
                "start alike, and copies will not part from their sources. Load the optimizer state of the "
                "expanded checkpoint before the first step (weights without state: expand with --init "
                "random-copy)",
                stacklevel=4,
            )

    def _compare_rates(self) -> None:
        """Warn once when the groups' rates leave the baseline that the ratios were computed from."""
        base = self.rewarmup.baseline(self.step)
        if self.warned or base <= 0:
            return
        for i, group in enumerate(self.optimizer.param_groups):
            if float(group["lr"]) == 0:  # frozen for now, or a schedule that begins at zero
                continue
            share = float(group["lr"]) / base
            since, first = self.reference.setdefault(i, (self.step, share))
            if abs(share - first) > 0.01 * abs(first):
                self.warned = True
                warnings.warn(
                    f"at step {self.step} the learning rate of parameter group {i} is "
                    f"{float(group['lr']):.6g}; rewarmup.json has {base:.6g} there, and the ratio of the two "
                    f"changed from {first:.3g} to {share:.3g} since step {since}: the scheduler is not the "
                    "one in rewarmup.json, or the step is not right. New entries still get eta_new/eta_old "
                    "times it",
                    stacklevel=4,
                )
                return


def _made(
    optimizer: Optimizer,
    found: Mapping[int, _Param],
    known: set[int],
    flat: set[int],
    rewarmup: Rewarmup,
    step: int,
    matrices: Iterable[KeptStep],
) -> _Attached:
    # of an optimizer that is given flat tensors in turn, the groups may be empty between steps
    held = _held(optimizer) | flat
    if not held & known:
        raise SparklingError(
            f"the optimizer {type(optimizer).__name__} holds none of the model's parameters",
            hint="make it after the model is wrapped, or pass the pairs of name and parameter that it was "
            "made from",
        )
    if not is_adam(optimizer) and any(s.bias_correction == "fresh" for s in rewarmup.stages):
        raise SpecError(
            f"fresh bias correction is for torch's Adam and AdamW, found {type(optimizer).__name__}",
            hint="expand with --bias-correction inherit",
        )
    params = {i: param for i, param in found.items() if i in held}
    rules: dict[Any, Rule | None] = {}
    own = (m.found_for(optimizer, rules) for m in matrices if id(m.param) in held)
    scaled = {id(m.param): m for m in own if m is not None}
    return _Attached(optimizer, params, rewarmup, step, flat=frozenset(flat), matrices=scaled)


def _unwrapped(optimizer: Any) -> Any:
    """What accelerate's wrapper, or Fabric's, holds."""
    while isinstance(optimizer, Optimizer) and not is_zero(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer) and not is_zero(inner):
            break
        optimizer = inner
    return optimizer
