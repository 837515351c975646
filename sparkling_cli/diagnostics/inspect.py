"""Everything that can be measured in a checkpoint, or between two, from their files alone."""

from __future__ import annotations

import shlex
from contextlib import suppress
from math import fsum, prod
from pathlib import Path
from typing import Any

from sparkling_cli.diagnostics.activations import measure, measure_change
from sparkling_cli.diagnostics.data import LENGTH, SEQUENCES, Sample
from sparkling_cli.diagnostics.measurement import Enlarged
from sparkling_cli.diagnostics.weights import measure_weights
from sparkling_cli.errors import CheckpointError, LayoutError, MissingDependencyError, SparklingError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.formats.gc_pause import collector_running
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.manifest import manifest_of, output_behind
from sparkling_cli.plan.symmetry import locked_axes, treatment_of
from sparkling_cli.results.account import Kind
from sparkling_cli.results.base import Verdict
from sparkling_cli.results.measured import (
    Activations,
    Inspection,
    LoggedLoss,
    Measurement,
    Symmetry,
)
from sparkling_cli.results.verdict import verdict_of_change, verdict_of_training
from sparkling_cli.spec.sources import make_spec
from sparkling_cli.storage.sidecar import MANIFEST, sidecar_root
from sparkling_cli.training.expected_loss import LossForecast, losses

#: logged losses that are compared with the forecast, at most
LAST = 50


@collector_running()
def inspect_checkpoint(
    path: Path | str,
    *,
    against: Path | str | None = None,
    data: Path | None = None,
    model: str | None = None,
    layout: Path | None = None,
    activations: bool = True,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    memory: int = 1 << 30,
    seed: int = 0,
) -> Inspection:
    """Measure a checkpoint, or compare it with an earlier one.

    Args:
        path: the checkpoint.
        against: an earlier state of the same model: the source of its expansion, or the expanded
            checkpoint that it was trained on from.
        data: text, JSONL or tokens to measure activations on; see ``diagnostics.data``.
        model: ``package.module:factory`` of the user's own model.
        layout: a layout file; it says which parameter numbered optimizer state belongs to.
        activations: run the model at all.
        sequences: at most so many.
        length: tokens in each, at most.
        memory: budget in bytes.
        seed: of random tokens, where there is no text.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        SpecError: ``data`` is not usable.
    """
    path = Path(path)
    checkpoint = _open(path, model, layout)
    notes, doubt = list(checkpoint.notes), ""
    weights = measure_weights(checkpoint)
    sample = Sample(data, sequences, length, seed)
    own: Measurement | None = None
    change: Activations | None = None
    symmetry: Symmetry | None = None
    logged: LoggedLoss | None = None
    tokens, random = "", False
    other = None if against is None else _open(Path(against), model, layout)
    if other is not None:
        found, doubt = _unrelated(checkpoint, other)
        notes += found
        symmetry = _symmetry(path, checkpoint, other)
        logged = None if symmetry is None else _logged_loss(checkpoint, other)
    if activations:
        options: dict[str, Any] = {"model": model, "memory": memory}
        try:
            if other is None:
                own, used = measure(checkpoint, sample, **options)
                tokens, random = used.source, used.random
            else:
                done = _since(checkpoint, other)
                change, _, own = measure_change(other, checkpoint, sample, done=done, **options)
                tokens, random = change.data, change.random_tokens
        except (LayoutError, MissingDependencyError) as error:
            notes.append(f"activations were not measured: {error}")
    verdict: Verdict | None = None
    if symmetry is not None and other is not None:
        steps, alike = _steps(checkpoint, other), alike_state(other.root)
        verdict = verdict_of_training(symmetry, logged, change, weights.nonfinite, steps, alike)
    elif change is not None and other is not None:
        trained = max(_steps(checkpoint, other) or 0, 0)
        verdict = verdict_of_change(change, trained, _instead(path, checkpoint, other) if trained else "")
    if own is not None and own.unused:
        notes.append(f"{len(own.unused)} weight(s) on disk are not used by the model: {own.unused[0]}, ...")
    return Inspection(
        checkpoint=str(path),
        against=None if against is None else str(against),
        **_facts(checkpoint),
        notes=tuple(notes),
        doubt=doubt or None,
        weights=weights,
        activations=own,
        tokens=tokens or None,
        random_tokens=random,
        change=change,
        symmetry=symmetry,
        logged_loss=logged,
        verdict=verdict,
    )


