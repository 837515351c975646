"""``python -m benchmarks.copy``: widening against ``cp`` and against the obvious script, in one run.

Every figure is a subprocess's wall time, processor time and peak resident memory, as the kernel counts
them. Measurements of one round follow each other, so that a busy machine slows all of them; ratios are
taken within a round, and the median over rounds is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.copy.report import write_report

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cost:
    """Of one subprocess: seconds, processor seconds, peak resident bytes."""

    wall: float
    cpu: float
    rss: int


@dataclass(frozen=True)
class Case:
    """What is measured: a name, the kind of checkpoint, its size, options of ``expand``."""

    name: str
    kind: str
    gigabytes: float
    options: tuple[str, ...] = ()


def cost(command: list[str]) -> Cost:
    """Run a command and wait for it.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=ROOT
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{command} failed: {said.decode()[-2000:]}")
    return Cost(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def bytes_of(folder: Path) -> int:
    """Size of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(case: Case, folder: Path, rounds: int, *, obvious: bool) -> dict[str, object]:
    """All figures of one case; everything it makes is removed."""
    source = folder / "source"
    shutil.rmtree(folder, ignore_errors=True)
    # in a process of its own: a child's peak memory begins with its parent's
    cost([sys.executable, "-m", "benchmarks.copy.make", case.kind, str(source), str(case.gigabytes)])
    expand = [sys.executable, "-m", "sparkling_cli", "expand", str(source), str(folder / "out")]
    expand += ["--axis", "ffn", "--factor", "2", "--report", "none", *case.options]
    found: list[dict[str, Cost]] = []
    size, tensors = 0, 0
    cost([*expand, "--dry-run"])  # fills the cache of inferred layouts
    os.sync()
    for _ in range(rounds):
        one = {"plan": cost([*expand, "--dry-run"]), "expand": cost(expand)}
        size, tensors = bytes_of(folder / "out"), _tensors(folder / "out")
        os.sync()
        one["cp"] = _removing(folder / "copy", lambda to: cost(["cp", "-r", str(folder / "out"), to]))
        one["cp and sync"] = _removing(folder / "copy", lambda to: cost(_copy_and_sync(folder / "out", to)))
        one["verify"] = cost(
            [sys.executable, "-m", "sparkling_cli", "verify", str(source), str(folder / "out")]
        )
        shutil.rmtree(folder / "out")
        os.sync()
        if obvious:
            script = [sys.executable, "-m", "benchmarks.copy.obvious", str(source)]
            one["obvious"] = _removing(folder / "copy", lambda to: cost([*script, to]))  # noqa: B023
            os.sync()
        found.append(one)
        print({name: round(c.wall, 2) for name, c in one.items()}, flush=True)
    result = {
        "case": asdict(case),
        "source bytes": bytes_of(source),
        "output bytes": size,
        "tensors": tensors,
        "rounds": [{name: asdict(c) for name, c in one.items()} for one in found],
    }
    shutil.rmtree(folder)
    return result


def _removing(path: Path, run: Callable[[str], Cost]) -> Cost:
    found = run(str(path))
    shutil.rmtree(path)
    os.sync()
    return found


def _copy_and_sync(source: Path, target: str) -> list[str]:
    return ["sh", "-c", 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +', "sh", str(source), target]


def _tensors(output: Path) -> int:
    return len(json.loads((output / "sparkling/manifest.json").read_bytes())["tensors"])


def idle() -> Cost:
    """A Python that only imports torch."""
    return min((cost([sys.executable, "-c", "import torch"]) for _ in range(3)), key=lambda c: c.wall)


def machine() -> str:
    """Processor, memory, system."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[1]
    return (
        f"{os.cpu_count()} cores of {cpu}, {memory:.0f} GiB of memory, {platform.system()}, "
        f"load average before the run {load:.1f}"
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.copy", description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="*", default=[0.5, 2.0, 4.0])
    parser.add_argument("--kinds", nargs="*", default=["dense", "random", "experts"])
    parser.add_argument("--special-size", type=float, default=2.0, help="of random and experts, GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-obvious", action="store_true", help="leave the slow script out")
    parser.add_argument("--folder", type=Path, required=True, help="an empty place on the disk to measure")
    parser.add_argument("--results", type=Path, help="JSON file for all figures; cases are added to it")
    parser.add_argument("--write", type=Path, help="the page to write, e.g. docs/performance.md")
    options = parser.parse_args()
    cases = [Case("few large tensors", "dense", size) for size in options.sizes if "dense" in options.kinds]
    if "random" in options.kinds:
        cases.append(Case("random fill", "dense", options.special_size, ("--init", "random-copy")))
    if "experts" in options.kinds:
        cases.append(Case("40,000 small tensors", "experts", options.special_size))
    measured: list[object] = []
    if options.results and options.results.exists():
        measured = json.loads(options.results.read_text())["cases"]
    results: dict[str, object] = {"machine": machine(), "idle": asdict(idle()), "cases": measured}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for case in cases:
        print(case, flush=True)
        fits = case.gigabytes * 2**30 * 3.2 < memory  # the script holds source and output
        fits = fits and not options.no_obvious
        measured.append(measure(case, options.folder, options.rounds, obvious=fits))
        results["cases"] = measured
        if options.results:
            options.results.write_text(json.dumps(results, indent=1))
        if options.write:
            options.write.write_text(write_report(results, statistics.median))


if __name__ == "__main__":
    main()
