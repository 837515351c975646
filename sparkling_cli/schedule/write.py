"""``sparkling/rewarmup.json`` and ``rewarmup.csv`` as bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING

from sparkling_cli.errors import CheckpointError, SparklingError, SpecError
from sparkling_cli.formats.muon import MOMENTUM
from sparkling_cli.formats.optimizer_states import base_name
from sparkling_cli.results.evidence import like, pair_note
from sparkling_cli.schedule.baseline import baseline_of
from sparkling_cli.schedule.curves import fresh_factor
from sparkling_cli.schedule.rewarmup import Rewarmup, add_stage, to_data
from sparkling_cli.storage.sidecar import CURVE, REWARMUP, sidecar_root

if TYPE_CHECKING:
    from sparkling_cli.formats.model import Checkpoint
    from sparkling_cli.spec.model import ExpansionSpec
    from sparkling_cli.widening.geometry import Growth

#: at this beta2 and above, inherited bias correction makes new entries' first updates several times as long
LONG_MEMORY = 0.99


def plan_rewarmup(
    checkpoint: Checkpoint,
    spec: ExpansionSpec,
    previous: Rewarmup | None = None,
    *,
    number: int | None = None,
    carried: bool = False,
) -> Rewarmup:
    """The re-warmup of an expansion.

    Args:
        checkpoint: the source.
        spec: its ``rewarmup`` and ``baseline``.
        previous: the source's own ``rewarmup.json``, if it was expanded before.
        number: of this expansion in the manifest; an earlier one may have had no schedule.
        carried: whether some tensor carries a factor for a width that grows, so that its step can be kept.

    Raises:
        SpecError: the baseline cannot be known (the message says what to pass), or fresh bias
            correction is asked for without betas to correct by, or a kept step under an optimizer whose steps
            do not follow the shape, or given up that was kept before; or the expansion step that is given
            lies before an earlier expansion's.
        CheckpointError: so does the one that the checkpoint has.
    """
    _check_keep_step(checkpoint, spec.rewarmup.keep_step, previous, carried=carried)
    curve, step = baseline_of(checkpoint, spec.baseline)
    if previous is not None and step < previous.expansion_step:
        raise _too_early(checkpoint, step, previous, stated=spec.baseline.expansion_step is not None)
    betas = adam_betas(checkpoint)
    if spec.rewarmup.bias_correction == "fresh" and betas is None:
        raise SpecError(
            "bias_correction 'fresh' is for Adam; this checkpoint's optimizer has no betas and step counter",
            hint="use --bias-correction inherit",
        )
    return add_stage(previous, curve, step, **spec.rewarmup.model_dump(), betas=betas, number=number)


def _too_early(checkpoint: Checkpoint, step: int, previous: Rewarmup, *, stated: bool) -> SparklingError:
    """Of an expansion step before an earlier expansion's, whose curve says nothing of the steps before it."""
    last, name = previous.stages[-1], checkpoint.root.name
    found = (
        f"{name}: the expansion step {step} lies before expansion {last.stage} of the same run, which was "
        f"made at step {last.expansion_step}"
    )
    whole = (
        f"pass --expansion-step with the optimizer steps done in the whole run, {last.expansion_step} or more"
    )
    if stated:
        return SpecError(found, hint=whole)
    hint = f"if its counter of steps began anew, {whole}, and describe the schedule in these steps"
    if previous.kept_since is None:  # which would be lost
        hint += (
            f"; or, to train on by the new counter, move {sidecar_root(checkpoint.root) / REWARMUP} away: "
            "entries of earlier expansions then learn at the rate of all others"
        )
    return CheckpointError(found, hint=hint)


def _check_keep_step(
    checkpoint: Checkpoint, asked: bool, previous: Rewarmup | None, *, carried: bool
) -> None:
    if not asked and previous is not None and previous.kept_since is not None:
        raise SpecError(
            f"expansion {previous.kept_since} of this run was made with --keep-step, this one is not: its "
            "entries would begin to step less far",
            hint="give --keep-step again",
        )
    slots = {base_name(slot) for state in checkpoint.states for slot in state.tensors}
    plain = any("dampening" in group for group in checkpoint.param_groups)  # torch's SGD
    if asked and slots and (plain or not slots & MOMENTUM) and not carried:
        raise SpecError(
            f"--keep-step is for Muon, whose state is a {' or '.join(sorted(MOMENTUM))}; this optimizer's is "
            f"{', '.join(sorted(slots))}: its steps do not follow the shape of a matrix, and the model "
            "multiplies by no number that follows from a width that grows",
            hint="leave --keep-step out",
        )


def adam_betas(checkpoint: Checkpoint) -> tuple[float, float] | None:
    """(beta1, beta2) of an Adam-family optimizer (one whose state has a second moment and a step), else None.

    Raises:
        CheckpointError: a group's betas are no two numbers in [0, 1).
    """
    if not any("exp_avg_sq" in s.tensors and "step" in s.scalars for s in checkpoint.states):
        return None
    found = None
    for group in checkpoint.param_groups:
        betas = group.get("betas")
        if betas is None:
            continue
        if not (
            isinstance(betas, (tuple, list))
            and len(betas) == 2
            and all(isinstance(b, (int, float)) and 0 <= b < 1 for b in betas)
        ):
            raise CheckpointError(
                f"{checkpoint.root.name}: the optimizer's betas must be two numbers in [0, 1), "
                f"found {betas!r:.80}"
            )
        found = found or (float(betas[0]), float(betas[1]))
    return found


