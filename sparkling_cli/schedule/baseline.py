"""The schedule that the source run was on: from the trainer's own files, completed by the spec."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields
from math import inf, isclose
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from sparkling_cli.errors import SpecError
from sparkling_cli.schedule.curves import HALF_WAVE, Curve
from sparkling_cli.spec.choices import BaselineType
from sparkling_cli.spec.model import BaselineSpec
from sparkling_cli.spec.options import OPTIONS, as_options

if TYPE_CHECKING:
    from sparkling_cli.formats.model import Checkpoint

#: no run has as many steps; a damaged file may say so
_STEPS = 10**12
_OPTION = OPTIONS[BaselineSpec]
_DESCRIBE = f"describe what remains of it by {_OPTION['type']} and the options beside it"


def baseline_of(checkpoint: Checkpoint, given: BaselineSpec) -> tuple[Curve, int]:
    """The old entries' curve and the expansion step.

    What ``given`` states wins over what the trainer's files say.

    Args:
        checkpoint: its ``facts`` may hold ``global_step``, ``max_steps``, ``base_lrs``, ``last_lrs``,
            ``last_epoch`` and ``schedule`` (``type``, ``warmup_steps``, ``peak``, ``minimum``, ``kwargs``).
        given: from the spec; all None = read everything.

    Raises:
        SpecError: something is known from neither, the two do not make a schedule that goes on, or the
            scheduler's own record of its last rate contradicts what was read.
    """
    stated = {k: v for k, v in given.model_dump().items() if v is not None}
    read = known(checkpoint, stated)
    values = {"initial": 0.0, "minimum": 0.0, **read, **stated}
    needed = ["type", "peak", "total_steps", "expansion_step", "warmup_steps", "minimum"]
    if values.get("type") == "wsd":
        needed.append("decay_steps")
    missing = [name for name in needed if values.get(name) is None]
    if missing:
        choices = {"type": f" {'|'.join(get_args(BaselineType))}"}
        raise SpecError(
            f"{_name(checkpoint)}: the learning-rate schedule's {', '.join(missing)} cannot be read from "
            f"this checkpoint{' (' + values['type'] + ')' if values.get('type') else ''}",
            hint="pass " + ", ".join(f"{_OPTION[name]}{choices.get(name, '')}" for name in missing),
        )
    step = int(values.pop("expansion_step"))
    try:
        curve = Curve(**{f.name: values[f.name] for f in fields(Curve) if values.get(f.name) is not None})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise SpecError(
            f"{_name(checkpoint)}: the schedule's {field} is damaged: {first['msg']}", hint=_DESCRIBE
        ) from None
    _check(curve, step)
    if not stated.keys() & {"type", "peak", "minimum", "warmup_steps", "decay_steps", "decay", "total_steps"}:
        _check_record(checkpoint, curve)
    return curve, step


def doubts(checkpoint: Checkpoint, given: BaselineSpec) -> tuple[str, ...]:
    """A stated peak that is none of the rates in the trainer's files, in words.

    Args:
        checkpoint: see :func:`baseline_of`.
        given: from the spec.
    """
    facts = checkpoint.facts
    peak = (facts.get("schedule") or {}).get("peak")
    rates = [peak, *(facts.get("base_lrs") or ()), *(facts.get("last_lrs") or ())]
    found = [float(rate) for rate in rates if isinstance(rate, (int, float))]
    if given.peak is None or not found or any(isclose(given.peak, rate, rel_tol=1e-6) for rate in found):
        return ()
    read = " and ".join(f"{rate:g}" for rate in sorted(set(found), reverse=True))
    return (
        f"{_OPTION['peak']} {given.peak:g}: the checkpoint's own files have {read}; a run that resumes with "
        "these is on another schedule than the re-warmup is made for",
    )


def known(checkpoint: Checkpoint, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a curve, and ``expansion_step``, as far as the trainer's files say them.

    None stands for what the run's schedule has and the files do not say.

    Raises:
        SpecError: the run's schedule cannot be computed in advance, and ``stated`` has none in its place.
    """
    facts = checkpoint.facts
    schedule = facts.get("schedule") or {}
    read: dict[str, Any] = {}
    name: str | None = schedule.get("type")
    if name is not None and name in _READ:
        found = {"warmup_steps": schedule.get("warmup_steps"), **_READ[name](_Source(checkpoint, stated))}
        if stated.get("type") in (None, found["type"]):
            read = found
    elif name is not None and "type" not in stated:
        why = (
            "follows a metric, so that its rates cannot be known in advance"
            if name in _BY_METRIC
            else "is not one that is known here"
        )
        raise SpecError(
            f"the run's schedule {name!r} {why}",
            hint=f"{_DESCRIBE}; schedules that are read: {', '.join(sorted(_READ))}",
        )
    elif name is None and "type" not in stated:
        read = {"warmup_steps": schedule.get("warmup_steps")}
    if schedule.get("peak") is not None:
        read["peak"] = schedule["peak"]
    if facts.get("max_steps"):
        read["total_steps"] = int(facts["max_steps"])
    if facts.get("global_step") is not None:
        read["expansion_step"] = int(facts["global_step"])
    return read


