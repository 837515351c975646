"""What a progressive run will cost, before anything is trained: ``sparkling plan``.

From a checkpoint, or from a ``config.json`` alone; no weight is read, but for a head beside the embedding
that the config ties it to: whether it is another decides how many parameters there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkling_cli.compute.flops import plan_compute, run_flops, share_saved
from sparkling_cli.compute.quantity import parse_count, parse_moment
from sparkling_cli.compute.shape import counted_as_stored, shape_of
from sparkling_cli.errors import SpecError
from sparkling_cli.layout.depth import LAYERS
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.results.commands import RunPlan
from sparkling_cli.results.evidence import compute_note, like, tokens_note
from sparkling_cli.spec.choices import ALL
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.spec.options import from_keywords
from sparkling_cli.spec.sources import axis_with_factor, make_spec
from sparkling_cli.storage.tensors import ITEM_BYTES
from sparkling_cli.widening.geometry import Growth, grown_layout

if TYPE_CHECKING:
    from sparkling_cli.formats.model import Checkpoint

#: tokens of a run, at least: fewer are a number without its unit
FEWEST = 100_000
#: How parameters are counted, for the reader of the numbers.
CONVENTION = (
    "C = 6 N D (Eq. 29). N counts every parameter that works on one token: embeddings and norms included, "
    "a tied output head once, routed experts by experts per token / experts."
)


@dataclass(frozen=True)
class Subject:
    """The model that is planned for.

    Attributes:
        name: of the checkpoint or config.
        layout: of the model.
        config: its sizes.
        bytes_per_parameter: of weights and optimizer state.
        assumed: what the bytes rest on, in words.
        checkpoint: that it is of; None where there is a config alone.
    """

    name: str
    layout: ModelLayout
    config: Mapping[str, Any]
    bytes_per_parameter: float
    assumed: str
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class Expansion:
    """Axes to widen after so many tokens."""

    tokens: int
    spec: ExpansionSpec


def plan_run(
    source: Path | str,
    tokens: int | float | str,
    *,
    expand_at: int | float | str | None = None,
    then: Sequence[str] = (),
    multiple_of: int | None = None,
    experts_per_token: int | None = None,
    layout: Path | str | None = None,
    model: str | None = None,
    **axes: Any,
) -> RunPlan:
    """Parameters and compute of a run that widens half-way, against the wide model from scratch.

    Args:
        source: a checkpoint, or a ``config.json``; no weight is read but a head that the config ties.
        tokens: of the whole run: ``2e11``, ``"200B"``.
        expand_at: tokens before the expansion: ``1e11``, ``"100B"``, ``"50%"``.
        then: later expansions: ``"ffn=2,hidden=1.5@150B"``.
        multiple_of: sizes are rounded up to multiples of it.
        experts_per_token: where the config does not say it.
        layout: a layout file instead of inference.
        model: ``package.module:factory`` of a user's own model.
        axes: what to widen, as in :func:`sparkling_cli.expand`: ``axis="ffn", factor=2``.

    Raises:
        SpecError: an axis or a moment is missing or does not fit.
        CheckpointError, LayoutError: see :func:`subject_of`.
    """
    total = parse_count(str(tokens), "--tokens")
    if total < FEWEST:
        hint = f"its unit may be missing: --tokens {total}B" if str(tokens).isdigit() else None
        raise SpecError(f"--tokens: {total:,} tokens are no run to plan", hint=hint)
    fields = from_keywords(axes)
    chosen, more = fields.pop("axes", None), ", ".join(fields)
    if more:
        raise SpecError(f"{more}: nothing that the cost of a run depends on", hint="leave it out")
    expansions = []
    if chosen:
        if expand_at is None:
            raise SpecError("--axis needs a moment: --expand-at is missing", hint="e.g. --expand-at 100B")
        spec = make_spec({"axes": chosen, "multiple_of": multiple_of}, "options")
        expansions.append(Expansion(parse_moment(str(expand_at), total, "--expand-at"), spec))
    elif expand_at is not None:
        raise SpecError("--expand-at needs an axis to widen", hint="e.g. --axis ffn --factor 2")
    later = [then] if isinstance(then, str) else then
    expansions += [parse_then(text, total, multiple_of=multiple_of) for text in later]
    subject = subject_of(Path(source), layout=None if layout is None else Path(layout), model=model)
    return forecast(subject, expansions, total, experts_per_token=experts_per_token)


def subject_of(source: Path, *, layout: Path | None = None, model: str | None = None) -> Subject:
    """The model of a checkpoint, or of a ``config.json``.

    Raises:
        CheckpointError, LayoutError: it cannot be opened, or its layout cannot be known.
    """
    if source.suffix == ".json" and source.is_file():
        from sparkling_cli.formats.directory import read_json
        from sparkling_cli.layout.file import read_layout
        from sparkling_cli.models.infer import infer

        config = read_json(source.parent, source.name)
        found = read_layout(layout) if layout is not None else infer(config, model=model)
        item, words = _config_bytes(config)
        return Subject(source.name, found, config, 3.0 * item, f"{words}, AdamW's two moments alike")
    from sparkling_cli.api import open_source

    checkpoint, found, _ = open_source(source, layout=layout, model=model)
    keys = set(checkpoint.weights.values())
    states = [key for state in checkpoint.states for key in state.tensors.values()]
    nbytes = sum(checkpoint.tensors[key].nbytes for key in (*keys, *states))
    entries = sum(prod(checkpoint.tensors[key].shape) for key in keys)
    each = nbytes / max(entries, 1)
    return Subject(
        checkpoint.root.name, found, checkpoint.config or {}, each, "as in this checkpoint", checkpoint
    )


def _config_bytes(config: Mapping[str, Any]) -> tuple[float, str]:
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if name in ITEM_BYTES:
        return float(ITEM_BYTES[name]), f"weights in {name} as the config says"
    return 4.0, "weights in float32, as the config names no dtype"


def parse_then(text: str, tokens: int, *, multiple_of: int | None = None) -> Expansion:
    """``ffn=2,hidden=1.5@150B``: a later expansion, axis=factor pairs and its moment.

    Args:
        text: the moment is a count, or a share (``50%``) of ``tokens``.
        tokens: of the whole run.
        multiple_of: sizes are rounded up to multiples of it.

    Raises:
        SpecError: not of this form.
    """
    pairs, at, moment = text.rpartition("@")
    if not at:
        raise SpecError(f"--then {text!r}: the moment is missing", hint="write it as ffn=2,hidden=1.5@150B")
    axes = [axis_with_factor(pair, f"--then {text!r}:") for pair in pairs.split(",")]
    bare = [axis["axis"] for axis in axes if "factor" not in axis]
    if bare:
        raise SpecError(
            f"--then {text!r}: {bare[0]!r} is not AXIS=FACTOR", hint="write it as ffn=2,hidden=1.5@150B"
        )
    spec = make_spec({"axes": axes, "multiple_of": multiple_of}, "--then")
    return Expansion(parse_moment(moment, tokens, "--then"), spec)


def forecast(
    subject: Subject, expansions: Sequence[Expansion], tokens: int, *, experts_per_token: int | None = None
) -> RunPlan:
    """The cost of a run of so many tokens that widens at the given moments.

    Raises:
        SpecError: an axis or a moment does not fit.
        LayoutError: the number of experts per token is not known.
    """
    from sparkling_cli.plan.advice import small_share, undecayed_notes
    from sparkling_cli.plan.resolve import resolve_growth
    from sparkling_cli.plan.steps import step_notes

    layout, warnings = subject.layout, []
    lengths: list[str] = []
    steps: list[tuple[int, Mapping[str, Growth]]] = []
    for expansion in expansions:
        spec = expansion.spec
        if layout.numbered and LAYERS in {axis.axis for axis in spec.axes}:
            spec = spec.model_copy(update={"at": "end"})  # where they are costs nothing
        if "experts" in {layout.aliases.get(axis.axis, axis.axis) for axis in spec.axes}:
            even = (1.0,) * layout.sizes["experts"]  # how many there are of each costs nothing
            spec = spec.model_copy(update={"expert_load": {ALL: even}})
        growth = resolve_growth(spec, layout)
        steps.append((expansion.tokens, growth))
        warnings.append(small_share(layout, growth))
        if subject.checkpoint is not None:
            lengths += step_notes(subject.checkpoint, layout, growth)
            lengths += undecayed_notes(subject.checkpoint, growth, spec.init)
        layout = grown_layout(layout, growth)
    counted = subject.layout
    if subject.checkpoint is not None:
        counted = counted_as_stored(counted, subject.checkpoint)
    shape = shape_of(counted, subject.config, top_k=experts_per_token)
    phases = plan_compute(shape, steps, tokens, bytes_per_parameter=subject.bytes_per_parameter)
    flops = run_flops(phases)
    notes = []
    for (at, grown), (before, after) in zip(steps, pairwise(phases), strict=True):
        factor = max(axis.target / axis.source for axis in grown.values())
        each = [(p.stop_tokens - p.start_tokens) / p.active_parameters for p in (before, after)]
        notes.append(tokens_note(grown, each[0], each[1], like(factor, at / tokens, "cosine")))
        notes.append(compute_note(grown))
    return RunPlan(
        source=subject.name,
        model=subject.layout.name,
        tokens=tokens,
        phases=phases,
        flops=flops,
        saved=share_saved(flops.progressive, flops.scratch),
        bytes_assumed=subject.assumed,
        convention=CONVENTION,
        notes=tuple(dict.fromkeys(note for note in (*notes, *lengths) if note is not None)),
        warnings=tuple(dict.fromkeys(warning for warning in warnings if warning is not None)),
    )
