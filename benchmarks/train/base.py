"""The runs that need no expansion: the small model, with checkpoints on its course, and the wide one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from benchmarks.train import models, optim
from benchmarks.train.data import Text
from benchmarks.train.jobs import Job, Widening
from benchmarks.train.loop import SHARES, Note, Run, Training, make_scheduler, save_checkpoint


def checkpoint(folder: Path, step: int) -> Path:
    """The small model's checkpoint of a step, in the folder of its job."""
    return folder / f"checkpoint-{step}"


def ready(folder: Path, step: int) -> bool:
    """Whether that checkpoint is there and whole."""
    return (checkpoint(folder, step) / "trainer_state.json").exists()


def equal_compute(run: Run, small: int, wide: int, share: float) -> int:
    """Steps of the wide model from scratch for the compute of an expanded run (C = 6 N D, Eq. 29).

    Args:
        run: the expanded run.
        small: parameters before the expansion.
        wide: parameters after it.
        share: of the steps that are done before it.
    """
    return round(run.steps * (share * small + (1 - share) * wide) / wide)


def scratch(folder: Path, run: Run, text: Text, job: Job, note: Note | None) -> dict[str, Any]:
    """Train one model from its beginning; the record of what it measured, which ``note`` gets as it grows.

    The small one leaves its checkpoints in ``folder``. ``wide-compute`` has its own, shorter schedule.
    """
    logging.set_verbosity_error()
    widening = Widening.parse(job.axes) if job.axes else Widening(())
    model = models.fresh(job.kind, run.size, widening.axes, widening.factor, job.seed)
    parameters = sum(p.numel() for p in model.parameters())
    if job.name == "wide-compute":
        small = sum(p.numel() for p in models.fresh(job.kind, run.size, (), 1, job.seed).parameters())
        steps = equal_compute(run, small, parameters, widening.share)
        run = replace(run, steps=steps, warmup=run.warmup * steps // run.steps)
    model, forward = models.reusable(model.to(run.device), run.compile)
    opt = optim.make(job.optimizer, model, run.lr, run.beta2)
    scheduler = make_scheduler(run, opt)

    def keep(step: int) -> None:
        if job.name == "small" and step in {run.at(share) for share in SHARES} and not ready(folder, step):
            save_checkpoint(checkpoint(folder, step), run, step, model, opt, scheduler)

    kept = folder / f"{job.name}.pt"
    training = Training(
        run, text, job.seed, model, forward, opt, scheduler, kept=kept, note=note, at_step=keep
    )
    record = training.finish(training.resume())
    if "final" in record:
        kept.unlink()
    return record
