"""Measurements and schedules as facts of a report."""

from __future__ import annotations

import re
from collections.abc import Collection
from math import inf, isfinite
from typing import TYPE_CHECKING

from sparkling_cli.report.charts import thin
from sparkling_cli.report.model import Activations, LayerActivation, LearningRate, ResidualPoint

if TYPE_CHECKING:
    from sparkling_cli.diagnostics.measurement import ActivationReport, LayerChange
    from sparkling_cli.schedule.rewarmup import Rewarmup

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")

#: Points of a learning-rate curve in the report; every step is in rewarmup.csv.
CURVE_POINTS = 240


def activations_of(report: ActivationReport, *, tokens: int, widened: Collection[str]) -> Activations:
    """The facts of a comparison.

    Args:
        report: two models on the same tokens.
        tokens: how many.
        widened: names of linear layers whose weight grew, without ``.weight``.
    """
    change = report.logits_change
    points = []
    for place in report.stream:
        block, _ = split_name(place.name)
        if block is not None:
            points.append(ResidualPoint(layer=block, before=finite(place.before), after=finite(place.after)))
    return Activations(
        data=report.tokens,
        random_tokens=report.random,
        tokens=tokens,
        layers=tuple(_layer(layer, widened) for layer in report.layers),
        residual=tuple(points),
        loss_before=finite(report.loss_before),
        loss_after=finite(report.loss_after),
        logit_change=None if change is None else finite(change.rms),
    )


def _layer(change: LayerChange, widened: Collection[str]) -> LayerActivation:
    block, role = split_name(change.name)
    return LayerActivation(
        name=change.name,
        role=role,
        layer=block,
        widened=change.name in widened or f"{change.name}.weight" in widened,
        x_before=finite(change.x_before),
        x_after=finite(change.x_after),
        y_before=finite(change.y_before),
        y_after=finite(change.y_after),
        r_before=finite(change.before),
        r_after=finite(change.after),
        deviation=finite(change.signed),
    )


def split_name(name: str) -> tuple[int | None, str]:
    """Block and role: ``model.layers.3.mlp.experts.7.up_proj`` is (3, ``mlp.experts.up_proj``)."""
    match = _BLOCK.search(name)
    if match is None:
        return None, name
    rest = name[match.end() :]
    return int(match[1]), ".".join(part for part in rest.split(".") if not part.isdigit())


def finite(value: float | None) -> float | None:
    """The value, None for what is not finite."""
    return value if value is not None and isfinite(value) else None


def learning_rate_of(rewarmup: Rewarmup, window: tuple[int, int] | None = None) -> LearningRate:
    """The facts of a re-warmup: the curves at a selection of steps, corners included.

    Args:
        rewarmup: all stages; the last one is the report's.
        window: first and last step of the curves; the whole run by default.
    """
    stage, baseline = rewarmup.stages[-1], rewarmup.baseline
    total = baseline.total_steps
    corners = {
        0,
        total,
        baseline.warmup_steps,
        *(int(step) for step in (baseline.fall[0], sum(baseline.fall)) if step < inf),
        *(s.expansion_step for s in rewarmup.stages),
        *(s.expansion_step + s.steps for s in rewarmup.stages),
    }
    first, last = window or (0, total)
    spread = thin(range(first, last + 1), CURVE_POINTS)
    steps = sorted({*spread, *(c for c in corners if first <= c <= last)})
    curves = [tuple(None if t < s.expansion_step else s.eta_new(t) for t in steps) for s in rewarmup.stages]
    return LearningRate(
        baseline=baseline.type,
        expansion_step=stage.expansion_step,
        total_steps=total,
        rho=stage.rho,
        rewarmup_steps=stage.steps,
        rate_at_expansion=stage.eta_e,
        peak_new=stage.curve.peak,
        minimum=stage.curve(total - stage.expansion_step),
        bias_correction=stage.bias_correction,
        steps=tuple(steps),
        old=tuple(baseline(t) for t in steps),
        new=curves[-1],
        earlier=tuple(curves[:-1]),
    )
