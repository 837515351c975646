"""``python -m benchmarks.train``: all runs, then the tables and plots.

Every finished run is kept under ``--out`` and not made again, so the command can be stopped and started
at any time, and run with other options to add to what is there.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.train.data import Text
    from benchmarks.train.loop import Run


@dataclass(frozen=True, order=True)
class Job:
    """One training run: a base (``small``, ``wide``) or a treatment."""

    kind: str
    optimizer: str
    axes: str
    seed: int
    name: str

    def folder(self, results: Path) -> Path:
        """Where its results go; the small model serves all axes."""
        seed = results / f"{self.kind}-{self.optimizer}" / f"seed{self.seed}"
        return seed if self.name == "small" else seed / self.axes

    def done(self, results: Path) -> bool:
        """Whether its results are there."""
        return (self.folder(results) / f"{self.name}.json").exists()


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/train"), help="where results are kept")
    parser.add_argument(
        "--size", default="quick", choices=["micro", "quick", "pilot"], help="widths, lengths"
    )
    parser.add_argument("--text", type=Path, help="a text file, or the npm package's .tgz; default: bundled")
    parser.add_argument(
        "--plan",
        nargs="+",
        default=[
            "dense/adamw/ffn",
            "moe/adamw/ffn",
            "dense/adamw/hidden",
            "dense/adamw/ffn+hidden",
            "dense/muon/ffn",
        ],
        help="kind/optimizer/axes, e.g. moe/adamw/ffn+hidden",
    )
    parser.add_argument("--treatments", nargs="+", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--steps", type=int, help="length of a run; the expansion is at its half")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--compile", action="store_true", help="torch.compile (worth it for long runs)")
    parser.add_argument("--report", type=Path, help="write the tables into this Markdown file")
    parser.add_argument("--tables-only", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def jobs(options: argparse.Namespace) -> list[Job]:
    """All runs in the order in which they are wanted: seed by seed, bases first."""
    from benchmarks.train.treatments import TREATMENTS

    wanted = []
    for plan in options.plan:
        kind, optimizer, axes = plan.split("/")
        for seed in options.seeds:
            names = options.treatments or [t for t in TREATMENTS if t != "fresh" or options.beta2 > 0.99]
            for name in ["small", *names[:2], "wide", *names[2:]]:
                wanted.append(Job(kind, optimizer, axes, seed, name))
    return wanted


def settings(options: argparse.Namespace) -> Run:
    """The constants of all runs."""
    from benchmarks.train.loop import preset

    return preset(options.size, options.steps, options.lr, options.beta2, options.compile)


def work(options: argparse.Namespace) -> None:
    """Do what is not done yet; a lock file keeps two processes off one run."""
    import torch

    from benchmarks.train.data import load_text

    torch.set_num_threads(1)
    run = settings(options)
    text = load_text(options.text)
    left = jobs(options)
    while left:
        later = []
        for job in left:
            state = attempt(job, options, run, text)
            if state == "wait":
                later.append(job)
        if len(later) == len(left):
            time.sleep(5)
        left = later


def attempt(job: Job, options: argparse.Namespace, run: Run, text: Text) -> str:
    """Run one job: ``done`` (here or elsewhere, now or before), or ``wait`` for its base to be trained."""
    from benchmarks.train.base import middle, scratch
    from benchmarks.train.treatments import go_on

    results = options.out / run.label
    folder = job.folder(results)
    base = Job(job.kind, job.optimizer, job.axes, job.seed, "small").folder(results)
    if job.done(results):
        return "done"
    if job.name not in ("small", "wide") and not (middle(base) / "trainer_state.json").exists():
        return "wait"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{job.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except BlockingIOError:
            return "done"
        if job.done(results):
            return "done"
        began = time.perf_counter()
        axes = () if job.name == "small" else tuple(job.axes.split("+"))
        if job.name in ("small", "wide"):
            scratch(folder, run, text, job.kind, job.optimizer, axes, job.seed)
        else:
            go_on(base, folder, run, text, job.optimizer, axes, job.name, job.seed)
    print(f"{time.strftime('%H:%M:%S')} {job}: {time.perf_counter() - began:.0f} s", flush=True)
    return "done"


def main() -> None:
    """Run workers, wait, and make the tables."""
    options = parse()
    if options.worker:
        work(options)
        return
    if not options.tables_only:
        command = [sys.executable, "-m", "benchmarks.train", "--worker", *sys.argv[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        workers = [subprocess.Popen(command, env=environment) for _ in range(options.processes)]
        codes = [worker.wait() for worker in workers]
        if any(codes):
            sys.exit(f"a worker failed: {codes}")
    from benchmarks.train.table import report

    report(options.out / settings(options).label, options.report)


if __name__ == "__main__":
    main()
