"""What a second process brings: ``torchrun`` with one and with two processes, in one run.

``python -m benchmarks.torchrun --folder EMPTY [--gigabytes 12] [--rounds 2] [--cases NAME ...]``

Every process works with one thread, so that two processes have twice the processors of one, as two hosts
have. ``random`` (weights alone, all new entries drawn) is bound by arithmetic; ``copy`` (weights and AdamW
state, new entries copied) by the disk: the source is taken out of the page cache before every run. ``cached``
is the same with the source in the page cache, as far as it fits: bound by neither, the time is the kernel's,
for moving pages. The time to start Python, which no number of processes shortens, is measured by
``--dry-run`` and taken off in the second ratio; what two processes need to find each other (each imports
torch for it, about a second) is not, so small checkpoints gain less. Who comes first alternates, and outputs
of one and two processes are compared by the SHA-256 of every file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.copy.make import KINDS


@dataclass(frozen=True)
class Case:
    """Kind of checkpoint, initialization, and whether the source comes from the disk."""

    kind: str
    init: str
    cold: bool


CASES = {
    "random": Case("weights", "random-random", cold=False),
    "copy": Case("dense", "copy-copy", cold=True),
    "cached": Case("dense", "copy-copy", cold=False),
}


def command(processes: int, source: Path, destination: Path, init: str) -> list[str]:
    """One expansion; the report would be made by the first process alone and is left out."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    expand = [
        "-m",
        "sparkling_cli",
        "expand",
        str(source),
        str(destination),
        "--axis",
        "ffn",
        "--factor",
        "2",
    ]
    return [
        *torchrun,
        str(processes),
        *expand,
        "--init",
        init,
        "--allow-locked",
        "--report",
        "none",
        "--threads",
        "1",
    ]


def seconds(words: list[str]) -> float:
    """Wall time of a command that must succeed."""
    began = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - began


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file with tensors, by its path inside the output."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".pt"):
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def bring(source: Path, *, cold: bool) -> None:
    """Have the source out of the page cache, or in it."""
    os.sync()
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def one_round(source: Path, folder: Path, case: Case, order: tuple[int, int]) -> dict[str, float]:
    """Seconds of both, and of what both do before the first byte."""
    found, made = {}, []
    for processes in order:
        words = command(processes, source, folder / "out", case.init)
        found[f"start {processes}"] = seconds([*words, "--dry-run"])
        bring(source, cold=case.cold)
        found[str(processes)] = seconds(words)
        made.append(digests(folder / "out"))
        shutil.rmtree(folder / "out")
    if made[0] != made[1]:
        sys.exit("one and two processes made different files")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="size of the source")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = options.folder / "source"
    results = {}
    for name, case in ((name, CASES[name]) for name in options.cases):
        KINDS[case.kind](source, options.gigabytes)
        # fills the cache of layouts
        seconds([*command(1, source, options.folder / "none", case.init), "--dry-run"])
        orders = [(1, 2), (2, 1)]
        rounds = [one_round(source, options.folder, case, orders[i % 2]) for i in range(options.rounds)]
        whole = statistics.median(r["1"] / r["2"] for r in rounds)
        work = statistics.median((r["1"] - r["start 1"]) / (r["2"] - r["start 2"]) for r in rounds)
        results[name] = {"rounds": rounds, "ratio": whole, "ratio without start": work}
        one, two = (statistics.median(r[n] for r in rounds) for n in ("1", "2"))
        print(
            f"{name:8} one process {one:.1f} s, two {two:.1f} s: {whole:.2f}x, without start {work:.2f}x",
            flush=True,
        )
        shutil.rmtree(source)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
