"""The same comparison on a larger model: ``python -m benchmarks.train.gpu`` needs ten minutes of one GPU.

Collects its text, measures how long a step takes, chooses the length of the runs so that all of them (the
small model, the wide one, and every treatment) are done in ``--minutes``, trains, and prints the table.
Stopped, it goes on with the same length. ``--device cpu --size micro --minutes 1`` tries it anywhere.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.train import __main__ as train
from benchmarks.train import corpus, models, optim
from benchmarks.train.data import Text, load_text
from benchmarks.train.loop import Run, Training, make_scheduler, preset
from benchmarks.train.table import report

TREATMENTS = ("sparkling", "random-copy", "random-zero", "naive")
PLAN = "dense/adamw/ffn"
#: share of the time that is for steps; the rest is for measuring, compiling and expanding
STEPPING = 0.75
TRIED = 20


def seconds_per_step(run: Run, text: Text, axes: tuple[str, ...]) -> float:
    """How long a step takes once everything is compiled."""
    model = models.fresh("dense", run.size, dict.fromkeys(axes, 2), 0)
    model, forward = models.reusable(model.to(run.device), run.compile)
    opt = optim.make("adamw", model, run.lr, run.beta2)
    training = Training(run, text, 0, model, forward, opt, make_scheduler(run, opt))
    training.advance(0)
    began = time.perf_counter()
    for step in range(1, TRIED + 1):
        training.advance(step)
    return (time.perf_counter() - began) / TRIED


def affordable(small: float, wide: float, seconds: float) -> int:
    """Steps of a whole run, in hundreds, so that all runs take so many seconds.

    Args:
        small: seconds per step of the small model.
        wide: of the wide one.
        seconds: for all steps of the small and the wide model and of the treatments, half a run each.
    """
    return max(100, int(seconds / (small + wide + wide * len(TREATMENTS) / 2)) // 100 * 100)


def choose(run: Run, text: Text, seconds: float, chosen: Path) -> int:
    """The length of a run; the one that was chosen before, if there is one."""
    if chosen.exists():
        return int(json.loads(chosen.read_text())["steps"])
    small, wide = (seconds_per_step(run, text, axes) for axes in ((), ("ffn",)))
    steps = min(affordable(small, wide, seconds), len(text.train) // run.length // run.rows)
    chosen.write_text(json.dumps({"steps": steps, "small": small, "wide": wide}))
    print(f"{small:.4f} s and {wide:.4f} s per step of the small and the wide model: {steps} steps")
    return steps


def main() -> None:
    """Collect, choose, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("build/train-gpu"), help="where it works")
    parser.add_argument("--results", type=Path, help="where results are kept; default: --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="gpu")
    options = parser.parse_args()

    folder = options.out / "text"
    if not (folder / "heldout.bin").exists():
        corpus.write(folder, corpus.default_roots(), 256 << 20)
    compiled = options.device != "cpu"
    run = replace(preset(options.size, device=options.device), compile=compiled)
    steps = choose(run, load_text(folder), options.minutes * 60 * STEPPING, options.out / "steps.json")

    arguments = ["--size", options.size, "--steps", str(steps), "--device", options.device, "--seeds", "0"]
    arguments += ["--text", str(folder), "--out", str(options.out), "--plan", PLAN]
    arguments += ["--results", str(options.results or options.out), "--treatments", *TREATMENTS]
    runs = train.parse(arguments + ["--compile"] * compiled)
    train.work(runs)
    report(train.store(runs, train.settings(runs)).path, None)


if __name__ == "__main__":
    main()
