"""The runs that need no expansion: the small model, with its middle checkpoint, and the wide one."""

from __future__ import annotations

import time
from pathlib import Path

from transformers.utils import logging

from benchmarks.train import models, optim
from benchmarks.train.data import Text
from benchmarks.train.loop import Run, make_scheduler, save_checkpoint, train


def middle(folder: Path) -> Path:
    """The small model's checkpoint at the middle of its run."""
    return folder / "small" / "checkpoint"


def scratch(
    folder: Path, run: Run, text: Text, kind: str, optimizer: str, axes: tuple[str, ...], seed: int
) -> None:
    """Train one model from its beginning: the wide one, or for no ``axes`` the small one.

    The small one leaves its checkpoint of the middle.
    """
    logging.set_verbosity_error()
    name = "wide" if axes else "small"
    model = models.fresh(kind, run.size, axes, seed)
    model, forward = models.reusable(model, run.compile)
    opt = optim.make(optimizer, model, run.lr, run.beta2)
    scheduler = make_scheduler(run, opt)

    def keep(step: int) -> None:
        if step == run.middle and not axes:
            save_checkpoint(middle(folder), run, step, model, opt, scheduler)

    began = time.perf_counter()
    log = train(run, text, seed, model, forward, opt, scheduler, 0, at_step=keep)
    parameters = sum(p.numel() for p in model.parameters())
    log.save(folder / f"{name}.json", seconds=time.perf_counter() - began, parameters=parameters)
