"""The ways of going on from the middle: an expansion through the tool, then training with its hooks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.train import models, optim
from benchmarks.train.base import middle
from benchmarks.train.data import Text
from benchmarks.train.loop import Run, load_checkpoint, make_scheduler, train
from sparkling_cli.api import expand
from sparkling_cli.diagnostics.symmetry import measure_symmetry
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.training import read_history, rewarm


@dataclass(frozen=True)
class Treatment:
    """One way of going on.

    Attributes:
        says: what it is, for tables.
        options: fields of the expansion spec that differ from the tool's defaults.
        warm: who re-warms: ``new`` entries (the tool's hooks), ``all`` of the model, or ``none``.
    """

    says: str
    options: Mapping[str, Any] = field(default_factory=dict)
    warm: str = "new"


COPIED = {"optimizer": "copy"}

TREATMENTS: Mapping[str, Treatment] = {
    "sparkling": Treatment("SPARKLING: copy-copy, RMS scaling, asymmetric reset, re-warmup of new entries"),
    "naive": Treatment("naive copy: function-preserving copies, copied state", COPIED, "none"),
    "drop": Treatment("function-preserving copies, state dropped", {"optimizer": "drop"}, "none"),
    "asymmetric": Treatment("copy-copy, RMS scaling, asymmetric reset, no re-warmup", {}, "none"),
    "no-rms": Treatment("SPARKLING without RMS scaling", {"scaling": "none"}),
    "rewarm-all": Treatment("copy-copy, RMS scaling, asymmetric reset, everything re-warmed", {}, "all"),
    "zero-copy": Treatment("SPARKLING with zero-copy", {"init": "zero-copy"}),
    "random-copy": Treatment("SPARKLING with random-copy", {"init": "random-copy"}),
    "naive-no-rms": Treatment("naive copy without RMS scaling", {**COPIED, "scaling": "none"}, "none"),
    "random-random": Treatment("SPARKLING with random-random", {"init": "random-random"}),
    "random-zero": Treatment("SPARKLING with random-zero", {"init": "random-zero"}),
    "fresh": Treatment("SPARKLING with fresh bias correction", {"rewarmup": {"bias_correction": "fresh"}}),
}

TAU_W = 25


def go_on(
    base: Path, out: Path, run: Run, text: Text, optimizer: str, axes: tuple[str, ...], name: str, seed: int
) -> None:
    """Expand the middle checkpoint under ``base`` and train the result to the end of the schedule.

    Writes ``<name>.json`` into ``out`` and keeps the trained weights beside it.
    """
    logging.set_verbosity_error()
    treatment = TREATMENTS[name]
    wide = out / name / "expanded"
    shutil.rmtree(out / name, ignore_errors=True)
    wide.parent.mkdir(parents=True)
    rewarmup = {"steps": TAU_W, **treatment.options.get("rewarmup", {})}
    options = {k: v for k, v in treatment.options.items() if k != "rewarmup"}
    spec = ExpansionSpec(
        axes=[{"axis": axis, "factor": 2} for axis in axes], rewarmup=rewarmup, seed=seed, **options
    )
    began = time.perf_counter()
    expand(middle(base), wide, spec, report="none", threads=1)
    expanding = time.perf_counter() - began

    model = AutoModelForCausalLM.from_pretrained(wide)
    model, forward = models.reusable(model, run.compile)
    opt = optim.make(optimizer, model, run.lr, run.beta2)
    scheduler = make_scheduler(run, opt)
    start = load_checkpoint(wide, opt, scheduler)
    assert start == run.middle
    if treatment.warm == "new":
        rewarm(opt, model, wide)
    elif treatment.warm == "all":
        _rewarm_everything(wide, run, scheduler)
    log = train(run, text, seed, model, forward, opt, scheduler, start)
    trained = out / name / "trained"
    model.save_pretrained(trained)
    meter = measure_symmetry(trained, wide)
    log.save(
        out / f"{name}.json",
        seconds=time.perf_counter() - began,
        expanding=expanding,
        loss_after_expansion=log.heldout[start],
        symmetry={
            "cosine": meter.cosine,
            "distance": meter.distance,
            "locked": meter.locked,
        },
        parameters=sum(p.numel() for p in model.parameters()),
    )
    shutil.rmtree(out / name)


def _rewarm_everything(wide: Path, run: Run, scheduler: Any) -> None:
    """Put the whole model on the new entries' curve (the paper's Table 7)."""
    schedule = read_history(wide).rewarmup
    stage = schedule.stages[-1]
    scheduler.lr_lambdas = [lambda t: stage.eta_new(t) / run.lr for _ in scheduler.lr_lambdas]