def _steps(checkpoint: Checkpoint, other: Checkpoint) -> int | None:
    """Steps of training between two checkpoints; None where they do not say it."""
    now, then = (c.facts.get("global_step") for c in (checkpoint, other))
    return now - then if isinstance(now, int) and isinstance(then, int) else None


def _instead(path: Path, checkpoint: Checkpoint, other: Checkpoint) -> str:
    """What judges the training since an expansion, of a checkpoint compared with what was expanded."""
    if checkpoint.shapes == other.shapes or manifest_of(checkpoint.root) is None:
        return ""
    made = output_behind(checkpoint.root)
    command = shlex.join(["sparkling", "inspect", str(path), "--against", str(made or "OUTPUT")])
    where = "" if made else ", where OUTPUT is what `sparkling expand` wrote"
    return f"To judge them: {command}{where}."


def alike_state(expanded: Path) -> str:
    """Why copies of an output's last expansion began with the state of their sources; "" if they did not.

    It is the fact behind the report's "Locked", from the manifest alone.

    Args:
        expanded: the output.
    """
    manifest = manifest_of(expanded)
    if manifest is None:
        return ""
    layout, growth = manifest.model_layout(), manifest.growth()
    spec = make_spec(manifest.spec)
    named = {entry.name for entry in manifest.tensors.values() if entry.kind in (Kind.MOMENT, Kind.FACTOR)}
    found = layout.module_table.look_up([layout.canonical(name) for name in sorted(named)])
    held = {axis for pattern in found if pattern is not None for axis in pattern.dims.axes()}
    bare = {axis: grown for axis, grown in growth.items() if axis not in held}
    locked = locked_axes(growth, spec.optimizer) or locked_axes(bare, None)
    if not locked:
        return ""
    done = {"copy": "was copied", "drop": "was dropped"}.get(spec.optimizer, "was not there")
    return (
        f"the optimizer's state of new entries {done if named else 'was not there'}, and they are copies on "
        f"both sides (axes {', '.join(locked)})"
    )


def _since(checkpoint: Checkpoint, other: Checkpoint) -> Enlarged:
    """What an expansion did, if the checkpoint came straight from it, or else which weights are larger.

    Between two checkpoints of one size there was no expansion.
    """
    there = other.shapes
    widened = {name for name, shape in checkpoint.shapes.items() if there.get(name, shape) != shape}
    manifest = manifest_of(checkpoint.root)
    if manifest is None or checkpoint.shapes == other.shapes:
        return Enlarged(widened)
    treatment = treatment_of(make_spec(manifest.spec))
    return Enlarged.by(manifest.model_layout(), manifest.growth(), treatment, widened)


def _open(path: Path, model: str | None, layout: Path | None) -> Checkpoint:
    """Open a checkpoint, with its state under parameter names where these can be found."""
    from dataclasses import replace

    checkpoint = open_checkpoint(path)
    if not any(state.param.isdigit() for state in checkpoint.states):
        return checkpoint
    try:
        return _named(checkpoint, model, layout)
    except SparklingError as error:
        note = f"optimizer state is listed by number, because its parameters' names are not known: {error}"
        return replace(checkpoint, notes=(*checkpoint.notes, note))


