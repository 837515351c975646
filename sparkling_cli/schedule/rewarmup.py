"""The re-warmups of all expansions of a run: what ``sparkling/rewarmup.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import isclose
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from sparkling_cli.errors import CheckpointError, SparklingError
from sparkling_cli.formats.directory import read_sidecar
from sparkling_cli.schedule.baseline import example_words, schedule_command
from sparkling_cli.schedule.curves import Curve, Rewarmed
from sparkling_cli.spec.choices import BiasCorrection
from sparkling_cli.storage.sidecar import MANIFEST, REWARMUP, sidecar_root

FORMAT: Literal[2] = 2
#: earlier versions that are still read
EARLIER = (1,)


#: where the stages of a file are not, as earlier versions wrote it where the counter of steps began anew
_IN_ORDER = (
    "write the last one anew: sparkling schedule CKPT --write --expansion-step N, with the optimizer steps "
    "that had been done in the whole run"
)


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)


class Stage(_Data):
    """One expansion's re-warmup: all that its curve follows from, given the baseline."""

    stage: Annotated[int, Field(description="number of the expansion, from 1")]
    expansion_step: Annotated[int, Field(description="optimizer steps done before the expansion (te)")]
    rho: Annotated[float, Field(description="peak of the new entries' rate / rate at expansion")]
    steps: Annotated[int, Field(description="re-warmup steps (tau_w)")]
    bias_correction: BiasCorrection = "inherit"
    betas: tuple[float, float] | None = None
    keep_step: Annotated[
        bool,
        Field(description="old entries step as far as before, where steps follow a shape (Muon) or a width"),
    ] = False


class RewarmupFile(_Data):
    """``sparkling/rewarmup.json``: the closed form; step by step it is in ``rewarmup.csv``."""

    format_version: Literal[2]
    baseline: Annotated[Curve, Field(description="the old entries' learning rate")]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, description="oldest first")]
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _in_order(self, info: ValidationInfo) -> RewarmupFile:
        # a curve is defined from its own expansion on, and all of them are used from the last one on
        replacing = bool(info.context and info.context.get("replacing"))
        for one, other in pairwise(self.stages[:-1] if replacing else self.stages):
            if other.expansion_step < one.expansion_step:
                raise ValueError(
                    f"expansion {other.stage} at step {other.expansion_step} lies before expansion "
                    f"{one.stage} at step {one.expansion_step}"
                )
        return self


@dataclass(frozen=True)
class Rewarmup:
    """The baseline and the stages, oldest first; every stage's curve is made from this baseline."""

    baseline: Curve
    stages: tuple[Stage, ...]

    @cached_property
    def curves(self) -> tuple[Rewarmed, ...]:
        """Of the new entries of every stage."""
        return tuple(Rewarmed(self.baseline, s.expansion_step, s.rho, s.steps) for s in self.stages)

    @property
    def kept_since(self) -> int | None:
        """The first expansion since which old entries' steps are kept; None where they are not."""
        return next((stage.stage for stage in self.stages if stage.keep_step), None)

    @property
    def expansion_step(self) -> int:
        """Step of the last expansion."""
        return self.stages[-1].expansion_step


def add_stage(
    previous: Rewarmup | None,
    baseline: Curve,
    expansion_step: int,
    *,
    number: int | None = None,
    **fields: Any,
) -> Rewarmup:
    """The re-warmups after one more expansion; earlier stages go on where they are.

    Args:
        previous: the re-warmups of earlier expansions.
        baseline: the old entries' curve. Where it is another one than before (a longer run), the earlier
            stages' curves follow from it too.
        expansion_step: te.
        number: of the expansion; by default one more than the last.
        fields: of :class:`Stage`.
    """
    earlier = () if previous is None else previous.stages
    number = 1 + (earlier[-1].stage if earlier else 0) if number is None else number
    return Rewarmup(baseline, (*earlier, Stage(stage=number, expansion_step=expansion_step, **fields)))