def schedule_command(checkpoint: Checkpoint, where: str) -> str:
    """The command that adds a re-warmup schedule to an output.

    Args:
        checkpoint: the output or its source, for what their files do not say: it is made up by an example.
        where: the output, as the command names it.
    """
    try:
        baseline_of(checkpoint, BaselineSpec())
        more: list[str] = []
    except SpecError:
        more = list(as_options(example(checkpoint)))
    return shlex.join(["sparkling", "schedule", where, "--write", *more])


def example_words(checkpoint: Checkpoint) -> str:
    """What :func:`example` is, in words."""
    rate, what = _example_rate(checkpoint)
    return f"an example that holds the {what} rate" if what else f"an example; {rate:g} is only a placeholder"


def _example_rate(checkpoint: Checkpoint) -> tuple[float, str]:
    """A rate, and which one of the run's it is; "" where the files have none."""
    facts = checkpoint.facts
    log = [entry.get("learning_rate") for entry in facts.get("log_history") or () if isinstance(entry, dict)]
    present = (facts.get("last_lrs"), [group.get("lr") for group in checkpoint.param_groups], log[::-1])
    for number, given in enumerate(present):
        rates = [float(r) for r in given or () if isinstance(r, (int, float)) and 0 < r < inf]
        if rates:  # of groups the largest, of a log the last
            return (max(rates), "present") if number < 2 else (rates[0], "last logged")
    peak = (facts.get("schedule") or {}).get("peak")
    return (float(peak), "highest") if isinstance(peak, (int, float)) and peak > 0 else (1e-4, "")


def example(checkpoint: Checkpoint) -> BaselineSpec:
    """A description that makes up for what cannot be read: the rate at the expansion, kept to the end.

    The ratio of new to old entries' rate under it, 1 to rho over the re-warmup and rho from there on, does
    not depend on the numbers that have to be made up where nothing is known of them.
    """
    facts = checkpoint.facts
    counters = [state.scalars["step"] for state in checkpoint.states if "step" in state.scalars]
    read: int | None = facts.get("global_step")
    step = int(read if read is not None else max(counters, default=1000))
    total = facts.get("max_steps") or 0
    return BaselineSpec(
        type="constant",
        peak=_example_rate(checkpoint)[0],
        warmup_steps=0,
        total_steps=None if total > step else max(2 * step, 1),
        expansion_step=None if read is not None else step,
    )


#: transformers' schedules that look at a metric
_BY_METRIC = frozenset({"reduce_lr_on_plateau", "greedy"})


