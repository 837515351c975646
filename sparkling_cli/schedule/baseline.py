"""The schedule that the source run was on: from the trainer's own files, completed by the spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import SpecError
from sparkling_cli.schedule.curves import Curve

if TYPE_CHECKING:
    from sparkling_cli.formats.model import Checkpoint
    from sparkling_cli.spec.model import BaselineSpec

#: no run has as many steps; a damaged file may say so
_STEPS = 10**12
#: transformers' names -> ours, for the names that need nothing more
_SAME: Mapping[str, str] = {
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "wsd": "wsd",
    "polynomial": "linear",
    "cosine_with_restarts": "cosine",
}

_PASS = {
    "type": "--schedule cosine|linear|constant|wsd",
    "peak": "--peak-lr",
    "minimum": "--min-lr",
    "warmup_steps": "--warmup-steps",
    "total_steps": "--total-steps",
    "expansion_step": "--expansion-step",
    "decay_steps": "--decay-steps",
}


def baseline_of(checkpoint: Checkpoint, given: BaselineSpec) -> tuple[Curve, int]:
    """The old entries' curve and the expansion step.

    What ``given`` states wins over what the trainer's files say.

    Args:
        checkpoint: its ``facts`` may hold ``global_step``, ``max_steps`` and ``schedule`` (``type``,
            ``warmup_steps``, ``peak``, ``minimum``, ``kwargs``).
        given: from the spec; all None = read everything.

    Raises:
        SpecError: something is known from neither, or the two do not make a schedule that goes on.
    """
    facts = checkpoint.facts
    stated = {k: v for k, v in given.model_dump().items() if v is not None}
    read: dict[str, Any] = {}
    schedule = facts.get("schedule") or {}
    if schedule and given.type in (None, _SAME.get(schedule.get("type") or "")):
        read = _translate(schedule, stated)
    elif schedule.get("peak") is not None:
        read = {"peak": schedule["peak"]}
    if facts.get("max_steps"):
        read["total_steps"] = int(facts["max_steps"])
    if facts.get("global_step") is not None:
        read["expansion_step"] = int(facts["global_step"])
    values = {"initial": 0.0, "minimum": 0.0, **{k: v for k, v in read.items() if v is not None}, **stated}
    curve_type = values.get("type")
    needed = ["type", "peak", "total_steps", "expansion_step", "warmup_steps"]
    if curve_type == "wsd":
        needed.append("decay_steps")
    missing = [name for name in needed if values.get(name) is None]
    if missing:
        raise _unknown(checkpoint, missing)
    step = int(values.pop("expansion_step"))
    fields = ("type", "peak", "minimum", "initial", "warmup_steps", "total_steps", "decay_steps", "decay")
    curve = Curve(**{name: values[name] for name in fields if values.get(name) is not None})
    _check(curve, step)
    return curve, step


def _translate(schedule: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """A transformers schedule as fields of a curve."""
    name = schedule.get("type")
    if name is None:
        return {"peak": schedule.get("peak"), "warmup_steps": schedule.get("warmup_steps")}
    kwargs = dict(schedule.get("kwargs") or {})
    if name not in _SAME:
        raise SpecError(
            f"the run's schedule {name!r} is not one that re-warmup is defined for",
            hint=f"describe what remains of it by {_PASS['type']} and the options beside it; "
            f"known schedules: {', '.join(sorted(_SAME))}",
        )
    peak = stated.get("peak", schedule.get("peak"))
    read: dict[str, Any] = {
        "type": _SAME[name],
        "peak": peak,
        "minimum": schedule.get("minimum"),
        "warmup_steps": 0 if name == "constant" else schedule.get("warmup_steps"),
    }
    cycles = kwargs.get("num_cycles")
    plain = 1 if name == "cosine_with_restarts" else 0.5
    if cycles not in (None, plain):
        raise SpecError(
            f"the run's schedule {name!r} has num_cycles={cycles}; re-warmup is defined for {plain}",
            hint=f"describe what remains of it by {_PASS['type']} and the options beside it",
        )
    if name == "polynomial":
        if kwargs.get("power", 1.0) != 1.0:
            raise SpecError(
                f"the run's schedule 'polynomial' has power={kwargs['power']}; only power 1 is known",
                hint=f"describe what remains of it by {_PASS['type']} and the options beside it",
            )
        read["minimum"] = kwargs.get("lr_end", 1e-7)
    if name == "cosine_with_min_lr" and peak is not None:
        if kwargs.get("min_lr") is not None:
            read["minimum"] = float(kwargs["min_lr"])
        elif kwargs.get("min_lr_rate") is not None:
            read["minimum"] = float(kwargs["min_lr_rate"]) * float(peak)
    if _SAME[name] == "wsd":
        read |= _wsd(kwargs, peak)
    return read


def _wsd(kwargs: Mapping[str, Any], peak: float | None) -> dict[str, Any]:
    if kwargs.get("warmup_type", "linear") != "linear":
        raise SpecError(
            f"the run's schedule has warmup_type={kwargs['warmup_type']!r}; only 'linear' is known",
            hint=f"describe what remains of it by {_PASS['type']} and the options beside it",
        )
    read: dict[str, Any] = {"decay_steps": kwargs.get("num_decay_steps"), "decay": kwargs.get("decay_type")}
    ratio = float(kwargs.get("min_lr_ratio", 0.0) or 0.0)
    if peak is not None:
        # transformers warms up from the floor, not from zero, when there is one
        read["minimum"] = read["initial"] = ratio * float(peak)
    return read


def _unknown(checkpoint: Checkpoint, missing: list[str]) -> SpecError:
    where = checkpoint.root.name or str(checkpoint.root)
    return SpecError(
        f"{where}: the learning-rate schedule's {', '.join(missing)} cannot be read from this checkpoint",
        hint="pass " + ", ".join(_PASS[name] for name in missing),
    )


def _check(curve: Curve, step: int) -> None:
    if max(abs(n) for n in (step, curve.total_steps, curve.warmup_steps, curve.decay_steps)) >= _STEPS:
        raise SpecError(
            f"the schedule's numbers of steps are beyond {_STEPS:,}; the trainer's files may be damaged",
            hint=f"pass {_PASS['total_steps']} with the true length of the run",
        )
    if curve.warmup_steps > curve.total_steps:
        raise SpecError(f"warmup_steps {curve.warmup_steps} exceed total_steps {curve.total_steps}")
    if curve.minimum > curve.peak:
        raise SpecError(f"the minimum rate {curve.minimum:g} exceeds the peak {curve.peak:g}")
    if curve.warmup_steps + curve.decay_steps > curve.total_steps:
        raise SpecError(
            f"warmup ({curve.warmup_steps}) and decay ({curve.decay_steps}) exceed total_steps "
            f"{curve.total_steps}"
        )
    if step >= curve.total_steps:
        raise SpecError(
            f"the run is over: expansion at step {step} of {curve.total_steps}",
            hint=f"pass {_PASS['total_steps']} with the length of the run that goes on",
        )
    if curve(step) <= 0:
        raise SpecError(
            f"the learning rate at the expansion step {step} is zero; re-warmup needs one above zero",
            hint="expand after the first steps of the warmup",
        )
