"""A plain training loop that stops and starts at any step, with checkpoints in the Trainer's own form."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerState, TrainingArguments, get_scheduler

from benchmarks.train.data import Text, batch, heldout_blocks

FLOOR = 0.01


@dataclass(frozen=True)
class Run:
    """The constants of all runs of one proof.

    ``size`` names the models' widths (``models.SIZES``); lengths are in optimizer steps, a step takes
    rows x length tokens.
    """

    size: str = "pilot"
    steps: int = 3000
    warmup: int = 90
    lr: float = 2e-3
    rows: int = 8
    length: int = 128
    clip: float = 1.0
    eval_every: int = 500
    compile: bool = True
    beta2: float = 0.95

    @property
    def middle(self) -> int:
        """The step of the expansion."""
        return self.steps // 2

    @property
    def label(self) -> str:
        """What sets these runs apart from others of the same model; names the folder of their results."""
        return f"{self.size}-{self.steps}steps-lr{self.lr:g}-b{self.beta2:g}"


def preset(size: str, steps: int | None, lr: float | None, beta2: float, compile_: bool) -> Run:
    """The constants of a size: ``pilot`` for results, the others for a look within minutes.

    The peak rate, 2e-3, is the best of 1e-3, 2e-3, 4e-3 and 8e-3 for the small model at pilot size and of
    the last three at quick size: the small model's rate is kept (App. D.2).
    """
    rate = 2e-3 if lr is None else lr
    if size == "pilot":
        steps = 3000 if steps is None else steps
        every = max(1, steps // 6)
        return Run(
            steps=steps, warmup=steps * 3 // 100, lr=rate, eval_every=every, beta2=beta2, compile=compile_
        )
    steps = 1200 if steps is None else steps
    rows = 16 if size == "quick" else 8
    return Run(
        size, steps, steps // 20, rate, rows=rows, length=64, eval_every=300, beta2=beta2, compile=compile_
    )


@dataclass
class Log:
    """What a run measured: losses in nats per byte, by optimizer step."""

    train: dict[int, float] = field(default_factory=dict)
    heldout: dict[int, float] = field(default_factory=dict)

    def save(self, path: Path, **extra: object) -> None:
        """Write as JSON; appears whole or not at all."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps({**asdict(self), **extra}, indent=1))
        part.rename(path)


def arguments(run: Run, folder: str = "run") -> TrainingArguments:
    """The arguments with which the Trainer itself would do this run."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=run.steps,
        learning_rate=run.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": FLOOR},
        warmup_steps=run.warmup,
        per_device_train_batch_size=run.rows,
        adam_beta2=run.beta2,
        weight_decay=0.1,
        max_grad_norm=run.clip,
        use_cpu=True,
        report_to="none",
    )


def make_scheduler(run: Run, optimizer: Optimizer) -> LambdaLR:
    """The baseline: warmup, then a cosine to a hundredth of the peak."""
    return get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=run.warmup,
        num_training_steps=run.steps,
        scheduler_specific_kwargs={"min_lr_rate": FLOOR},
    )


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, text: Text, length: int) -> float:
    """Mean cross-entropy over the held-out blocks, nats per byte."""
    blocks = heldout_blocks(text, length)
    model.eval()
    total = 0.0
    for part in blocks.split(64):
        logits = model(input_ids=part, use_cache=False).logits
        total += nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    return total / (blocks.shape[0] * (length - 1))


def train(
    run: Run,
    text: Text,
    seed: int,
    model: PreTrainedModel,
    forward: Callable[..., Any],
    optimizer: Optimizer,
    scheduler: LambdaLR,
    start: int,
    *,
    at_step: Callable[[int], None] | None = None,
) -> Log:
    """Train from optimizer step ``start`` to the end of the schedule.

    Args:
        run: lengths and rates.
        text: what to train and measure on.
        seed: of the order of the data.
        model: trained in place.
        forward: the model, or the same compiled.
        optimizer: over its parameters.
        scheduler: at step ``start``.
        start: optimizer steps done before.
        at_step: called with the number of steps done, before the next one (for checkpoints).
    """
    log = Log()
    model.train()
    recent: list[float] = []
    for step in range(start, run.steps):
        if at_step is not None:
            at_step(step)
        if (step - start) % run.eval_every == 0:
            log.heldout[step] = heldout_loss(model, text, run.length)
            print(f"{time.strftime('%H:%M:%S')} step {step}: held-out {log.heldout[step]:.4f}", flush=True)
        ids = batch(text, seed, step, run.rows, run.length)
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if len(recent) == 10:
            log.train[step + 1] = sum(recent) / len(recent)
            recent.clear()
    log.heldout[run.steps] = heldout_loss(model, text, run.length)
    return log


def save_checkpoint(
    directory: Path, run: Run, step: int, model: PreTrainedModel, optimizer: Optimizer, scheduler: LambdaLR
) -> None:
    """Write what the Trainer writes: weights, config, optimizer, scheduler, its state and arguments."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    torch.save(scheduler.state_dict(), directory / "scheduler.pt")
    torch.save(arguments(run), directory / "training_args.bin")
    state = TrainerState(global_step=step, max_steps=run.steps, save_steps=run.middle)
    state.save_to_json(str(directory / "trainer_state.json"))


def load_checkpoint(directory: Path, optimizer: Optimizer, scheduler: LambdaLR) -> int:
    """Restore optimizer and scheduler; the number of steps done. The model comes by ``from_pretrained``."""
    optimizer.load_state_dict(torch.load(directory / "optimizer.pt"))
    scheduler.load_state_dict(torch.load(directory / "scheduler.pt"))
    return int(TrainerState.load_from_json(str(directory / "trainer_state.json")).global_step)
