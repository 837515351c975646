"""The ``sparkling/`` folder of an output: schedule, report and manifest, made before it appears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import (
    CheckpointError,
    LayoutError,
    MissingDependencyError,
    SparklingError,
    VerificationError,
)
from sparkling_cli.execute.disk_space import reading_back
from sparkling_cli.formats.gc_pause import collector_running
from sparkling_cli.manifest import make_manifest
from sparkling_cli.plan.model import Expansion, Plan
from sparkling_cli.results.expansion import Report
from sparkling_cli.results.measured import Activations
from sparkling_cli.schedule.baseline import doubts
from sparkling_cli.schedule.rewarmup import Rewarmup, read_rewarmup
from sparkling_cli.schedule.write import plan_rewarmup, rewarmup_files
from sparkling_cli.storage.sidecar import (
    DIGESTS,
    MANIFEST,
    REPORT_HTML,
    REPORT_JSON,
    REWARMUP,
    sidecar_root,
)

if TYPE_CHECKING:
    from sparkling_cli.diagnostics.activations import Begin
    from sparkling_cli.execute.stream import Written

#: under ``--report auto``, activations of an output with more bytes of weights, or more weight tensors
#: (experts come into memory one by one), are not measured
AUTO_LIMIT, AUTO_TENSORS = 1 << 30, 10_000
#: under ``--report auto``, floating-point operations of the forward passes; they take about as long as to
#: write a GiB
AUTO_WORK = 5e10


def sidecar_files(
    expansion: Expansion, written: Written, *, memory: int, begin: Begin, unasked: Callable[[], str]
) -> tuple[Mapping[str, bytes], Report]:
    """All small files of an output, the manifest last, and the report's facts.

    Args:
        expansion: what was done.
        written: digests of what was read and written.
        memory: budget in bytes.
        begin: see :data:`~sparkling_cli.diagnostics.activations.Begin`.
        unasked: why the model's own class could not be asked for its names and shapes; "" if it was.
    """
    from sparkling_cli.report.facts import assemble
    from sparkling_cli.report.page import render

    facts = assemble(expansion, written, *_measure(expansion, written, memory, begin), unasked())
    files = {} if expansion.rewarmup is None else dict(rewarmup_files(expansion.rewarmup))
    files[REPORT_JSON] = facts.to_json()
    files[REPORT_HTML] = render(facts)
    files[MANIFEST] = make_manifest(expansion, written, files)
    return files, facts


def schedule_doubts(output: Path) -> tuple[str, ...]:
    """What speaks against the schedule that an output was given, see :func:`doubts`; nothing is refused.

    Args:
        output: as in :func:`write_schedule`, or a ``rewarmup.json``, of which nothing else is known.
    """
    from sparkling_cli.formats.detect import open_checkpoint
    from sparkling_cli.manifest import read_manifest
    from sparkling_cli.spec.sources import make_spec

    try:
        given = make_spec(read_manifest(sidecar_root(output) / MANIFEST).stages[-1].spec, "options").baseline
        return () if given.peak is None else doubts(open_checkpoint(output), given)
    except SparklingError:
        return ()


def write_schedule(output: Path, changes: Mapping[str, Any]) -> tuple[Rewarmup, tuple[str, ...]]:
    """Add the re-warmup of its last expansion to an output that exists, or replace it.

    What else says something of it is written anew: report, manifest and digests, so that ``verify`` passes
    as before. Everything is as if the output had been made with these options. Weights and state are not
    touched.

    Args:
        output: a checkpoint with a ``sparkling/`` folder: an output, or what training made of it.
        changes: of the spec's ``rewarmup`` and ``baseline``, over those that the output was made with.

    Returns:
        The re-warmup; and what speaks against it, and why the report stays as it was, if it does.

    Raises:
        CheckpointError: there is no manifest, or a file is damaged.
        VerificationError: the small files are not those that were written.
        SpecError: the schedule is not known well enough; see :func:`plan_rewarmup`.
        OutputError: the files cannot be written.
    """
    from sparkling_cli.execute.commit import replace_files
    from sparkling_cli.formats.detect import open_checkpoint
    from sparkling_cli.manifest import read_manifest, with_changes
    from sparkling_cli.report.facts import with_rewarmup
    from sparkling_cli.report.page import render
    from sparkling_cli.spec.sources import make_spec, merge
    from sparkling_cli.verification.files import check_small_files, with_digests

    checkpoint = open_checkpoint(output)
    root = sidecar_root(output)
    manifest = read_manifest(root / MANIFEST)
    whole = (root / DIGESTS).is_file()  # not so where the history was carried into a later checkpoint
    faults = check_small_files(root, DIGESTS, MANIFEST) if whole else []
    if faults:
        raise VerificationError(f"{output} is not as it was written: {'; '.join(faults)}")
    stage = manifest.stages[-1]
    spec = make_spec(merge(stage.spec, changes), "options")
    before = read_rewarmup(root, replacing=True) if (root / REWARMUP).is_file() else None
    earlier = tuple(s for s in before.stages if s.stage < stage.stage) if before is not None else ()
    previous = replace(before, stages=earlier) if before is not None and earlier else None
    at = stage.step if spec.baseline.expansion_step is None else spec.baseline.expansion_step
    described = spec.model_copy(update={"baseline": spec.baseline.model_copy(update={"expansion_step": at})})
    carried = manifest.model_layout().carries(manifest.growth())
    rewarmup = plan_rewarmup(checkpoint, described, previous, number=stage.stage, carried=carried)
    files = dict(rewarmup_files(rewarmup))
    said = new = doubts(checkpoint, described.baseline)
    if (root / REPORT_JSON).is_file():
        try:
            report = Report.read((root / REPORT_JSON).read_bytes(), REPORT_JSON)
        except CheckpointError as error:
            said = (*new, f"the report stays as it was: {error.message}")
        else:
            old = doubts(checkpoint, make_spec(stage.spec, "options").baseline)
            kept = tuple(warning for warning in report.warnings if warning not in old)
            report = report.model_copy(update={"warnings": kept + new})
            report = with_rewarmup(report, spec, rewarmup, before, manifest.growth())
            files |= {REPORT_JSON: report.to_json(), REPORT_HTML: render(report)}
    files[MANIFEST] = with_changes((root / MANIFEST).read_bytes(), spec, files)
    if whole:
        files[DIGESTS] = with_digests((root / DIGESTS).read_bytes(), files)
    replace_files(root, files)
    return rewarmup, said


def check_data(expansion: Expansion, data: Path, report: str) -> None:
    """The tokens to measure on can be had from ``data``: read once before anything is written.

    Args:
        expansion: what is planned.
        data: text or tokens.
        report: ``full``, ``none`` or ``auto``.

    Raises:
        SpecError: it holds no usable tokens, or ids outside the vocabulary.
        CheckpointError: it is text, and the checkpoint has no tokenizer that works.
        MissingDependencyError: it is text, transformers is not installed, and the report has to be full.
    """
    plan = expansion.plan
    if plan.spec.scaling != "calibrated" and _not_measured(plan, report):
        return
    from sparkling_cli.diagnostics.data import Sample, load_tokens

    root, known = plan.source.root, (plan.source.config or {}).get("vocab_size")
    vocabulary = known if isinstance(known, int) else plan.layout.sizes.get("vocab", 1 << 31)
    try:
        load_tokens(Sample(data), root if root.is_dir() else None, vocabulary)
    except MissingDependencyError:
        if report == "full":
            raise


def _not_measured(plan: Plan, report: str) -> str:
    """Why activations are not measured, from the plan alone; "" if they are."""
    count = sum(not row.slot for row in plan.rows)
    size, _ = plan.nbytes(after=True)
    if report == "none":
        return "not asked for (--report none)"
    if report == "auto" and (size > AUTO_LIMIT or count > AUTO_TENSORS):
        return (
            f"the output's weights take {size / (1 << 30):.1f} GiB in {count:,} tensors; measure with "
            "--report full, or later by `sparkling inspect SRC --against DST`"
        )
    return ""


def _measure(
    expansion: Expansion, written: Written, memory: int, begin: Begin
) -> tuple[Activations | None, str]:
    """Activations of source and output on the same tokens, or why they were not measured."""
    plan, asked = expansion.plan, expansion.invocation
    data, report = asked.data, asked.report
    weights = [row for row in plan.rows if not row.slot]
    missing = _not_measured(plan, report)
    if missing:
        return None, missing
    from sparkling_cli.diagnostics.activations import measure_change  # torch is of no use before
    from sparkling_cli.diagnostics.data import Sample
    from sparkling_cli.diagnostics.measurement import Enlarged
    from sparkling_cli.formats.detect import open_checkpoint

    assert written.root is not None  # the output is complete, but not in place yet
    sample = Sample(data)
    if report == "auto" and data is None:
        parameters = sum(prod(row.shape) + row.entries_before for row in weights)
        sample = Sample(None, *affordable(parameters))
    with reading_back(written.root):
        output = open_checkpoint(written.root)
    try:
        with collector_running():
            widened = {row.name for row in weights if row.grows}
            done = Enlarged.by(plan.layout, plan.growth, plan.treatment, widened)
            found, _, _ = measure_change(
                plan.source, output, sample, model=asked.model, memory=memory, done=done, begin=begin
            )
    except (LayoutError, MissingDependencyError) as error:
        if report == "full":
            raise
        return None, error.message
    return found, ""


def affordable(parameters: int) -> tuple[int, int]:
    """Sequences, and tokens in each, whose forward passes take about ``AUTO_WORK`` operations.

    A ratio of RMS is an average over tokens and entries, and the same tokens go through both models, so a
    hundred tokens say what thousands do.

    Args:
        parameters: of both models together; each takes two operations per token.
    """
    from sparkling_cli.diagnostics.data import LENGTH, SEQUENCES

    tokens = int(AUTO_WORK / (2 * max(parameters, 1)))
    return min(max(tokens // LENGTH, 1), SEQUENCES), min(max(tokens, 64), LENGTH)