def to_data(rewarmup: Rewarmup, notes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Plain data for the JSON file."""
    file = RewarmupFile(
        format_version=FORMAT, baseline=rewarmup.baseline, stages=rewarmup.stages, notes=notes
    )
    return file.model_dump(mode="json")


def from_data(data: Mapping[str, Any], where: str, *, replacing: bool = False) -> Rewarmup:
    """The inverse of :func:`to_data`.

    Args:
        data: of this version, or of an earlier one.
        where: the file, for messages.
        replacing: only earlier expansions' parameters are wanted, as the last one's are written anew.

    Raises:
        CheckpointError: it is of another version, a field is missing or malformed, or an earlier version's
            curve is one that this version would compute otherwise.
    """
    version = data.get("format_version")
    if version not in (FORMAT, *EARLIER):
        raise CheckpointError(f"{where} has format_version {version!r}; this version reads {FORMAT}")
    try:
        plain = data if version == FORMAT else _from_version_1(data)
        file = RewarmupFile.model_validate(plain, context={"replacing": replacing})
        found = Rewarmup(file.baseline, file.stages)
        if version != FORMAT and not replacing:
            _check_version_1(data, found, where)
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        reason, hint = f"{type(error).__name__}: {error}", None
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'stages'}: {first['msg']}"
            hint = _IN_ORDER if not first["loc"] else None
        raise CheckpointError(f"{where} is damaged: {reason}", hint=hint) from None
    return found


def _from_version_1(data: Mapping[str, Any]) -> dict[str, Any]:
    fields = Stage.model_fields.keys() - {"keep_step"}  # which is younger
    stages = [{name: stage[name] for name in fields} for stage in data["stages"]]
    return {"format_version": FORMAT, "baseline": data["baseline"], "stages": stages}


def _check_version_1(data: Mapping[str, Any], found: Rewarmup, where: str) -> None:
    """Version 1 stored a curve per expansion. Training must not go on with other rates than it began with.

    Raises:
        CheckpointError: this version's curve differs (``wsd``; a baseline that changed between expansions).
    """
    for stored, curve in zip(data["stages"], found.curves, strict=True):
        before = Curve(**stored["curve"])
        span = curve.baseline.total_steps - curve.expansion_step
        for since in {0, span, *range(0, span, max(1, span // 997))}:
            if not isclose(before(since), curve(since), rel_tol=1e-9, abs_tol=1e-9 * curve.peak):
                raise CheckpointError(
                    f"{where}: written by an earlier version, with a curve that this version does not make "
                    f"(expansion {stored['stage']}, {curve.baseline.type})",
                    hint="write it anew: sparkling schedule CKPT --write, with the options that describe the "
                    "run's schedule; or train on with the version that wrote it",
                )


def read_rewarmup(path: Path, *, output: Path | None = None, replacing: bool = False) -> Rewarmup:
    """A ``rewarmup.json``, or the one of an output.

    Args:
        path: of the one or the other.
        output: that the file is of, where ``path`` is the file.
        replacing: as of :func:`from_data`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    hint = "give an output of `sparkling expand`, which writes one"
    output = path if output is None else output
    if (sidecar_root(output) / MANIFEST).is_file() and not (sidecar_root(output) / REWARMUP).exists():
        hint = f"`sparkling expand` writes one when the source run's schedule is known; {_adding(output)}"
    data = read_sidecar(path, REWARMUP, "re-warmup schedule", version=FORMAT, earlier=EARLIER, hint=hint)
    return from_data(data, str(path), replacing=replacing)


def _adding(output: Path) -> str:
    """How to add a schedule to an output: a command that runs as it is."""
    from sparkling_cli.formats.detect import open_checkpoint

    try:
        checkpoint = open_checkpoint(output)
    except SparklingError:
        return "`sparkling schedule OUT --write`, with options that describe it, adds one"
    command = schedule_command(checkpoint, str(output))
    made_up = "" if command.endswith("--write") else f" ({example_words(checkpoint)}; put in the run's own)"
    return f"to this output, `{command}` adds one{made_up}"