class _Source:
    """A run's schedule as its files have it, completed by what is stated."""

    def __init__(self, checkpoint: Checkpoint, stated: Mapping[str, Any]) -> None:
        facts = checkpoint.facts
        self.schedule: Mapping[str, Any] = facts["schedule"]
        self.kwargs: Mapping[str, Any] = self.schedule.get("kwargs") or {}
        self.warmup_steps: int | None = self.schedule.get("warmup_steps")
        self.peak: float | None = stated.get("peak", self.schedule.get("peak"))
        self.decay_steps = stated.get("decay_steps", self.number("num_decay_steps"))
        self.total_steps: int | None = stated.get("total_steps", facts.get("max_steps"))
        rates = facts.get("base_lrs") or (self.peak,)
        asked = (facts.get("training_args") or {}).get("learning_rate")
        #: the optimizer's default rate, by which transformers divides absolute ones; where parameter groups
        #: have rates of their own, it is the one that was asked for, if a group has it, else not known
        self.default = rates[0] if len(set(rates)) == 1 else asked if asked in rates else None
        self.stated_peak = "peak" in stated

    def number(self, name: str, default: float | None = None) -> float | None:
        """A number among the schedule's own arguments; None counts as not given.

        Raises:
            SpecError: it is no number.
        """
        value = self.kwargs.get(name)
        if value is None:
            return default
        if not isinstance(value, (int, float)):
            raise SpecError(
                f"lr_scheduler_kwargs: {name} must be a number, found {value!r:.40}", hint=_DESCRIBE
            )
        return float(value)

    def share(self, ratio: float | None) -> float | None:
        """So much of the peak."""
        return None if ratio is None or self.peak is None else ratio * self.peak

    def rate(self, value: float | None) -> float | None:
        """An absolute rate, on the scale of the peak."""
        if value is None or self.peak is None or self.stated_peak:
            return value
        return value * (self.peak / self.default) if self.default else None


def _cosine(source: _Source) -> dict[str, Any]:
    return {
        "type": "cosine",
        "cycles": source.number("num_cycles", HALF_WAVE),
        "minimum": source.schedule.get("minimum") or 0.0,
    }


def _cosine_with_minimum(source: _Source) -> dict[str, Any]:
    ratio = source.share(source.number("min_lr_rate"))
    return {**_cosine(source), "minimum": source.rate(source.number("min_lr")) if ratio is None else ratio}


def _early_cosine(source: _Source) -> dict[str, Any]:
    """What is named ``cosine_warmup_with_min_lr``: everything is one step early."""
    found = {**_cosine_with_minimum(source), "lead": 1}
    first, steps = source.number("warmup_lr_rate"), source.warmup_steps
    if first is not None and steps is not None and steps > 1:
        # at the step before the first one, so that the first has ``warmup_lr_rate`` of the peak
        found["initial"] = source.share(first - (1 - first) / (steps - 1))
    return found


def _restarts(source: _Source) -> dict[str, Any]:
    cycles = source.number("num_cycles", 1)
    return {"type": "cosine"} if cycles == 1 else {"type": "cosine_with_restarts", "cycles": cycles}


def _polynomial(source: _Source) -> dict[str, Any]:
    power = source.number("power", 1.0)
    kind = {"type": "linear"} if power == 1 else {"type": "polynomial", "power": power}
    return {**kind, "minimum": source.rate(source.number("lr_end", 1e-7))}


def _inverse_sqrt(source: _Source) -> dict[str, Any]:
    timescale = source.number("timescale")
    default = source.warmup_steps or 10_000
    return {"type": "inverse_sqrt", "timescale": default if timescale is None else timescale}


def _wsd(source: _Source) -> dict[str, Any]:
    stable, decay = source.number("num_stable_steps"), source.decay_steps
    start = None
    if source.warmup_steps is not None and stable is not None:
        start = source.warmup_steps + stable
    elif source.total_steps is not None and decay is not None:
        start = source.total_steps - decay
    floor = source.share(source.number("min_lr_ratio", 0.0))
    return {
        "type": "wsd",
        "decay_steps": decay,
        "decay_start": start,
        "decay": source.kwargs.get("decay_type") or "cosine",
        "warmup": source.kwargs.get("warmup_type") or "linear",
        "cycles": source.number("num_cycles", HALF_WAVE),
        "minimum": floor,
        "initial": floor,  # the warmup begins at the floor
    }


