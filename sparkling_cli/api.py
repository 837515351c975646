"""The public Python functions; the command line is a thin layer on them.

``expand`` writes a wider checkpoint, ``make_plan`` says what it would do, ``verify`` proves an output,
``inspect`` measures.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from sparkling_cli.errors import CheckpointError, SparklingError, SpecError
from sparkling_cli.formats.gc_pause import collector_paused, collector_running
from sparkling_cli.spec.model import ExpansionSpec

if TYPE_CHECKING:
    from sparkling_cli.execute.ranks import Team
    from sparkling_cli.execute.stream import Written
    from sparkling_cli.formats.model import Checkpoint
    from sparkling_cli.layout.model import ModelLayout
    from sparkling_cli.manifest import Manifest
    from sparkling_cli.models.expected import Asking
    from sparkling_cli.plan.model import Calibration, Expansion, Plan
    from sparkling_cli.results.commands import Verification
    from sparkling_cli.results.expansion import Report
    from sparkling_cli.results.measured import Inspection
    from sparkling_cli.schedule.rewarmup import Rewarmup

#: makes a progress sink: ``progress(title, total_bytes)`` is entered, and called with byte counts; of a stage
#: without bytes the total is None. ``progress=True`` is :func:`sparkling_cli.report.progress.shown`.
Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]

#: what to do: a spec, its fields (``{"axes": {"ffn": 2}}``), or a file of them
Asked: TypeAlias = ExpansionSpec | Mapping[str, Any] | Path | str


@dataclass(frozen=True)
class ExpansionResult:
    """A finished expansion.

    Attributes:
        expansion: what was planned.
        written: digests.
        report: what ``sparkling/report.json`` holds; None on ranks other than the first.
    """

    expansion: Expansion
    written: Written
    report: Report | None

    @property
    def destination(self) -> Path:
        """The output."""
        return self.expansion.destination

    def __repr__(self) -> str:
        verdict = f": {self.report.verdict.headline}" if self.report is not None else ""
        return f"ExpansionResult({self.destination}{verdict})"

    def _repr_html_(self) -> str | None:
        """The report in a frame of its own, for notebooks: verdict and figures first, the rest below."""
        if self.report is None:
            return None
        from markupsafe import escape

        from sparkling_cli.report.page import render

        page = escape(render(self.report).decode())
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 36em; border: 0"></iframe>'


def open_source(
    source: Path,
    *,
    layout: Path | None = None,
    model: str | None = None,
    param_order: Path | None = None,
) -> tuple[Checkpoint, ModelLayout, Manifest | None]:
    """Open a checkpoint, find its layout, and name its optimizer state.

    The layout comes from ``layout``, else from the manifest of an earlier expansion, else from a file in
    the package, else by inference from the model's own code.

    Raises:
        CheckpointError, LayoutError: see there.
    """
    from sparkling_cli.formats.detect import open_checkpoint
    from sparkling_cli.manifest import manifest_of
    from sparkling_cli.models.locate import find_layout, named_states
    from sparkling_cli.models.stored import without_strays
    from sparkling_cli.plan.naming import weights_of

    checkpoint = open_checkpoint(source)
    previous = manifest_of(source)
    found = find_layout(checkpoint, layout_path=layout, model=model, previous=previous)
    checkpoint = without_strays(checkpoint, found)
    try:
        named = named_states(checkpoint, found, model=model, param_order=param_order)
        return named, found, previous
    except CheckpointError:
        # If the weights do not fit either, that is the cause, and the clearer message.
        weights_of(checkpoint, found, "disk")
        raise


@collector_paused()  # plans of many tensors are many objects
def make_plan(
    source: Path | str,
    destination: Path | str | None = None,
    spec: Asked | None = None,
    *,
    layout: Path | str | None = None,
    model: str | None = None,
    param_order: Path | str | None = None,
    **options: Any,
) -> Expansion:
    """Plan an expansion from shapes alone; :func:`expand` carries it out.

    Args:
        source: the checkpoint.
        destination: the output. Default: beside the source, named after the growth.
        spec: what to do: a spec, its fields, or a file of them; or keyword ``options``, as in :func:`expand`.
        layout: a layout file instead of inference.
        model: ``package.module:factory`` of a user's own model.
        param_order: a file with the parameters' names, one per line, in the optimizer's order.
        options: fields of the spec.

    Raises:
        SpecError, CheckpointError, LayoutError: the source, the spec or their union is unsound.
    """
    from sparkling_cli.execute.source_state import snapshot
    from sparkling_cli.formats.detect import recognized
    from sparkling_cli.formats.trainer_facts import without_outdated
    from sparkling_cli.plan.build import build_plan, lay_out
    from sparkling_cli.plan.model import Expansion, Invocation
    from sparkling_cli.report.model_card import with_card
    from sparkling_cli.schedule.baseline import doubts
    from sparkling_cli.schedule.plan import plan_schedule, settled
    from sparkling_cli.schedule.write import notes, remarks

    source = Path(source)
    layout = None if layout is None else Path(layout)
    param_order = None if param_order is None else Path(param_order)
    spec = _spec(spec, options)
    root, _ = recognized(source)  # a folder of anything else is not walked
    state = snapshot(root)
    checkpoint, found, previous = open_source(source, layout=layout, model=model, param_order=param_order)
    checkpoint, anew = without_outdated(checkpoint)
    asked, spec = spec.init, settled(spec, checkpoint, found)
    plan = build_plan(checkpoint, found, spec, None if previous is None else previous.originals())
    plan = _with_kinds(plan)
    if asked != spec.init:
        plan = replace(plan, notes=(*plan.notes, f"--init {asked} is {spec.init}, --scaling {spec.scaling}"))
    plan = replace(plan, warnings=plan.warnings + doubts(checkpoint, spec.baseline))
    rewarmup, missing = plan_schedule(plan, 0 if previous is None else len(previous.stages))
    if rewarmup is not None:
        said = plan.notes + remarks(rewarmup, spec, plan.growth)
        plan = replace(plan, warnings=plan.warnings + notes(rewarmup), notes=said)
    given = None if destination is None else Path(destination)
    expansion = Expansion(
        plan=plan,
        files=(*lay_out(plan), *anew),
        destination=given or default_destination(root, plan),
        invocation=Invocation(source, given, layout, model, param_order=param_order),
        previous=previous,
        rewarmup=rewarmup,
        rewarmup_missing=missing,
        source_state=state,
    )
    return with_card(expansion)


def _with_kinds(plan: Plan) -> Plan:
    """A plan for a deeper model with the kinds of layers that its class would derive otherwise.

    Raises:
        LayoutError: the class takes no list of them.
    """
    from sparkling_cli.layout.depth import LAYERS
    from sparkling_cli.models.kinds import unasked_class, written_kinds

    if LAYERS not in plan.growth:
        return plan
    config = plan.source.config
    written = written_kinds(config, plan.layout, plan.growth[LAYERS].order)
    unasked = unasked_class(config)
    warnings = plan.warnings if unasked is None else (*plan.warnings, unasked)
    return replace(plan, config={**plan.config, **written}, warnings=warnings)


@collector_paused()
def expand(
    source: Path | str,
    destination: Path | str | None = None,
    spec: Asked | None = None,
    *,
    layout: Path | str | None = None,
    model: str | None = None,
    param_order: Path | str | None = None,
    memory: int | str = 1 << 30,
    threads: int | None = None,
    data: Path | str | None = None,
    report: str = "auto",
    progress: Progress | bool | None = None,
    expansion: Expansion | None = None,
    **options: Any,
) -> ExpansionResult:
    """Write a wider checkpoint.

    Args:
        source: the checkpoint; never written to.
        destination: the output; must not exist. Default: beside the source, named after the growth.
        spec: what to do: a spec, its fields, or a file of them; or keyword ``options``.
        layout: a layout file instead of inference.
        model: ``package.module:factory`` of a user's own model.
        param_order: a file with the parameters' names, one per line, in the optimizer's order.
        memory: budget in bytes, or a text such as ``2G``.
        threads: worker threads; default by the machine.
        data: text or tokens to measure activations on.
        report: ``full``, ``none``, or ``auto``: activations are measured unless the model is large.
        progress: True for a bar on a terminal or in a notebook and lines elsewhere; or see :data:`Progress`.
        expansion: a plan made before by :func:`make_plan`.
        options: ``axis="ffn", factor=2``, or ``axes={"ffn": 2, "hidden": 1.5}``; every option of the command
            line by its own name (``init="zero-copy"``, ``rewarmup_steps=10``, ``schedule="wsd"``); or the
            fields of the spec.

    Raises:
        SparklingError: one of its kinds; nothing that looks finished is left behind.
    """
    from sparkling_cli.execute.distributed import team_of_processes
    from sparkling_cli.execute.ranks import Team
    from sparkling_cli.execute.stream import execute
    from sparkling_cli.models.expected import Asking
    from sparkling_cli.outcome import check_data, sidecar_files
    from sparkling_cli.plan.build import with_calibration
    from sparkling_cli.spec.quantities import LEAST_MEMORY, parse_bytes

    data = None if data is None else Path(data)
    memory = parse_bytes(memory, "--memory", least=LEAST_MEMORY) if isinstance(memory, str) else memory
    check_report(report, data)
    if progress is True:
        from sparkling_cli.report.progress import shown

        progress = shown
    if expansion is None:
        expansion = make_plan(
            source, spec=spec, layout=layout, model=model, param_order=param_order, **options
        )
    if destination is not None:
        given = replace(expansion.invocation, destination=Path(destination))
        expansion = replace(expansion, destination=Path(destination), invocation=given)
    if data is not None and report == "none" and expansion.plan.spec.scaling != "calibrated":
        raise SpecError("--data: nothing is measured with --report none", hint="leave out one of them")
    if data is not None:
        with collector_running():
            check_data(expansion, data, report)
    ready = replace(expansion, invocation=replace(expansion.invocation, data=data, report=report))
    reports: list[Report] = []

    bar = ExitStack()

    def begin(title: str, total: int | None) -> Callable[[int], None]:
        """Show a stage in place of the one before."""
        bar.close()
        return bar.enter_context(progress(title, total)) if progress else lambda _count: None

    def sidecar(written: Written) -> Mapping[str, bytes]:
        files, found = sidecar_files(ready, written, memory=memory, begin=begin, unasked=asked.missing)
        reports.append(found)
        return files

    with bar, team_of_processes() as team, Asking(_config_of(ready, team)) as asked:
        if ready.plan.spec.scaling == "calibrated":
            begin("calibrating", None)
            unfitted = ready
            fitted = (team or Team()).lead(lambda: _fitted(unfitted, memory))
            ready = replace(ready, plan=with_calibration(ready.plan, fitted))
        advance = begin("writing", ready.bytes_to_write)
        written = execute(
            ready,
            memory=memory,
            threads=threads,
            progress=advance,
            sidecar=sidecar,
            check=lambda root: _check_opens(root, ready.plan, asked),
            team=team,
        )
    return ExpansionResult(ready, written, reports[0] if reports else None)


def _fitted(expansion: Expansion, memory: int) -> Calibration:
    """Factors of scaling ``calibrated``."""
    from sparkling_cli.diagnostics.calibrate import calibrate

    asked = expansion.invocation
    with collector_running():
        return calibrate(expansion.plan, data=asked.data, model=asked.model, memory=memory)


def check_report(report: str, data: Path | None) -> None:
    """What is asked of the report can be done; asked before the plan is made, which takes longer.

    Raises:
        SpecError: it cannot.
    """
    if report not in ("auto", "full", "none"):
        raise SpecError(f"report: expected auto, full or none, found {report!r}")
    if data is not None:
        from sparkling_cli.diagnostics.data import check_file

        check_file(data)


def _config_of(expansion: Expansion, team: Team | None) -> Mapping[str, Any] | None:
    """The model's config as the output will have it; None where it has no file, or is another rank's task."""
    if team is not None and team.rank:
        return None
    for file in expansion.files:
        if file.path == (expansion.plan.source.config_file or "config.json") and len(file.literals) == 1:
            try:
                found = json.loads(file.literals[0][1])
            except ValueError:
                return None
            return found if isinstance(found, dict) else None
    return None


def _check_opens(root: Path, plan: Plan, asked: Asking) -> None:
    """The finished output opens as a checkpoint with the planned shapes, which are those of its own class.

    Raises:
        OutputError: it does not; it never appears.
    """
    from sparkling_cli.errors import OutputError
    from sparkling_cli.execute.disk_space import reading_back
    from sparkling_cli.formats.detect import open_checkpoint
    from sparkling_cli.layout.depth import LAYERS
    from sparkling_cli.models.expected import class_faults, weight_shapes

    with reading_back(root):
        found = open_checkpoint(root)
    shapes = {key: tensor.shape for key, tensor in found.tensors.items()}
    wrong = [row.key for row in plan.rows if row.key in shapes and shapes[row.key] != row.shape]
    faults = class_faults(
        asked.answer(), weight_shapes(found), lambda: (plan.source.config, weight_shapes(plan.source))
    )
    if faults:
        raise OutputError(
            f"the output would not be loaded by its own class: {'; '.join(faults[:3])}"
            + (f"; and {len(faults) - 3} more" if len(faults) > 3 else ""),
            hint="this class builds another kind of layer in some place: choose other places by --at"
            if LAYERS in plan.growth
            else "the layout does not say all that grows in this model: report it with the command, or give "
            "a layout file that does (--layout)",
        )
    if found.format != plan.source.format or wrong:
        raise OutputError(
            f"the output does not read back as planned: format {found.format}, wrong shapes: {wrong[:3]}",
            hint="this is a bug; the source is untouched, please report it with the command",
        )


@collector_paused()
def verify(source: Path | str, destination: Path | str, *, progress: Progress | None = None) -> Verification:
    """Prove an output from the two checkpoints and the manifest alone.

    Raises:
        VerificationError: something does not hold; says what, first of all.
        CheckpointError: there is no manifest, or a checkpoint cannot be read.
    """
    from sparkling_cli.verification import verify as prove

    return prove(Path(source), Path(destination), progress=progress)


def inspect(
    checkpoint: Path | str,
    against: Path | str | None = None,
    *,
    data: Path | str | None = None,
    **options: Any,
) -> Inspection:
    """Measure a checkpoint, or compare it with an earlier one.

    Args:
        checkpoint: any that can be opened.
        against: the source of its expansion, or the expanded checkpoint that it was trained on from.
        data: text, JSONL or token file to measure activations on.
        options: see :func:`sparkling_cli.diagnostics.inspect.inspect_checkpoint`.

    Raises:
        CheckpointError, SpecError: see there.
    """
    from sparkling_cli.diagnostics.inspect import inspect_checkpoint

    data = None if data is None else Path(data)
    return inspect_checkpoint(checkpoint, against=against, data=data, **options)


def write_schedule(
    output: Path | str,
    *,
    rewarmup: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Any] | None = None,
) -> Rewarmup:
    """Add a re-warmup schedule to an output that exists, or replace it; weights and state stay as they are.

    Args:
        output: what ``expand`` wrote, or a later checkpoint with its history.
        rewarmup: fields of the spec's ``rewarmup``; what is not given stays as it was last written.
        baseline: fields of its ``baseline``, for what cannot be read from the checkpoint.

    Raises:
        SparklingError: one of its kinds; the output is as it was.
    """
    from sparkling_cli import outcome

    changes = {"rewarmup": dict(rewarmup or {}), "baseline": dict(baseline or {})}
    return outcome.write_schedule(Path(output), changes)[0]


def layout_of(path: Path | str, *, model: str | None = None) -> ModelLayout:
    """The layout of a checkpoint, or of a ``config.json``.

    Raises:
        CheckpointError, LayoutError: see :func:`open_source`.
    """
    path = Path(path)
    if path.suffix == ".json" and path.is_file():
        from sparkling_cli.formats.directory import read_json
        from sparkling_cli.models.infer import infer

        return infer(read_json(path.parent, path.name), model=model)
    return open_source(path, model=model)[1]


def _spec(
    spec: ExpansionSpec | Mapping[str, Any] | Path | str | None, options: Mapping[str, Any]
) -> ExpansionSpec:
    from sparkling_cli.spec.options import from_keywords
    from sparkling_cli.spec.sources import make_spec, read_spec_file

    if spec is None:
        return make_spec(from_keywords(options), "options")
    if options:
        raise SpecError(f"give a spec or its fields as options, not both; options: {', '.join(options)}")
    if isinstance(spec, ExpansionSpec):
        return spec
    if isinstance(spec, Mapping):
        return make_spec(from_keywords(spec), "options")
    return make_spec(read_spec_file(Path(spec)), str(spec))


_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_python(function: _Function) -> _Function:
    """The function with errors in the words of a call: ``axis="ffn"`` for ``--axis ffn``."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except SparklingError as error:
            from sparkling_cli.spec.options import python_words

            error.message = python_words(error.message)
            error.hint = python_words(error.hint) if error.hint else None
            raise

    return cast("_Function", called)


def default_destination(source: Path, plan: Plan) -> Path:
    """``checkpoint-1000-ffn2x`` beside ``checkpoint-1000``, below the working directory as it was given."""
    parts = []
    for name, grown in sorted(plan.growth.items()):
        parts.append(f"{name}{grown.target / grown.source:.4g}x")
    given, source = source, source.resolve()
    if not given.is_absolute() and source != (here := Path.cwd()) and source.is_relative_to(here):
        source = source.relative_to(here)
    suffix = source.suffix if source.is_file() else ""
    stem = source.name[: len(source.name) - len(suffix)]
    return source.with_name(f"{stem}-{'-'.join(parts)}{suffix}")