def _named(checkpoint: Checkpoint, model: str | None, layout: Path | None) -> Checkpoint:
    """State under its parameters' names; mostly the model's class says them, and no layout is needed."""
    from sparkling_cli.formats.numbered_states import name_parameters
    from sparkling_cli.models.locate import find_layout, model_parameters, named_states

    known = model is not None or "model_type" in (checkpoint.config or {})
    if known and checkpoint.config is not None:
        # Muon's groups: only the layout tells embeddings and head apart; a packaged one needs no transformers
        with suppress(CheckpointError, MissingDependencyError):
            own = model_parameters(checkpoint.config, model)
            return name_parameters(checkpoint, own.shapes, own.decayed)
    previous = manifest_of(checkpoint.root)
    found = find_layout(checkpoint, layout_path=layout, model=model, previous=previous)
    return named_states(checkpoint, found, model=model)


def _unrelated(checkpoint: Checkpoint, other: Checkpoint) -> tuple[list[str], str]:
    """What leaves a part of a comparison out, and what stands against all of it."""
    here, there = ((c.config or {}).get("model_type") for c in (checkpoint, other))
    if here != there:
        return [], (
            f"these are different models ({here or 'not known'}, {there or 'not known'}): "
            "the comparison says nothing about an expansion"
        )
    same = checkpoint.shapes == other.shapes
    expanded = [(sidecar_root(one.root) / MANIFEST).is_file() for one in (checkpoint, other)]
    if expanded[same]:
        return [], ""
    if same:
        return ["no expansion lies between these two: no symmetry meter"], ""
    own, earlier = (sum(map(prod, one.shapes.values())) for one in (checkpoint, other))
    if expanded[1] and own < earlier:
        swapped = shlex.join(["sparkling", "inspect", str(other.root), "--against", str(checkpoint.root)])
        return [], f"the one to compare with is the larger one, made by an expansion: swap them, {swapped}"
    return [], "their sizes differ, and no expansion is known between these two: they may be unrelated"


def _symmetry(path: Path, checkpoint: Checkpoint, expanded: Checkpoint) -> Symmetry | None:
    """The meter, where ``expanded`` has a manifest and the two are of one size (else: not trained yet)."""
    manifest = manifest_of(expanded.root)
    if manifest is None or checkpoint.shapes != expanded.shapes:
        return None
    from sparkling_cli.diagnostics.symmetry import APART, measure_symmetry

    if manifest.growth().keys() <= APART:
        return None

    return measure_symmetry(path, expanded.root)


def _logged_loss(checkpoint: Checkpoint, expanded: Checkpoint) -> LoggedLoss | None:
    """The last losses of a log, against what the log before the expansion lets expect."""
    log, step = losses(checkpoint.facts.get("log_history", ())), expanded.facts.get("global_step")
    forecast = LossForecast.of(log, step) if isinstance(step, int) else None
    if forecast is None:
        return None
    last = [(s, loss) for s, loss in log if s > forecast.last][-LAST:]
    if not last:
        return None
    return LoggedLoss(
        values=len(last),
        loss=fsum(loss for _, loss in last) / len(last),
        forecast=fsum(forecast.at(s) for s, _ in last) / len(last),
        spread=forecast.spread,
    )


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    distinct = set(checkpoint.weights.values())
    states = [key for state in checkpoint.states for key in state.tensors.values()]
    return {
        "format": checkpoint.format,
        "parameters": sum(prod(checkpoint.tensors[key].shape) for key in distinct),
        "weights_bytes": sum(checkpoint.tensors[key].nbytes for key in distinct),
        "state_bytes": sum(checkpoint.tensors[key].nbytes for key in states),
        "dtypes": sorted({checkpoint.tensors[key].dtype for key in distinct}),
        "weight_tensors": len(checkpoint.weights),
        "state_tensors": len(states),
        "step": checkpoint.facts.get("global_step"),
        "optimizer": checkpoint.facts.get("optimizer_class"),
        "model_type": (checkpoint.config or {}).get("model_type"),
    }
