"""The ways of going on from the middle: an expansion through the tool, then training with its hooks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.train import models, optim
from benchmarks.train.base import checkpoint, ready
from benchmarks.train.between import change
from benchmarks.train.data import Text
from benchmarks.train.jobs import Job, Widening
from benchmarks.train.loop import Note, Run, Training, load_checkpoint, make_scheduler, save_checkpoint
from sparkling_cli.api import expand
from sparkling_cli.diagnostics.symmetry import measure_symmetry
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.training import carry_history, read_history, rewarm


@dataclass(frozen=True)
class Treatment:
    """One way of going on.

    Attributes:
        says: what it is, for tables.
        options: fields of the expansion spec that differ from the tool's defaults.
        warm: who re-warms: ``new`` entries (the tool's hooks), ``all`` of the model, or ``none``.
        between: arguments of ``between.change``: what becomes of copies of ``ffn`` after the expansion.
    """

    says: str
    options: Mapping[str, Any] = field(default_factory=dict)
    warm: str = "new"
    between: Mapping[str, float] = field(default_factory=dict)


COPIED = {"optimizer": "copy", "allow_locked": True}
DROPPED = {"optimizer": "drop", "allow_locked": True}

#: what every axis can have
EVERYWHERE: Mapping[str, Treatment] = {
    "sparkling": Treatment("SPARKLING: copy-copy, RMS scaling, asymmetric reset, re-warmup of new entries"),
    "naive": Treatment("naive copy: function-preserving copies, copied state", COPIED, "none"),
    "drop": Treatment(
        "function-preserving copies, state dropped", {"optimizer": "drop", "allow_locked": True}, "none"
    ),
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
#: run only where they are named: some are for ``ffn`` alone
NAMED: Mapping[str, Treatment] = {
    "function": Treatment("SPARKLING with Net2Net's factors", {"scaling": "function"}),
    "random-zero-function": Treatment(
        "SPARKLING with random-zero, function kept", {"init": "random-zero", "scaling": "function"}
    ),
    "state-copied": Treatment(
        "copied state, re-warmup of new entries", {"optimizer": "copy", "allow_locked": True}
    ),
    "router-noise": Treatment("SPARKLING with noise of 0.01 on new routers", {"router_noise": 0.01}),
    **{
        f"{name}-calibrated": Treatment(f"{says}, calibrated", {**options, "scaling": "calibrated"})
        for name, says, options in (
            ("sparkling", "SPARKLING", {}),
            ("random-copy", "SPARKLING with random-copy", {"init": "random-copy"}),
            ("random-zero", "SPARKLING with random-zero", {"init": "random-zero"}),
        )
    },
    **{
        f"noise-{sigma}": Treatment(f"SPARKLING with noise of {sigma} on copies", between={"noise": sigma})
        for sigma in (0.1, 0.3, 1.0)
    },
    **{
        f"mix-{share}": Treatment(f"SPARKLING with {share:.0%} of new channels drawn", between={"mix": share})
        for share in (0.25, 0.5, 0.75)
    },
}
TREATMENTS: Mapping[str, Treatment] = {**EVERYWHERE, **NAMED}
#: a first stage, and the share of the run at which it leaves a checkpoint for a second one
FIRST, SECOND = Widening(("ffn",)), 0.75


def go_on(base: Path, folder: Path, run: Run, text: Text, job: Job, note: Note | None) -> dict[str, Any]:
    """Expand the checkpoint of ``job.base`` below ``base`` and train the result to the end of the schedule.

    Returns the record of what was measured, which ``note`` gets as it grows; the work is done in ``folder``
    and cleared away, but for the checkpoint that a later stage starts from.
    """
    logging.set_verbosity_error()
    treatment, widening = TREATMENTS[job.name], Widening.parse(job.axes)
    if treatment.between and widening.axes != ("ffn",):
        raise ValueError(f"{job.name} is for ffn alone, not for {job.axes}")
    work = folder / job.name
    wide, now, kept = work / "expanded", work / "now", work / "kept.pt"
    if not kept.exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        source = checkpoint(base, job.base, run.at(widening.share))
        spec = _spec(treatment, widening, run, job.seed)
        data = _tokens(text, run, work / "tokens.npy") if spec.scaling == "calibrated" else None
        expand(source, wide, spec, report="none", threads=1, data=data)
        if treatment.between:
            change(wide, models.SIZES[job.kind, run.size].ffn, job.seed, **treatment.between)

    model = AutoModelForCausalLM.from_pretrained(wide).to(run.device)
    model, forward = models.reusable(model, run.compile)
    opt = optim.make(job.optimizer, model, run.lr, run.beta2, run.decay)
    scheduler = make_scheduler(run, opt)
    start = load_checkpoint(wide, opt, scheduler)
    assert start == run.at(widening.share)

    def cosine() -> float:
        model.save_pretrained(now)
        return measure_symmetry(now, wide).cosine

    def leave(step: int) -> None:
        if widening == FIRST and step == run.at(SECOND) and not ready(folder, job, step):
            later = checkpoint(folder, job, step)
            save_checkpoint(later, run, step, model, opt, scheduler)
            carry_history(wide, later)

    copies = None if widening.axes == ("layers",) else cosine
    training = Training(run, text, job.seed, model, forward, opt, scheduler, start, kept, copies, note, leave)
    step = training.resume()
    if treatment.warm == "new":
        rewarm(opt, model, wide, step=step)
    elif treatment.warm == "all":
        _rewarm_everything(wide, run, scheduler)
    record = training.finish(step)
    if "final" not in record:
        return record
    if copies is not None:  # of the model as it was saved at the last step's measurement
        record["locked"] = round(measure_symmetry(now, wide).locked, 4)
    shutil.rmtree(work)
    return record


def _spec(treatment: Treatment, widening: Widening, run: Run, seed: int) -> ExpansionSpec:
    rewarmup = {"steps": run.tau_w, **treatment.options.get("rewarmup", {})}
    options = {k: v for k, v in treatment.options.items() if k != "rewarmup"}
    axes = [{"axis": axis, "factor": widening.factor} for axis in widening.axes]
    return ExpansionSpec(axes=axes, rewarmup=rewarmup, seed=seed, **options)


def _tokens(text: Text, run: Run, path: Path) -> Path:
    """A file of tokens to calibrate on: the end of the training text, which no run comes to."""
    blocks = len(text.train) // run.length
    ids = text.train[-min(blocks, 512) * run.length :].view(-1, run.length)
    np.save(path, ids.numpy().astype(np.uint16))
    return path


def _rewarm_everything(wide: Path, run: Run, scheduler: Any) -> None:
    """Put the whole model on the new entries' curve (the paper's Table 7)."""
    curve = read_history(wide).rewarmup.curves[-1]
    scheduler.lr_lambdas = [lambda t: curve.eta_new(t) / run.lr for _ in scheduler.lr_lambdas]
