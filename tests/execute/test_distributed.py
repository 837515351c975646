"""Several ranks make the same output as one process, or none at all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli.errors import SparklingError
from sparkling_cli.execute import job
from sparkling_cli.execute.distributed import team_of_processes
from sparkling_cli.execute.job import Part, PartResult
from sparkling_cli.execute.worker import Worker
from sparkling_cli.formats.model import OutputFile
from sparkling_cli.plan.model import Plan
from sparkling_cli.widening.geometry import Fill
from tests.execute.engine_support import doubled, execute, kept, no_sidecar, raw_plan, source_shape

forked = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough tasks for four ranks."""
    monkeypatch.setattr(job, "TASK", 300_000)


def laid(folder: Path, bad: bool = False) -> tuple[Plan, tuple[OutputFile, ...]]:
    """Tensors of several kinds, one of them with a NaN if asked for."""
    views = [
        (doubled(300, 0, fill=Fill.RANDOM), kept(700, 1)),
        (kept(600, 0), doubled(500, 1, scale=0.5)),
        (doubled(20, 0), kept(30, 1)),
        (doubled(500, 0, fill=Fill.ZERO), doubled(400, 1, fill=Fill.ZERO)),
    ]
    generator = torch.Generator().manual_seed(0)
    rows = {
        f"t{i}": (torch.randn(source_shape(view), generator=generator), view, {})
        for i, view in enumerate(views)
    }
    if bad:
        rows["t3"][0][3, 3] = float("nan")
    return raw_plan(folder / "src", rows, carried={"c.txt": b"carried"})


def contents(root: Path) -> dict[str, bytes]:
    """Every file below."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def ranks(count: int, work: Callable[[int], None]) -> list[tuple[int, str]]:
    """Exit code and message of every rank of a team, as torchrun would start it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told: Any = forked.Queue()

    def child(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        try:
            work(rank)
            told.put((rank, ""))
        except SparklingError as error:
            told.put((rank, f"{type(error).__name__}: {error.message}"))
        told.close()
        told.join_thread()

    processes = [forked.Process(target=child, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    said = dict(told.get() for p in processes if p.exitcode == 0)
    return [(p.exitcode if p.exitcode is not None else -99, said.get(r, "")) for r, p in enumerate(processes)]


@pytest.fixture
def meeting(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], None]:
    """Called in each of two ranks: it waits with its first task until the other has one too.

    Tasks are small here, and go to who asks first: without this one rank may do them all.
    """
    place = tmp_path_factory.mktemp("meeting")

    def meet(rank: int) -> None:
        run = Worker.run

        def together(self: Worker, task: tuple[Part, ...]) -> list[PartResult]:
            (place / str(rank)).touch()
            until = time.monotonic() + 60
            while len(list(place.iterdir())) < 2 and time.monotonic() < until:
                time.sleep(0.005)
            return run(self, task)

        Worker.run = together  # type: ignore[method-assign]

    return meet


@pytest.mark.parametrize("count", [2, 4])
def test_same_bytes(tmp_path: Path, count: int) -> None:
    """Two and four ranks write, byte for byte, what one process writes."""
    plan, files = laid(tmp_path)
    execute(plan, files, tmp_path / "one", sidecar=no_sidecar)

    def work(rank: int) -> None:
        with team_of_processes() as team:
            assert team is not None
            assert team.size == count
            written = execute(plan, files, tmp_path / "many", sidecar=no_sidecar, team=team, threads=1)
            assert len(written.tensors) == 4

    assert ranks(count, work) == [(0, "")] * count
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many", "one", "src"]


def test_an_error_anywhere_ends_all(tmp_path: Path) -> None:
    """A tensor with NaN is met by one rank; every rank ends with the same error, and nothing is left."""
    plan, files = laid(tmp_path, bad=True)

    def work(rank: int) -> None:
        with team_of_processes() as team:
            execute(plan, files, tmp_path / "dst", sidecar=no_sidecar, team=team, threads=1)

    for code, message in ranks(2, work):
        assert code == 0
        assert "CheckpointError" in message
        assert "NaN or Inf in 1 tensor(s)" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_a_failing_disk_under_one_rank(tmp_path: Path, meeting: Callable[[int], None]) -> None:
    """An I/O error on rank 1 is told by both, and nothing is left."""
    plan, files = laid(tmp_path)

    def work(rank: int) -> None:
        meeting(rank)
        if rank == 1:

            def failing(*_: object) -> int:
                raise OSError(5, "Input/output error")

            os.pwrite = failing  # type: ignore[assignment]
        with team_of_processes() as team:
            execute(plan, files, tmp_path / "dst", sidecar=no_sidecar, team=team, threads=1)

    for code, message in ranks(2, work):
        assert code == 0
        assert "OutputError: cannot write" in message
        assert "Input/output error" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(tmp_path: Path, victim: int, meeting: Callable[[int], None]) -> None:
    """A rank that dies leaves nothing that looks finished; the next run succeeds."""
    plan, files = laid(tmp_path)

    def work(rank: int) -> None:
        meeting(rank)

        def progress(_: int) -> None:
            if rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        with team_of_processes() as team:
            execute(
                plan, files, tmp_path / "dst", sidecar=no_sidecar, team=team, threads=1, progress=progress
            )

    found = ranks(2, work)
    assert found[victim][0] == -signal.SIGKILL
    assert "another rank is gone" in found[1 - victim][1]
    assert not (tmp_path / "dst").exists()
    execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    execute(plan, files, tmp_path / "one", sidecar=no_sidecar)
    assert contents(tmp_path / "dst") == contents(tmp_path / "one")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "one", "src"]


@pytest.mark.parametrize("slow", [0, 1])
def test_who_is_faster_does_more(tmp_path: Path, slow: int, meeting: Callable[[int], None]) -> None:
    """A rank that is held up leaves its tasks to the other; every task is done once, by one of them."""
    plan, files = laid(tmp_path)
    log = tmp_path / "log"
    log.mkdir()

    def work(rank: int) -> None:
        meeting(rank)
        run = Worker.run

        def noted(self: Worker, task: tuple[Part, ...]) -> list[PartResult]:
            if rank == slow and (log / str(rank)).exists():
                time.sleep(0.3)
            with (log / str(rank)).open("a") as file:
                file.write(f"{task}\n")
            return run(self, task)

        Worker.run = noted  # type: ignore[method-assign]
        with team_of_processes() as team:
            execute(plan, files, tmp_path / "many", sidecar=no_sidecar, team=team, threads=1)

    assert ranks(2, work) == [(0, "")] * 2
    done = [(log / str(rank)).read_text().splitlines() for rank in range(2)]
    assert sorted(done[0] + done[1]) == sorted(str(task) for task in job.make_job(plan, files).tasks)
    assert len(done[slow]) < len(done[1 - slow])


def test_no_team_outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun's variables, or with one process, there is no team."""
    monkeypatch.delenv("RANK", raising=False)
    with team_of_processes() as team:
        assert team is None


@pytest.mark.slow
def test_torchrun(dense_checkpoint: Path, tmp_path: Path) -> None:
    """The command line under torchrun, 1 and 2 processes: the same bytes."""
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += ["-m", "sparkling_cli", "expand", str(dense_checkpoint), str(tmp_path / f"x{count}" / "d")]
        command += ["--axis", "ffn", "--factor", "2", "--report", "none"]
        (tmp_path / f"x{count}").mkdir()
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stderr[-2000:]
    assert contents(tmp_path / "x1") == contents(tmp_path / "x2")
