"""``python -m benchmarks.train``: all runs, then the tables and plots.

What a run measures is kept under ``--results``, and a finished run is not made again; one that was stopped
goes on from its last measurement, which is kept under ``--out``. So the command can be stopped and started
at any time, and run with other options to add to what is there. Results made on another machine stay; the
checkpoints that they came from are trained anew if a new treatment needs them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.train.jobs import SCRATCH, Job, Store, Widening, locked, sources_digest

if TYPE_CHECKING:
    from benchmarks.train.data import Text
    from benchmarks.train.loop import Note, Run

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/train"), help="where runs work")
    parser.add_argument("--results", type=Path, help="where results are kept; default: --out")
    parser.add_argument(
        "--size",
        default="quick",
        choices=["micro", "quick", "pilot", "horizon", "large", "gpu"],
        help="widths, lengths",
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="a text file, the npm package's .tgz, or a folder made by benchmarks.train.corpus;\n"
        "default: bundled",
    )
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
        help="kind/optimizer/axes, e.g. moe/adamw/ffn+hidden; with a factor: ffn*1.5; with the share of the\n"
        "run before the expansion (0.25, 0.5, 0.75): ffn@0.25; in two stages: ffn,ffn@0.75",
    )
    parser.add_argument(
        "--treatments",
        nargs="+",
        help="default: all that every axis can have; the small model and the wide one come\n"
        "with them unless --only is given",
    )
    parser.add_argument("--only", action="store_true", help="the named --treatments and nothing besides")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--steps", type=int, help="length of a run")
    parser.add_argument("--until", type=int, help="a measured step at which runs stop for now")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--schedule", choices=["cosine", "wsd"], default="cosine")
    parser.add_argument("--weight-decay", type=float, dest="decay", help="of matrices; default: 0.1")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile (worth it for long runs)")
    parser.add_argument("--report", type=Path, help="write the tables into this Markdown file")
    parser.add_argument("--tables-only", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def jobs(options: argparse.Namespace) -> list[Job]:
    """All runs in the order in which they are wanted: seed by seed, bases first."""
    from benchmarks.train.treatments import EVERYWHERE

    names = options.treatments or [t for t in EVERYWHERE if t != "fresh" or options.beta2 > 0.99]
    if not options.only:
        names = ["small", *names[:2], "wide", *names[2:]]
    plans = [plan.split("/") for plan in options.plan]
    wanted = [
        Job.of(kind, optimizer, Widening.parse(axes), seed, name)
        for kind, optimizer, axes in plans
        for seed in options.seeds
        for name in names
    ]
    return list(dict.fromkeys(wanted))


def settings(options: argparse.Namespace) -> Run:
    """The constants of all runs."""
    from benchmarks.train.loop import preset

    given = ("steps", "lr", "beta2", "compile", "schedule", "decay", "device", "until")
    return preset(options.size, **{name: getattr(options, name) for name in given})


def work(options: argparse.Namespace) -> None:
    """Do what is not done yet; a lock file keeps two processes off one run."""
    import torch
    from transformers.utils import logging

    from benchmarks.train.data import load_text

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    run = settings(options)
    text = load_text(options.text)
    left = jobs(options)
    while left:
        later = [job for job in left if not attempt(job, options, run, text)]
        if len(later) == len(left):
            time.sleep(5)
        left = later


def store(options: argparse.Namespace, run: Run) -> Store:
    """Where these runs' results are."""
    return Store((options.results or options.out) / f"{run.label}.jsonl")


def done(job: Job, results: Store) -> bool:
    """Whether this run has come to its end; until then its record is what was measured so far."""
    return "final" in results.read().get(job, {})


def attempt(job: Job, options: argparse.Namespace, run: Run, text: Text) -> bool:
    """Run one job; False where it has to wait for the checkpoint that it starts from."""
    from benchmarks.train.base import ready

    results, place = store(options, run), options.out / run.label
    folder = job.folder(place)
    if done(job, results):
        return True
    if job.name not in SCRATCH and not ready(
        job.base.folder(place), job.base, run.at(Widening.parse(job.axes).share)
    ):
        if done(job.base, results):  # its result is there, its checkpoints are not
            with locked(job.base.folder(place) / f"{job.base.name}.lock") as free:
                if free:
                    train(job.base, place, run, text, None)
        return False
    facts = {"text": text.facts(), "code": sources_digest((ROOT / "sparkling_cli").rglob("*.py"))}

    def note(record: dict[str, Any]) -> None:
        results.add(job, {**facts, **record})

    with locked(folder / f"{job.name}.lock") as free:
        if not free or done(job, results):
            return True
        record = train(job, place, run, text, note)
        note(record)
    print(f"{time.strftime('%H:%M:%S')} {job}: {record['seconds']} s", flush=True)
    return True


def train(job: Job, place: Path, run: Run, text: Text, note: Note | None) -> dict[str, Any]:
    """Do one run below ``place``; the record of what it measured."""
    from benchmarks.train.base import scratch
    from benchmarks.train.treatments import go_on

    if job.name in SCRATCH:
        return scratch(job.folder(place), run, text, job, note)
    return go_on(job.base.folder(place), job.folder(place), run, text, job, note)


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

    report(store(options, settings(options)).path, options.report)


if __name__ == "__main__":
    main()
