"""``python -m benchmarks.copy``: widening against ``cp`` and against the obvious script, in one run.

Every figure is a subprocess's wall time, processor time and peak resident memory, as the kernel counts
them. Measurements of one round follow each other, so that a busy machine slows all of them; ratios are
taken within a round, and the median over rounds is shown. All of it takes 15 to 45 minutes, as fast as the
disk is, 55 GB of it and 12 GB of free memory (what does not fit is left out, and the page says so).

The public rival is used where it can be imported, or from a folder made by
``pip install --no-deps --target FOLDER mergekit immutables peft accelerate`` (``--rival FOLDER``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
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
    """What is measured.

    Attributes:
        name: in the table.
        kind: of checkpoint (``make``).
        gigabytes: of the source.
        rounds: how often.
        options: of ``expand``.
    """

    name: str
    kind: str
    gigabytes: float
    rounds: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """How it is measured: where, against whom besides ``cp``, with which environment."""

    folder: Path
    obvious: bool
    rival: str | None
    environment: Mapping[str, str]


#: every case of the page, the most telling ones oftener
CASES = (
    Case("few large tensors", "dense", 0.5, 3),
    Case("few large tensors", "dense", 1.0, 3),
    Case("few large tensors", "dense", 4.0, 2),
    Case("few large tensors", "dense", 8.0, 1),
    Case("random fill", "dense", 2.0, 3, ("--init", "random-copy")),
    Case("random fill", "dense", 4.0, 1, ("--init", "random-copy")),
    Case("40,000 small tensors", "experts", 2.0, 3),
    Case("weights without optimizer", "weights", 2.0, 3),
)


def environment(rival: Path | None, bytecode: str) -> dict[str, str]:
    """The environment of every command: compiled modules are kept, as if installed, layouts are not."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    paths = [str(ROOT), *([str(rival.resolve())] if rival else [])]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONPYCACHEPREFIX": f"{bytecode}/modules",
        "SPARKLING_CACHE_DIR": f"{bytecode}/layouts",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def cost(command: list[str], environment: Mapping[str, str]) -> Cost:
    """Run a command and wait for it.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(environment), cwd=ROOT
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


def measure(case: Case, setting: Setting) -> dict[str, object]:
    """All figures of one case; everything it makes is removed."""
    folder = setting.folder
    source, out, copy = folder / "source", folder / "out", folder / "copy"
    shutil.rmtree(folder, ignore_errors=True)

    def run(*command: str | Path) -> Cost:
        return cost([str(word) for word in command], setting.environment)

    def first(*command: str | Path) -> Cost:
        """With nothing kept from an earlier run."""
        shutil.rmtree(setting.environment["SPARKLING_CACHE_DIR"], ignore_errors=True)
        return run(*command)

    def timed(*command: str | Path) -> Cost:
        touch(folder / "scratch", 2 * bytes_of(source))
        return run(*command)

    def removing(made: Path, found: Cost) -> Cost:
        """Of a command, whose output goes."""
        shutil.rmtree(made)
        os.sync()
        return found

    python = sys.executable
    # in a process of its own: a child's peak memory begins with its parent's
    run(python, "-m", "benchmarks.copy.make", case.kind, source, str(case.gigabytes))
    expand: list[str | Path] = [
        python,
        "-m",
        "sparkling_cli",
        "expand",
        source,
        out,
        "--axis",
        "ffn",
        "--factor",
        "2",
    ]
    expand += ["--report", "none", "--allow-locked", *case.options]
    # the script holds source and output
    obvious = setting.obvious and case.gigabytes * 2**30 * 3.2 < available() and not case.options
    found: list[dict[str, Cost]] = []
    size, tensors = 0, 0
    removing(out, run(*expand))  # compiles modules, those that build the class too
    for _ in range(case.rounds):
        one = {"plan": first(*expand, "--dry-run")}
        touch(folder / "scratch", 2 * bytes_of(source))
        one["first"] = removing(out, first(*expand))
        one["expand"] = timed(*expand)
        size, tensors = bytes_of(out), _tensors(out)
        os.sync()
        one["cp"] = removing(copy, timed("cp", "-r", out, copy))
        synced = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
        one["cp and sync"] = removing(copy, timed("sh", "-c", synced, "sh", out, copy))
        one["verify"] = run(python, "-m", "sparkling_cli", "verify", source, out)
        if setting.rival and case.kind == "weights":
            recipe = folder / "rival.yaml"
            recipe.write_text(f"merge_method: passthrough\nmodels:\n  - model: {out}\ndtype: float32\n")
            script = ("-m", "mergekit.scripts.run_yaml", recipe, copy, "--no-copy-tokenizer")
            one["rival"] = removing(copy, timed(python, *script))
        shutil.rmtree(out)
        os.sync()
        if obvious:
            one["obvious"] = removing(copy, timed(python, "-m", "benchmarks.copy.obvious", source, copy))
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


def _tensors(output: Path) -> int:
    return len(json.loads((output / "sparkling/manifest.json").read_bytes())["tensors"])


def touch(path: Path, size: int) -> None:
    """Have the system take so much memory, and give it back.

    A virtual machine's memory may have to be fetched from its host first, which takes longer than all that
    is measured, and would be paid by whoever comes first. Some give it back soon: it is not certain to help.
    """
    size = min(size, int(0.8 * available()))
    subprocess.run(["sh", "-c", 'head -c "$1" /dev/zero > "$2"', "sh", str(size), str(path)], check=True)
    path.unlink()


def idle(environment: Mapping[str, str]) -> Cost:
    """A Python that only imports torch."""
    command = [sys.executable, "-c", "import torch"]
    return min((cost(command, environment) for _ in range(3)), key=lambda c: c.wall)


def available() -> int:
    """Bytes of memory that can be had; the page cache gives way."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def rival_version(environment: Mapping[str, str]) -> str | None:
    """The public rival's version, if it can be imported."""
    command = [sys.executable, "-c", "import mergekit.scripts.run_yaml, importlib.metadata as m; "]
    command[-1] += "print(m.version('mergekit'))"
    done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), check=False)
    return done.stdout.split()[-1] if done.returncode == 0 else None


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
    parser.add_argument("--sizes", type=float, nargs="*", help="only sources of so many GB")
    parser.add_argument("--kinds", nargs="*", help="only these: dense, experts, weights")
    parser.add_argument("--rounds", type=int, help="of every case")
    parser.add_argument("--no-obvious", action="store_true", help="leave the slow script out")
    parser.add_argument("--rival", type=Path, help="folder that mergekit is installed in")
    parser.add_argument("--folder", type=Path, required=True, help="an empty place on the disk to measure")
    parser.add_argument("--results", type=Path, help="JSON file for all figures")
    parser.add_argument("--write", type=Path, help="the page to write, e.g. docs/performance.md")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty; what is measured there is removed afterwards")
    cases = [
        replace(case, rounds=options.rounds or case.rounds)
        for case in CASES
        if (not options.sizes or case.gigabytes in options.sizes)
        and (not options.kinds or case.kind in options.kinds)
    ]
    with tempfile.TemporaryDirectory() as bytecode:
        around = environment(options.rival, bytecode)
        rival = rival_version(around)
        setting = Setting(folder, not options.no_obvious, rival, around)
        measured: list[object] = []
        results: dict[str, object] = {
            "machine": machine(),
            "idle": asdict(idle(around)),
            "rival": rival,
            "cases": measured,
        }
        for case in cases:
            print(case, flush=True)
            measured.append(measure(case, setting))
            if options.results:
                options.results.write_text(json.dumps(results, indent=1))
            if options.write:
                options.write.write_text(write_report(results))


if __name__ == "__main__":
    main()
