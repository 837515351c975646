"""What of a plan depends on the run's schedule: the pair that ``--init auto`` is, and the re-warmup."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from sparkling_cli.errors import SpecError
from sparkling_cli.plan.resolve import asked_copies, resolve_growth
from sparkling_cli.plan.symmetry import check_pair, treatment_of
from sparkling_cli.results.evidence import pair_for
from sparkling_cli.schedule.baseline import baseline_of
from sparkling_cli.schedule.rewarmup import Rewarmup, read_rewarmup
from sparkling_cli.schedule.write import plan_rewarmup
from sparkling_cli.storage.sidecar import REWARMUP, sidecar_root

if TYPE_CHECKING:
    from sparkling_cli.formats.model import Checkpoint
    from sparkling_cli.layout.model import ModelLayout
    from sparkling_cli.plan.model import Plan
    from sparkling_cli.spec.model import ExpansionSpec


def settled(spec: ExpansionSpec, checkpoint: Checkpoint, layout: ModelLayout) -> ExpansionSpec:
    """The spec, with the pair that ``--init auto`` is for this run and model, and copies for experts' load.

    Raises:
        SpecError: an axis does not fit.
    """
    if spec.expert_load:
        experts = resolve_growth(spec, layout)["experts"]
        copies = asked_copies(spec, experts.target)
        spec = spec.model_copy(update={"copies": copies, "expert_load": {}})
    if spec.init != "auto":
        return spec
    try:
        curve, step = baseline_of(checkpoint, spec.baseline)
        left = curve.total_steps - step
    except SpecError:
        left = None
    growth = resolve_growth(spec, layout)
    parameters = sum(prod(shape) for shape in layout.parameters().values())
    init, scaling = pair_for(growth, left, parameters)
    found = {"init": init, "scaling": scaling if spec.scaling == "rms" else spec.scaling}
    try:
        check_pair(growth, layout, treatment_of(spec.model_copy(update=found)))
    except SpecError:  # a norm inside the MLP, for one
        found = {"init": "copy-copy"}
    return spec.model_copy(update=found)


def plan_schedule(plan: Plan, stages: int) -> tuple[Rewarmup | None, str]:
    """The re-warmup, or why there is none.

    Args:
        plan: the expansion.
        stages: of earlier expansions, by the source's own manifest.

    Raises:
        SpecError: the user described a schedule, and it is not known well enough; or fresh bias correction,
            or a kept step, is asked for and impossible. Where nothing was described, the text says why.
        CheckpointError: the source was expanded before, at a later step than its own.
    """
    source, spec = plan.source, plan.spec
    path = sidecar_root(source.root) / REWARMUP
    previous = read_rewarmup(path) if path.is_file() else None
    described = any(value is not None for value in spec.baseline.model_dump().values())
    try:
        carried = plan.layout.carries(plan.growth)
        return plan_rewarmup(source, spec, previous, number=stages + 1, carried=carried), ""
    except SpecError as error:
        kept = spec.rewarmup.keep_step or (previous is not None and previous.kept_since is not None)
        if described or spec.rewarmup.bias_correction == "fresh" or kept:
            raise
        return None, error.message
