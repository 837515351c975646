"""The re-warmups of all expansions of a run: what ``sparkling/rewarmup.json`` holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.directory import read_sidecar
from sparkling_cli.schedule.curves import Curve, rewarmed
from sparkling_cli.storage.sidecar import CURVE, REWARMUP

FORMAT = 1
#: where it lies in an output directory, and the curve beside it

BiasCorrection = Literal["inherit", "fresh"]


@dataclass(frozen=True)
class Stage:
    """One expansion's re-warmup.

    Attributes:
        stage: number of the expansion, from 1.
        expansion_step: te, optimizer steps done before it.
        rho: peak of the new entries' rate over eta_e.
        steps: tau_w.
        eta_e: the baseline's rate at te.
        curve: the new entries' rate by steps since te (Eq. 27).
        bias_correction: ``fresh`` corrects the new entries' first Adam updates.
        betas: Adam's, at the expansion, if known.
    """

    stage: int
    expansion_step: int
    rho: float
    steps: int
    eta_e: float
    curve: Curve
    bias_correction: BiasCorrection = "inherit"
    betas: tuple[float, float] | None = None

    def eta_new(self, step: int) -> float:
        """The new entries' rate at a step of the whole run, te <= step."""
        return self.curve(step - self.expansion_step)


@dataclass(frozen=True)
class Rewarmup:
    """The baseline and the stages, oldest first."""

    baseline: Curve
    stages: tuple[Stage, ...]

    @property
    def expansion_step(self) -> int:
        """Step of the last expansion."""
        return self.stages[-1].expansion_step

    def ratio(self, stage: Stage, step: int) -> float:
        """eta_new / eta_old, the factor on the update of the stage's entries; 1 where both are zero.

        ``step`` counts the optimizer steps done: the next one uses this ratio.
        """
        old = self.baseline(step)
        new = stage.eta_new(step)
        return new / old if old > 0 else 1.0

    def rows(self) -> Iterator[tuple[int, float, list[tuple[float, float]]]]:
        """``(step, eta_old, [(eta_new, ratio) per stage])`` from the last expansion to the end.

        The row of step t is what the optimizer step after t finished ones uses.
        """
        for step in range(self.expansion_step, self.baseline.total_steps + 1):
            pairs = [(s.eta_new(step), self.ratio(s, step)) for s in self.stages]
            yield step, self.baseline(step), pairs


def add_stage(
    previous: Rewarmup | None,
    baseline: Curve,
    expansion_step: int,
    *,
    rho: float,
    steps: int,
    bias_correction: BiasCorrection = "inherit",
    betas: tuple[float, float] | None = None,
    number: int | None = None,
) -> Rewarmup:
    """The re-warmups after one more expansion; earlier stages keep their curves.

    Args:
        previous: the re-warmups of earlier expansions.
        baseline: the old entries' curve.
        expansion_step: te.
        rho: peak over eta_e.
        steps: tau_w.
        bias_correction: see :class:`Stage`.
        betas: Adam's.
        number: of the expansion; by default one more than the last.
    """
    earlier = () if previous is None else previous.stages
    stage = Stage(
        stage=number if number is not None else 1 + (earlier[-1].stage if earlier else 0),
        expansion_step=expansion_step,
        rho=rho,
        steps=steps,
        eta_e=baseline(expansion_step),
        curve=rewarmed(baseline, expansion_step, rho, steps),
        bias_correction=bias_correction,
        betas=betas,
    )
    return Rewarmup(baseline, (*earlier, stage))


def to_data(rewarmup: Rewarmup) -> dict[str, Any]:
    """Plain data for the JSON file."""
    return {
        "format_version": FORMAT,
        "expansion_step": rewarmup.expansion_step,
        "total_steps": rewarmup.baseline.total_steps,
        "baseline": rewarmup.baseline.as_data(),
        "stages": [
            {
                "stage": s.stage,
                "expansion_step": s.expansion_step,
                "rho": s.rho,
                "steps": s.steps,
                "eta_e": s.eta_e,
                "peak": s.curve.peak,
                "curve": s.curve.as_data(),
                "bias_correction": s.bias_correction,
                "betas": None if s.betas is None else list(s.betas),
            }
            for s in rewarmup.stages
        ],
        "curve_file": CURVE.rpartition("/")[2],
    }


def from_data(data: Mapping[str, Any], where: str) -> Rewarmup:
    """The inverse of :func:`to_data`.

    Raises:
        CheckpointError: it is of another version, or a field is missing or malformed.
    """
    version = data.get("format_version")
    if version != FORMAT:
        raise CheckpointError(f"{where} has format_version {version!r}; this version reads {FORMAT}")
    try:
        stages = tuple(
            Stage(
                stage=int(s["stage"]),
                expansion_step=int(s["expansion_step"]),
                rho=float(s["rho"]),
                steps=int(s["steps"]),
                eta_e=float(s["eta_e"]),
                curve=Curve(**s["curve"]),
                bias_correction=s["bias_correction"],
                betas=None if s["betas"] is None else (float(s["betas"][0]), float(s["betas"][1])),
            )
            for s in data["stages"]
        )
        return Rewarmup(Curve(**data["baseline"]), stages)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{where} is damaged: {type(error).__name__}: {error}") from None


def read_rewarmup(path: Path) -> Rewarmup:
    """A ``rewarmup.json``, or the one of an output directory.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if path.is_dir():
        path = path / REWARMUP
    hint = "`sparkling expand` writes one when the source run's schedule is known"
    data = read_sidecar(path, "re-warmup schedule", version=FORMAT, hint=hint)
    return from_data(data, str(path))
