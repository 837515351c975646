"""The README's own commands, and the Slurm job of the examples."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import ROOT, blocks, like_a_clone, prints, script, session

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKPOINT = "fixtures/dense-llama/checkpoint-600"


def run(command: str | list[str], folder: Path, environment: dict[str, str], **options: Any) -> str:
    """What a command that must succeed prints: results, then what is meant for people."""
    words = shlex.split(command) if isinstance(command, str) else command
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


#: Every command in the README's blocks, without its remark, and what is shown below it.
SHOWN = {
    command.partition(" #")[0].strip(): shown
    for block in blocks(ROOT / "README.md")
    for command, shown in session(block)
}


def test_the_commands_are_these() -> None:
    """What is tested below is what stands there; the example is trained for pages of docs/."""
    assert list(SHOWN) == [
        "make demo",
        "make test",
        ". .venv/bin/activate",
        "sparkling expand ckpt/ --axis ffn --factor 2",
        "pip install '.[hf]'",
        "pip install '.[hf,plot]'",
        "python -m sparkling_cli.examples.train",
        "docker build -t sparkling .",
        'docker run --rm -v "$PWD:/data" sparkling expand /data/ckpt --axis ffn --factor 2',
    ]
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert re.search(r"^hf = ", extras, flags=re.M)
    assert re.search(r"^plot = ", extras, flags=re.M)


def test_the_figures_are_those_of_the_tests_and_pages() -> None:
    """Why to trust it: every number of the table is one that a command of the repository makes."""
    from sparkling_cli import __version__
    from tests.verification.test_faults import FAULTS

    assert f"{len(FAULTS)} wrong outputs, from {len({fault for fault, _, _ in FAULTS})} faults" in README
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    classes = re.search(r"(\d+) classes", page)
    proved = re.search(r"proved: ffn (\d+), hidden (\d+), heads (\d+)", page)
    assert classes is not None and proved is not None
    ffn, hidden, heads = proved.groups()
    assert f"`ffn` in {ffn} of the {classes[1]} causal classes" in README
    assert f"`hidden` in {hidden}, `heads` in {heads}" in README
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    seconds = re.search(r"few large tensors \| 4\.40 GB .*? \| ([\d.]+) s", performance)
    assert seconds is not None
    assert f"4.4 GB is widened in {float(seconds[1]):.0f} s" in README
    assert f"version {__version__}" in README


def test_the_image_is_made_of_what_the_wheel_needs() -> None:
    """Every file that the Dockerfile copies exists, and is let in by .dockerignore; extras exist."""
    text = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, flags=re.M) for word in line.split()]
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), flags=re.M)
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)
    assert 'ENTRYPOINT ["sparkling"]' in text


@pytest.mark.slow
def test_make(tmp_path: Path) -> None:
    """``make demo`` widens and verifies; ``make test`` would run lint, types and the tests."""
    environment = like_a_clone(tmp_path)
    tools = tmp_path / ".venv" / "bin"
    tools.parent.mkdir()
    (tmp_path / ".tools").rename(tools)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for mark in (".installed", ".installed-dev"):
        (tmp_path / ".venv" / mark).touch()
    said = run("make demo", tmp_path, environment)
    assert prints(SHOWN["make demo"], said) and "bit by bit" in said
    planned = run("make -n test", tmp_path, environment)
    assert [word for word in ("ruff check", "mypy", "pytest -q") if word in planned] == [
        "ruff check", "mypy", "pytest -q",
    ]  # fmt: skip


@pytest.mark.slow
def test_sparkling(tmp_path: Path) -> None:
    """The one of the first screen, and every row of the table."""
    environment = like_a_clone(tmp_path)
    shutil.copytree(ROOT / CHECKPOINT, tmp_path / "ckpt")
    first = "sparkling expand ckpt/ --axis ffn --factor 2"
    assert prints(SHOWN[first], run(first, tmp_path, environment))
    (made,) = [path.name for path in tmp_path.glob("ckpt-*")]
    rows = re.findall(r"^\| `(sparkling [^`]+)` \|", README, flags=re.M)
    assert [row.split()[1] for row in rows] == [
        "expand", "inspect", "verify", "plan", "schedule", "layout", "architectures",
    ]  # fmt: skip
    more = {"expand": " --axis ffn --factor 3 --report none", "architectures": " llama"}
    names = {"CKPT": "ckpt", "SRC": "ckpt", "DST": made, "OTHER": made, "OUT": made}
    for row in rows:
        command = re.sub(r"[\[\]]", "", row)
        if row.split()[1] == "expand":
            command = command.replace("DST", "other")
        command = re.sub(r"\b[A-Z]{3,5}\b", lambda word: names[word[0]], command)
        assert run(command + more.get(row.split()[1], ""), tmp_path, environment).strip(), command


def _job(folder: Path, body: str, edit: tuple[str, str] = ("", "")) -> tuple[subprocess.Popen[str], Path]:
    """The Slurm job with a pipeline of our own in it, and a ``scontrol`` that writes down what it is told."""
    text = (ROOT / "docs" / "examples" / "pipeline.sbatch").read_text()
    assert edit[0] in text
    (folder / "pipeline.sbatch").write_text(text.replace(*edit, 1))
    script(folder / "pipeline.sh", body)
    script(folder / "scontrol", f'echo "$@" >> "{folder}/told"')
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "42",
    }
    job = subprocess.Popen(["bash", str(folder / "pipeline.sbatch")], env=environment, text=True)
    return job, folder / "told"


def test_the_job_ends_with_its_pipeline(tmp_path: Path) -> None:
    """It runs the pipeline with its folder, leaves as it leaves, and asks for nothing more."""
    job, told = _job(tmp_path, f'echo "$@" > "{tmp_path}/given"; exit 3')
    assert job.wait(timeout=60) == 3
    assert (tmp_path / "given").read_text() == "runs/pipeline\n"
    assert not told.exists()


def test_the_job_requeues_itself(tmp_path: Path) -> None:
    """Told to end, it ends the pipeline and goes back into the queue."""
    body = f'trap \'echo ended > "{tmp_path}/ended"; exit 1\' TERM; touch "{tmp_path}/up"; sleep 60 & wait'
    job, told = _job(tmp_path, body)
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 0
    assert told.read_text() == "requeue 42\n"
    assert (tmp_path / "ended").exists()


def test_whatever_the_pipeline_started_is_told_to_end(tmp_path: Path) -> None:
    """A shell that waits for a program does not pass TERM on; the program gets it all the same."""
    trap = f"trap 'echo ended > \"{tmp_path}/ended\"; exit 130' TERM"
    script(tmp_path / "program", f'{trap}; touch "{tmp_path}/up"; sleep 60 & wait')
    job, told = _job(tmp_path, f'"{tmp_path}/program"; echo no more')
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 0
    assert told.read_text() == "requeue 42\n"
    while not (tmp_path / "ended").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("line", ["worker=$!", "[ -z", "status=0", 'wait "$worker"'])
def test_the_job_is_told_to_end_at_any_line(tmp_path: Path, line: str) -> None:
    """Just before it has noted its worker, or just after: it requeues, and no worker goes on alone."""
    start = f"\n{line}" if line != "[ -z" else '\n[ -z "$ending"'
    job, told = _job(tmp_path, "sleep 60", (start, f"\nkill -TERM $${start}"))
    assert job.wait(timeout=30) == 0
    assert told.read_text() == "requeue 42\n"


@pytest.mark.slow
def test_the_job_of_several_processes(tmp_path: Path) -> None:
    """The line for large checkpoints, on two processes, under an ``srun`` that starts what it is given."""
    text = (ROOT / "docs" / "examples" / "pipeline.sbatch").read_text()
    (line,) = re.findall(r"^#\s+(srun .*)$", text, flags=re.M)
    environment = like_a_clone(tmp_path)
    script(tmp_path / ".tools" / "srun", 'exec "$@"')
    values = {"half": CHECKPOINT, "wide": "wide"}
    assert "--nproc-per-node 8" in line
    command = line.replace("--nproc-per-node 8", "--nproc-per-node 2")
    run(["bash", "-euc", command], tmp_path, {**environment, **values}, timeout=500)
    run(f"sparkling verify {CHECKPOINT} wide", tmp_path, environment)
