"""What a second process brings: ``torchrun`` with one and with two processes, in one run.

``python -m benchmarks.torchrun --folder EMPTY [--gigabytes 8] [--rounds 3] [--json FILE]``

Every process works with one thread, so that two processes have twice the processors of one, as two hosts
have. ``copy`` (weights and AdamW state, new entries copied) is bound by the disk, ``random`` (weights alone,
all new entries drawn) by arithmetic. The time to start Python, which no number of processes shortens, is
measured by ``--dry-run`` and taken off in the second ratio; what two processes need to find each other
(each imports torch for it, about a second) is not. Who comes first alternates, and outputs of one and two
processes are compared by the SHA-256 of every file.
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
from pathlib import Path

from benchmarks.copy.make import KINDS

#: kind of checkpoint and initialization
CASES = {"copy": ("dense", "copy-copy"), "random": ("weights", "random-random")}


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
    return [*torchrun, str(processes), *expand, "--init", init, "--report", "none", "--threads", "1"]


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


def one_round(source: Path, folder: Path, init: str, order: tuple[int, int]) -> dict[str, float]:
    """Seconds of both, and of what both do before the first byte."""
    found, made = {}, []
    for processes in order:
        words = command(processes, source, folder / "out", init)
        found[f"start {processes}"] = seconds([*words, "--dry-run"])
        os.sync()
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
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the source")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = options.folder / "source"
    results = {}
    for name, (kind, init) in CASES.items():
        KINDS[kind](source, options.gigabytes)
        seconds([*command(1, source, options.folder / "none", init), "--dry-run"])  # fills the layout cache
        orders = [(1, 2), (2, 1)]
        rounds = [one_round(source, options.folder, init, orders[i % 2]) for i in range(options.rounds)]
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