#: transformers' names -> the fields of the curve; warmup and peak are read for all alike
_READ: Mapping[str, Callable[[_Source], dict[str, Any]]] = {
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine_with_minimum,
    "cosine_warmup_with_min_lr": _early_cosine,
    "cosine_with_restarts": _restarts,
    "linear": lambda _: {"type": "linear"},
    "constant": lambda _: {"type": "constant", "warmup_steps": 0},
    "constant_with_warmup": lambda _: {"type": "constant"},
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _wsd,
    "wsd": _wsd,
    "curve": lambda source: dict(source.kwargs),  # trainers whose files give all of a curve's own fields
}


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.root.name or str(checkpoint.root)


def _check(curve: Curve, step: int) -> None:
    if max(abs(n) for n in (step, curve.total_steps, curve.warmup_steps, curve.decay_steps)) >= _STEPS:
        raise SpecError(
            f"the schedule's numbers of steps are beyond {_STEPS:,}; the trainer's files may be damaged",
            hint=f"pass {_OPTION['total_steps']} with the true length of the run",
        )
    if curve.warmup_steps > curve.total_steps:
        raise SpecError(f"warmup_steps {curve.warmup_steps} exceed total_steps {curve.total_steps}")
    if curve.minimum > curve.peak:
        raise SpecError(f"the minimum rate {curve.minimum:g} exceeds the peak {curve.peak:g}")
    if curve.decay_start is None and curve.warmup_steps + curve.decay_steps > curve.total_steps:
        raise SpecError(
            f"warmup ({curve.warmup_steps}) and decay ({curve.decay_steps}) exceed total_steps "
            f"{curve.total_steps}"
        )
    if step >= curve.total_steps:
        raise SpecError(
            f"the run is over: expansion at step {step} of {curve.total_steps}",
            hint=f"pass {_OPTION['total_steps']} with the length of the run that goes on",
        )
    if curve(0) < -1e-9 * curve.peak:
        raise SpecError(f"the schedule's warmup begins at {curve(0):g}, a rate below zero", hint=_DESCRIBE)
    if curve(step) <= 0:
        raise SpecError(
            f"the learning rate at the expansion step {step} is zero; re-warmup needs one above zero",
            hint="expand after the first steps of the warmup",
        )


def _check_record(checkpoint: Checkpoint, curve: Curve) -> None:
    """The curve gives the rates that the scheduler itself wrote down when the checkpoint was saved.

    Raises:
        SpecError: it does not: the run's scheduler is another one than its arguments describe.
    """
    step, where, rates = _record(checkpoint, curve.peak)
    if step is None:
        return
    share = curve(step) / curve.peak
    for base, found in rates:
        if not isclose(share * base, found, rel_tol=1e-5, abs_tol=1e-9 * curve.peak):
            raise SpecError(
                f"{_name(checkpoint)}: at step {step} {where} has the learning rate {found:.6g}, "
                f"the schedule of the training arguments ({checkpoint.facts['schedule'].get('type')}) gives "
                f"{share * base:.6g}: the run was on another scheduler than these describe",
                hint=_DESCRIBE,
            )


def _record(checkpoint: Checkpoint, peak: float) -> tuple[int | None, str, list[tuple[float, float]]]:
    """At which step, in which file, and per group the rate of the scheduler's start and the last one.

    Torch's schedulers of schedulers, or by a metric, write no ``base_lrs`` and count other things than steps;
    one of the user's own may write nothing. Then the optimizer's groups have what is missing.
    """
    facts = checkpoint.facts
    groups = checkpoint.param_groups
    own, last = facts.get("base_lrs"), facts.get("last_lrs")
    where = "the scheduler's file"
    if not last and "training_args" in facts:
        where, last = "the optimizer's file", [group.get("lr") for group in groups]
    last = last or []
    base = own or [group.get("initial_lr", peak) for group in groups] or [peak] * len(last)
    step = facts.get("last_epoch") if own else facts.get("global_step")
    whole = len(base) == len(last) and all(isinstance(rate, (int, float)) for rate in (*base, *last))
    return step if whole and last else None, where, list(zip(base, last, strict=True)) if whole else []