#: rows of ``rewarmup.csv``, about; all of them are in memory at once
ROWS = 1_000_000
#: peaks above this many times the rate at the expansion are a slip, or an experiment
LARGE_RHO = 4.0


def notes(rewarmup: Rewarmup) -> tuple[str, ...]:
    """What a user should know about the last stage's schedule."""
    stage = rewarmup.stages[-1]
    found = []
    one_fall = rewarmup.baseline.is_one_fall(stage.expansion_step)
    remaining = rewarmup.baseline.total_steps - stage.expansion_step
    if stage.steps >= remaining:
        never = "falls again" if one_fall else f"becomes {stage.rho:g} times the old entries'"
        found.append(
            f"re-warmup takes {stage.steps} steps but only {remaining} remain: the new entries' rate never "
            f"{never} (try --rewarmup-steps {max(1, remaining // 10)})"
        )
    if stage.rho > LARGE_RHO:
        found.append(
            f"rho {stage.rho:g}: new entries would train at {stage.rho:g} times the rate at the expansion, "
            "where 1.25 to 1.3 was best (App. H)"
        )
    if stage.expansion_step < rewarmup.baseline.warmup_steps and one_fall:
        found.append(
            f"the expansion at step {stage.expansion_step} lies inside the warmup "
            f"({rewarmup.baseline.warmup_steps} steps): the new entries' peak, rho times the rate at that "
            "step, stays below the old entries'"
        )
    return tuple(found)


def remarks(rewarmup: Rewarmup, spec: ExpansionSpec, growth: Mapping[str, Growth]) -> tuple[str, ...]:
    """What is worth knowing of a schedule, and of what was asked for under it, and calls for no decision.

    Args:
        rewarmup: all stages; it is about the last one.
        spec: what was asked for.
        growth: of the axes in this expansion.
    """
    stage, total = rewarmup.stages[-1], rewarmup.baseline.total_steps
    found = []
    remaining = total - stage.expansion_step
    if remaining > stage.steps > remaining / 10:
        found.append(
            f"re-warmup takes {stage.steps} of the {remaining} steps that remain, more than a tenth "
            f"(--rewarmup-steps {max(1, remaining // 10)} would be a tenth)"
        )
    if stage.betas is not None and stage.betas[1] >= LONG_MEMORY and stage.bias_correction == "inherit":
        worst = max(1 / fresh_factor(*stage.betas, k) for k in range(1, 200))
        found.append(
            f"beta2 = {stage.betas[1]:g}: the step counter is shared with the old entries, so the new "
            f"entries' first updates are up to {worst:.1f} times as long as a fresh Adam's. That parts "
            "copies from their sources sooner, and ended lower where it was measured; should the loss spike, "
            "--bias-correction fresh takes it out"
        )
    elif stage.betas is not None:
        factor = max((grown.target / grown.source for grown in growth.values()), default=1.0)
        near = like(factor, stage.expansion_step / total, rewarmup.baseline.type)
        note = pair_note([axis.axis for axis in spec.axes], spec.init, remaining, near)
        found += [note] if note else []
    return tuple(found)


def rewarmup_files(rewarmup: Rewarmup) -> dict[str, bytes]:
    """The two files, by their paths in the output."""
    text = json.dumps(to_data(rewarmup, notes(rewarmup)), indent=2, allow_nan=False) + "\n"
    return {REWARMUP: text.encode(), CURVE: ("\n".join(rows(rewarmup)) + "\n").encode()}


def _listed(first: int, last: int, limit: int) -> Iterator[int]:
    """The steps that have a row."""
    dense = first + limit // 2
    if last - first <= limit:
        return iter(range(first, last + 1))
    apart = -(-(last - dense) // (limit - limit // 2))
    return chain(range(first, dense), range(dense, last, apart), (last,))


def rows(rewarmup: Rewarmup, limit: int = ROWS) -> list[str]:
    """The lines of the curve as CSV, from the last expansion to the end.

    Every number reads back to the same float64.
    Columns: ``step``, ``eta_old``, and per stage ``eta_new``, ``ratio`` and, for fresh bias correction,
    ``correction`` (the factor on the new entries' Adam update beside the ratio). The row of step t is what
    the optimizer step after t finished ones uses. A run longer than the limit has a row for each of the
    first steps, then for steps at even distances, and for the last one.
    """
    head = ["step", "eta_old"]
    for stage in rewarmup.stages:
        mark = "" if len(rewarmup.stages) == 1 else f"_stage{stage.stage}"
        head += [f"eta_new{mark}", f"ratio{mark}"]
        head += [f"correction{mark}"] if stage.bias_correction == "fresh" else []
    lines = [",".join(head)]
    for step in _listed(rewarmup.expansion_step, rewarmup.baseline.total_steps, limit):
        cells = [str(step), repr(rewarmup.baseline(step))]
        for stage, curve in zip(rewarmup.stages, rewarmup.curves, strict=True):
            cells += [repr(curve.eta_new(step)), repr(curve.ratio(step))]
            if stage.bias_correction == "fresh":
                assert stage.betas is not None  # plan_rewarmup refuses fresh without them
                cells.append(repr(fresh_factor(*stage.betas, step - stage.expansion_step + 1)))
        lines.append(",".join(cells))
    return lines
