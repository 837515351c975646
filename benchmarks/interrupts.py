"""SIGINT at random moments of ``sparkling expand`` with the report on: what was left, and the exit codes.

``python -m benchmarks.interrupts --moments 200``. Moments are counted from the start of the process, so some
lie in the start of Python itself, before any line of this package: there the signal ends the process as it
ends every program (code -2 here, 130 in a shell; 1, with a traceback, while `site` runs), and nothing has
been begun.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = next((ROOT / "fixtures" / "dense-llama").glob("checkpoint-*"))


def attempt(folder: Path, delay: float | None) -> str:
    """One expansion that gets SIGINT after so many seconds, or none: its code and what is in the folder."""
    folder.mkdir()
    command = ["-m", "sparkling_cli", "expand", str(SOURCE), "new/wide", "--axis", "ffn", "--factor", "2"]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if delay is not None:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    whole = (folder / "new" / "wide" / "sparkling" / "manifest.json").is_file()
    left = "whole" if whole else "something" if any(folder.iterdir()) else "nothing"
    return f"code {process.returncode}, {left} left{', a traceback' if 'Traceback' in err else ''}"


def main() -> int:
    """Print how often each outcome was seen; 1 if one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background inherits that it is ignored
    moments = random.Random(asked.seed)
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as work:
        began = time.monotonic()
        first = attempt(Path(work) / "whole", None)
        took = time.monotonic() - began
        print(f"undisturbed: {first}, {took:.1f} s", flush=True)
        for number in range(asked.moments):
            seen[attempt(Path(work) / str(number), moments.uniform(0, took))] += 1
    for outcome, count in seen.most_common():
        print(f"{count:4d}  {outcome}")
    fine = {"code 130, nothing left", "code 0, whole left", "code -2, nothing left"}
    return 0 if set(seen) <= fine else 1


if __name__ == "__main__":
    sys.exit(main())
