"""A plain training loop that stops and starts at any step, with checkpoints in the Trainer's own form."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerState, TrainingArguments, get_scheduler

from benchmarks.train.data import Text, batch, heldout_blocks
from benchmarks.train.optim import DECAY

#: what is called with a record
Note = Callable[[dict[str, Any]], None]

FLOOR = 0.01
#: steps after the expansion at which a run is measured besides (the small and the wide one: after the half)
EARLY = (0, 50, 100, 250, 500)
#: bytes of the held-out text that are measured along a run; the end of the run is measured on all of it
CURVE = 98_304
#: shares of the small model's run at which it leaves a checkpoint to expand
SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Run:
    """The constants of all runs of one proof.

    ``size`` names the models' widths (``models.SIZES``); lengths are in optimizer steps, a step takes
    rows x length tokens. ``schedule`` is ``cosine``, or ``wsd``: constant, and a cosine over the last fifth.
    Past ``until`` no run goes; it is no constant of what was measured before it, and another time it may.
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
    schedule: str = "cosine"
    tau_w: int = 25
    decay: float = DECAY
    device: str = "cpu"
    until: int | None = None

    @property
    def label(self) -> str:
        """What sets these runs apart from others of the same model; names the file of their results."""
        schedule = "" if self.schedule == "cosine" else f"-{self.schedule}"
        decay = "" if self.decay == DECAY else f"-wd{self.decay:g}"
        rates = f"lr{self.lr:g}-b{self.beta2:g}-tau{self.tau_w}"
        return f"{self.size}-{self.steps}steps-{rates}{decay}{schedule}"

    @classmethod
    def of_label(cls, label: str) -> Run:
        """The constants that a label names; the others are those of the size.

        Raises:
            ValueError: it is no label.
        """
        form = r"(\w+)-(\d+)steps-lr(.+)-b([\d.]+)-tau(\d+)(?:-wd([\d.]+))?(?:-(\w+))?"
        found = re.fullmatch(form, label)
        if found is None:
            raise ValueError(f"{label!r} is no label of runs, e.g. {cls().label!r}")
        size, steps, lr, beta2, tau_w, decay, schedule = found.groups()
        given = {"steps": int(steps), "lr": float(lr), "beta2": float(beta2), "tau_w": int(tau_w)}
        return preset(size, schedule=schedule, decay=None if decay is None else float(decay), **given)

    def at(self, share: float) -> int:
        """The step at which this share of the run is done."""
        return int(self.steps * share)

    def measured(self, start: int) -> frozenset[int]:
        """The steps at which a run from ``start`` on is measured."""
        regular = range(start, self.steps, self.eval_every)
        early = ((start or self.at(0.5)) + more for more in EARLY)
        return frozenset(s for s in (*regular, *early, self.steps) if s <= self.steps)

    def autocast(self) -> AbstractContextManager[Any]:
        """Arithmetic of the forward pass: bf16 on an accelerator, as it comes on a CPU."""
        return nullcontext() if self.device == "cpu" else torch.autocast(self.device, torch.bfloat16)


#: what differs from ``Run``'s own values, by size
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "pilot": {},
    "quick": {"steps": 1200, "rows": 16, "length": 64, "eval_every": 300},
    "micro": {"steps": 1200, "rows": 8, "length": 64, "eval_every": 300},
    "horizon": {"steps": 24_000, "rows": 4, "length": 64, "eval_every": 1000, "tau_w": 250},
    "large": {"steps": 1200, "lr": 1e-3, "eval_every": 100, "tau_w": 50},
    "gpu": {"steps": 4000, "rows": 64, "length": 256, "lr": 1e-3, "eval_every": 250, "tau_w": 100},
}


