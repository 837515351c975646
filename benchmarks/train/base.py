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


def checkpoint(folder: Path, job: Job, step: int) -> Path:
    """A run's checkpoint of a step that another one starts from, in the folder of its job."""
    return folder / ("" if job.name == "small" else f"{job.name}-kept") / f"checkpoint-{step}"


def ready(folder: Path, job: Job, step: int) -> bool:
    """Whether that checkpoint is there and whole."""
    return (checkpoint(folder, job, step) / "trainer_state.json").exists()


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
    widening = Widening.parse(job.axes) if job.axes else Widening((), 1)
    model = models.fresh(job.kind, run.size, widening.factors(), job.seed)
    parameters = sum(p.numel() for p in model.parameters())
    if job.name == "wide-compute":
        small = sum(p.numel() for p in models.fresh(job.kind, run.size, {}, job.seed).parameters())
        steps = equal_compute(run, small, parameters, widening.share)
        run = replace(run, steps=steps, warmup=run.warmup * steps // run.steps)
    model, forward = models.reusable(model.to(run.device), run.compile)
    opt = optim.make(job.optimizer, model, run.lr, run.beta2, run.decay)
    scheduler = make_scheduler(run, opt)

    def keep(step: int) -> None:
        if (
            job.name == "small"
            and step in {run.at(share) for share in SHARES}
            and not ready(folder, job, step)
        ):
            save_checkpoint(checkpoint(folder, job, step), run, step, model, opt, scheduler)

    kept = folder / f"{job.name}.pt"
    training = Training(
        run, text, job.seed, model, forward, opt, scheduler, kept=kept, note=note, at_step=keep
    )
    record = training.finish(training.resume())
    if "final" in record:
        kept.unlink()
    return record