def preset(size: str, **given: Any) -> Run:
    """The constants of a size, with those that are given (None: not given) in their place.

    ``pilot`` and ``horizon`` are for results, ``gpu`` for a machine with one, the others for a look within
    minutes. The peak rate, 2e-3, is the best of 1e-3, 2e-3, 4e-3 and 8e-3 for the small model at pilot size
    and of the last three at quick size: the small model's rate is kept (App. D.2).
    """
    run = replace(Run(size=size), **PRESETS[size])
    run = replace(run, **{name: value for name, value in given.items() if value is not None})
    share = 0.05 if size in ("quick", "micro") else 0.03
    return replace(run, warmup=int(run.steps * share), eval_every=max(1, min(run.eval_every, run.steps // 4)))


@dataclass
class Log:
    """What a run measured, by optimizer step.

    Attributes:
        train: mean training loss since the measurement before, nats per byte.
        heldout: loss on the first part of the held-out text, nats per byte.
        cosine: mean cosine between new channels and their sources.
        final: loss at the end on all of the held-out text; None: not there yet.
    """

    train: dict[int, float] = field(default_factory=dict)
    heldout: dict[int, float] = field(default_factory=dict)
    cosine: dict[int, float] = field(default_factory=dict)
    final: float | None = None

    def rounded(self) -> dict[str, Any]:
        """As plain data with six digits after the point; ``final`` only where it is known."""
        curves = {"train": self.train, "heldout": self.heldout, "cosine": self.cosine}
        rounded = {name: {s: round(v, 6) for s, v in curve.items()} for name, curve in curves.items()}
        return rounded if self.final is None else {"final": round(self.final, 6), **rounded}


def arguments(run: Run, folder: str = "run") -> TrainingArguments:
    """The arguments with which the Trainer itself would do this run."""
    kind, options = _schedule(run)
    return TrainingArguments(
        output_dir=folder,
        max_steps=run.steps,
        learning_rate=run.lr,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options,
        warmup_steps=run.warmup,
        per_device_train_batch_size=run.rows,
        adam_beta2=run.beta2,
        weight_decay=run.decay,
        max_grad_norm=run.clip,
        use_cpu=True,
        report_to="none",
    )


def _schedule(run: Run) -> tuple[str, dict[str, Any]]:
    if run.schedule == "cosine":
        return "cosine_with_min_lr", {"min_lr_rate": FLOOR}
    if run.schedule == "wsd":
        return "warmup_stable_decay", {"num_decay_steps": run.steps // 5, "min_lr_ratio": FLOOR}
    raise ValueError(f"schedule {run.schedule!r}: cosine or wsd")


def make_scheduler(run: Run, optimizer: Optimizer) -> LambdaLR:
    """The baseline: warmup, then down to a hundredth of the peak."""
    kind, options = _schedule(run)
    return get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=run.warmup,
        num_training_steps=run.steps,
        scheduler_specific_kwargs=options,
    )


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, text: Text, run: Run, *, whole: bool) -> float:
    """Mean cross-entropy over the held-out text, or its first part, nats per byte."""
    blocks = heldout_blocks(text, run.length)[: (None if whole else CURVE // run.length)]
    model.eval()
    total = 0.0
    for part in blocks.split(64):
        ids = part.to(run.device)
        with run.autocast():
            logits = model(input_ids=ids, use_cache=False).logits
        total += nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    return total / (blocks.shape[0] * (run.length - 1))


@dataclass
class Training:
    """One run from step ``start`` to the end of its schedule; stopped anywhere, it goes on where it was.

    Attributes:
        run: lengths and rates.
        text: what to train and measure on.
        seed: of the order of the data.
        model: trained in place.
        forward: the model, or the same compiled.
        optimizer: over its parameters.
        scheduler: at step ``start``.
        start: optimizer steps done before.
        kept: a file that holds the state since the last measurement; None: nothing is kept.
        cosine: measures the copies of the model as it is; None: there are none.
        note: is given the record of what was measured so far, at every measurement.
        at_step: called with the number of steps done, before the next one (for checkpoints).
    """

    run: Run
    text: Text
    seed: int
    model: PreTrainedModel
    forward: Callable[..., Any]
    optimizer: Optimizer
    scheduler: LambdaLR
    start: int = 0
    kept: Path | None = None
    cosine: Callable[[], float] | None = None
    note: Note | None = None
    at_step: Callable[[int], None] | None = None
    log: Log = field(default_factory=Log)
    seconds: float = 0.0

    def resume(self) -> int:
        """Take up the state in ``kept``, if there is one; the number of steps done."""
        if self.kept is None or not self.kept.exists():
            return self.start
        state = torch.load(self.kept, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.log, self.seconds = state["log"], state["seconds"]
        return int(state["step"])

    def record(self) -> dict[str, Any]:
        """What was measured so far, as plain data."""
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"parameters": parameters, "seconds": round(self.seconds), **self.log.rounded()}

    def finish(self, step: int) -> dict[str, Any]:
        """Train from ``step`` (what ``resume`` returned) to the end, or to ``until``; the record of it."""
        run, measured = self.run, self.run.measured(self.start)
        began = time.perf_counter() - self.seconds
        self.model.train()
        recent: list[float] = []
        while True:
            if step in measured and step not in self.log.heldout:
                self._measure(step, recent)
                self.seconds = time.perf_counter() - began
                self._keep(step)
                if self.note is not None:
                    self.note(self.record())
            if self.at_step is not None:
                self.at_step(step)
            if step == run.until:
                return self.record()
            if step == run.steps:
                self.log.final = heldout_loss(self.model, self.text, run, whole=True)
                return self.record()
            recent.append(self.advance(step))
            step += 1

    def advance(self, step: int) -> float:
        """One optimizer step; the training loss before it."""
        ids = batch(self.text, self.seed, step, self.run.rows, self.run.length).to(self.run.device)
        with self.run.autocast():
            loss = self.forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.run.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return float(loss.item())

    def _measure(self, step: int, recent: list[float]) -> None:
        self.log.heldout[step] = heldout_loss(self.model, self.text, self.run, whole=False)
        if recent:
            self.log.train[step] = sum(recent) / len(recent)
            recent.clear()
        if self.cosine is not None:
            self.log.cosine[step] = self.cosine()

    def _keep(self, step: int) -> None:
        if self.kept is None:
            return
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "log": self.log,
            "seconds": self.seconds,
        }
        part = self.kept.with_suffix(".part")
        torch.save(state, part)
        part.rename(self.kept)


def save_checkpoint(
    directory: Path, run: Run, step: int, model: PreTrainedModel, optimizer: Optimizer, scheduler: LambdaLR
) -> None:
    """Write what the Trainer writes: weights, config, optimizer, scheduler, its state and arguments."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    torch.save(scheduler.state_dict(), directory / "scheduler.pt")
    torch.save(arguments(run), directory / "training_args.bin")
    state = TrainerState(global_step=step, max_steps=run.steps, save_steps=step)
    state.save_to_json(str(directory / "trainer_state.json"))


def load_checkpoint(directory: Path, optimizer: Optimizer, scheduler: LambdaLR) -> int:
    """Restore optimizer and scheduler; the number of steps done. The model comes by ``from_pretrained``."""
    optimizer.load_state_dict(torch.load(directory / "optimizer.pt"))
    scheduler.load_state_dict(torch.load(directory / "scheduler.pt"))
    return int(TrainerState.load_from_json(str(directory / "trainer_state.json")).global_step)
