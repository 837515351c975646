"""Killed, interrupted, out of space, failing disks: the source whole, no output, the next run succeeds."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from sparkling_cli.errors import Interrupted, OutputError
from sparkling_cli.execute import job, output_files, stream, worker
from sparkling_cli.execute.commit import Staging, partial_of
from sparkling_cli.execute.stream import Written
from sparkling_cli.formats.model import OutputFile
from sparkling_cli.plan.model import Plan
from sparkling_cli.storage import byte_ranges
from sparkling_cli.storage.sidecar import sidecar_root
from sparkling_cli.widening.geometry import Fill
from tests.execute.engine_support import (
    doubled,
    execute,
    kept,
    no_sidecar,
    output_bytes,
    raw_plan,
    source_shape,
)

Laid = tuple[Plan, tuple[OutputFile, ...]]

forked = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tasks, so that a run can be broken off in many places."""
    monkeypatch.setattr(job, "TASK", 200_000)


def laid(folder: Path, seed: int = 1) -> Laid:
    """About 12 MB of output in tensors of several kinds."""
    views = [
        (doubled(300, 0), kept(700, 1)),
        (kept(600, 0), doubled(500, 1, scale=0.5)),
        (doubled(300, 0, fill=Fill.RANDOM), kept(400, 1)),
        (doubled(500, 0, fill=Fill.ZERO), doubled(400, 1, fill=Fill.ZERO)),
    ]
    generator = torch.Generator().manual_seed(0)
    rows = {
        f"t{i}": (torch.randn(source_shape(view), generator=generator), view, {})
        for i, view in enumerate(views)
    }
    return raw_plan(folder / "src", rows, carried={"c.txt": b"carried"}, seed=seed)


def contents(root: Path) -> dict[str, bytes]:
    """Every file below."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def run(plan: Plan, files: tuple[OutputFile, ...], target: Path) -> None:
    """One run, slowed down a little."""
    execute(plan, files, target, sidecar=no_sidecar, threads=2, progress=lambda _: time.sleep(0.002))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The output of a run that nothing happens to, and how long it takes."""
    folder = tmp_path_factory.mktemp("reference")
    plan, files = laid(folder)
    run(plan, files, folder / "warm")
    start = time.monotonic()
    run(plan, files, folder / "dst")
    return contents(folder / "dst"), time.monotonic() - start


@pytest.mark.parametrize("moments", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_sigkill(tmp_path: Path, reference: tuple[dict[str, bytes], float], moments: int) -> None:
    """At random moments: the source unchanged, the output absent or whole, the next run whole."""
    wanted, duration = reference
    plan, files = laid(tmp_path)
    source = contents(tmp_path / "src")
    rng = random.Random(moments)
    for number in range(moments):
        target = tmp_path / f"dst{number}"
        child = forked.Process(target=run, args=(plan, files, target))
        child.start()
        time.sleep(rng.uniform(0, 1.2 * duration))
        child.kill()
        child.join()
        assert contents(tmp_path / "src") == source
        if target.exists():
            assert contents(target) == wanted
            continue
        run(plan, files, target)
        assert contents(target) == wanted
        assert not partial_of(target).exists()


def kill_at_the_end(plan: Plan, files: tuple[OutputFile, ...], target: Path) -> None:
    """A run that ends by SIGKILL when all tensors are written."""

    def killed(_: Written) -> dict[str, bytes]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    process = forked.Process(target=lambda: execute(plan, files, target, sidecar=killed, threads=1))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert partial_of(target).is_dir()


def kill_half_way(plan: Plan, files: tuple[OutputFile, ...], target: Path) -> None:
    """A run that ends by SIGKILL inside a write, half of the 5.8 MB (zeros are not written) done."""

    def child() -> None:
        total, real = [0], byte_ranges.write_range

        def dying(handles: byte_ranges.Handles, path: str, offset: int, data: object) -> None:
            view = memoryview(data)  # type: ignore[arg-type]
            total[0] += view.nbytes
            if total[0] > 2_900_000:
                real(handles, path, offset, view[: view.nbytes // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            real(handles, path, offset, view)

        worker.write_range = dying
        execute(plan, files, target, sidecar=no_sidecar, threads=1)

    process = forked.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert partial_of(target).is_dir()
    assert not target.exists()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of tensor data that are written."""
    sizes: list[int] = []
    real = byte_ranges.write_range

    def counting(handles: byte_ranges.Handles, path: str, offset: int, data: object) -> None:
        sizes.append(memoryview(data).nbytes)  # type: ignore[arg-type]
        real(handles, path, offset, data)

    monkeypatch.setattr(worker, "write_range", counting)
    return sizes


def test_goes_on_where_it_was_killed(
    tmp_path: Path, reference: tuple[dict[str, bytes], float], counted: list[int]
) -> None:
    """The next run writes only what was not finished."""
    plan, files = laid(tmp_path)
    execute(plan, files, tmp_path / "whole", sidecar=no_sidecar)
    everything = sum(counted)
    counted.clear()
    kill_half_way(plan, files, tmp_path / "dst")
    execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert everything > 5_800_000
    assert 0.45 * everything < sum(counted) < 0.6 * everything
    assert contents(tmp_path / "dst") == reference[0]


def test_a_damaged_leftover_is_not_believed(
    tmp_path: Path, reference: tuple[dict[str, bytes], float]
) -> None:
    """Finished pieces are read back before they count; a cut journal line, a cut file are seen too."""
    for number, harm in enumerate(("data", "journal", "short", "extra")):
        plan, files = laid(tmp_path / str(number))
        target = tmp_path / str(number) / "dst"
        kill_half_way(plan, files, target)
        partial = partial_of(target)
        if harm == "data":
            with (partial / "data" / "dst" / "sub" / "a.bin").open("r+b") as file:
                file.seek(5000)
                file.write(bytes(range(256)) * 20)
        elif harm == "journal":
            journal = partial / "journal-0"
            journal.write_bytes(journal.read_bytes()[:-7] + b'\n00000000 [0,[]]\nabc\n{"\n')
        elif harm == "short":
            os.truncate(partial / "data" / "dst" / "b.bin", 1000)
        else:
            (partial / "data" / "dst" / "stray").write_text("x")
        execute(plan, files, target, sidecar=no_sidecar)
        assert contents(target) == reference[0]


@pytest.mark.parametrize("finished", [False, True], ids=["half", "all tasks"])
def test_zeros_that_a_killed_run_left_are_not_believed(
    tmp_path: Path, reference: tuple[dict[str, bytes], float], finished: bool
) -> None:
    """A disk that lost power may hold something else where zeros belong: in tensors, between them, behind."""
    plan, files = laid(tmp_path)
    target = tmp_path / "dst"
    (kill_at_the_end if finished else kill_half_way)(plan, files, target)
    data = partial_of(target) / "data" / "dst"
    (zeros,) = (extent for file in files for key, extent in file.tensors if key == "t3")
    with (data / "b.bin").open("r+b") as half:
        for at in (9_600, 2_997_000):  # new columns, and new rows
            half.seek(zeros.offset + at)
            half.write(b"\x3f" * 5000)
    for file in files:
        for _, extent in file.tensors:
            with (data / file.path).open("r+b") as half:
                half.seek(extent.offset + prod(extent.shape) * 4)
                half.write(b"gap")
    execute(plan, files, target, sidecar=no_sidecar)
    assert contents(target) == reference[0]


def test_another_plan_starts_afresh(tmp_path: Path) -> None:
    """What was left by a run with another seed is thrown away."""
    plan, files = laid(tmp_path, seed=2)
    execute(plan, files, tmp_path / "wanted", sidecar=no_sidecar)
    first, first_files = laid(tmp_path, seed=1)
    os.utime(tmp_path / "src" / "data.bin")
    kill_half_way(first, first_files, tmp_path / "dst")
    execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert contents(tmp_path / "dst") == contents(tmp_path / "wanted")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_interrupts_clean_up(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM, SIGHUP: a message that says what to do, nothing left."""
    plan, files = laid(tmp_path)
    told = forked.Queue()

    def child() -> None:
        def progress(_: int) -> None:
            told.put("")
            time.sleep(0.05)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may themselves run under nohup
        try:
            execute(plan, files, tmp_path / "dst", sidecar=no_sidecar, threads=1, progress=progress)
        except Interrupted as error:
            told.put(str(error))

    process = forked.Process(target=child)
    process.start()
    assert told.get(timeout=60) == ""
    os.kill(process.pid or 0, number)
    message = ""
    while not message:
        message = told.get(timeout=60)
    process.join()
    assert process.exitcode == 0
    assert "the source is unchanged" in message
    assert "run the same command again" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """Under nohup a hangup does not end the run."""
    plan, files = laid(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        execute(
            plan,
            files,
            tmp_path / "dst",
            sidecar=no_sidecar,
            progress=lambda _: os.kill(os.getpid(), signal.SIGHUP),
        )
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_at_once(tmp_path: Path) -> None:
    """A second run for the same output is refused while the first one works, and harms nothing."""
    plan, files = laid(tmp_path)
    holder = Staging(tmp_path / "src", tmp_path / "dst", is_file=False)
    holder.begin("x")
    with pytest.raises(OutputError, match="another process is writing"):
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert holder.data.parent.is_dir()
    holder.discard()
    execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", [0, 1, 17])
def test_failing_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: int) -> None:
    """Any error of any write: an OutputError with path and bytes; nothing is left."""
    plan, files = laid(tmp_path)
    real, calls = os.pwrite, [0]

    def failing(descriptor: int, data: object, offset: int) -> int:
        calls[0] += 1
        if calls[0] > call:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(OutputError, match=r"cannot write .*(a|b)\.bin.*bytes.*are free") as caught:
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert os.strerror(code) in caught.value.message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize("function", ["fsync", "fdatasync", "posix_fallocate", "preadv"])
def test_failing_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Errors of the calls around the writes."""
    plan, files = laid(tmp_path)

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, function, failing)
    with pytest.raises(Exception, match=r"cannot (read|write|make)") as caught:
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert type(caught.value).__name__ == ("CheckpointError" if function == "preadv" else "OutputError")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount file systems")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("late", ["checked first", "at allocation", "at a write"])
def test_full_disk(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, late: str) -> None:
    """A disk that is too small: seen before work where possible, and nothing is left at any rate."""
    plan, files = laid(tmp_path)
    if late != "checked first":
        monkeypatch.setattr(stream, "check_room", lambda *_: None)
    if late == "at a write":
        monkeypatch.setattr(os, "posix_fallocate", lambda fd, start, size: os.ftruncate(fd, start + size))
    with pytest.raises(OutputError, match="bytes"):
        execute(plan, files, small_disk / "dst", sidecar=no_sidecar)
    assert list(small_disk.iterdir()) == []


def single(folder: Path) -> Laid:
    """A single-file checkpoint."""
    plan, files = raw_plan(folder / "src", {"w": (torch.ones(4), (doubled(4, 0),), {})})
    row = plan.rows[0]
    extents = tuple(extent._replace(path="") for extent in row.source.extents)
    row = row._replace(source=row.source._replace(extents=extents))
    source = replace(plan.source, root=folder / "src" / "data.bin")
    return replace(plan, source=source, rows=(row,)), (replace(files[0], path=""),)


def test_killed_between_the_two_renames_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of small files without its file is cleared away; one that was there before is refused."""
    plan, files = single(tmp_path)
    target = tmp_path / "out.pt"

    def child() -> None:
        real = Path.rename

        def second(self: Path, to: Path) -> Path:
            if to.name == "out.pt":
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, to)

        monkeypatch.setattr(Path, "rename", second)
        execute(plan, files, target, sidecar=no_sidecar)

    process = forked.Process(target=child)
    process.start()
    process.join()
    assert sidecar_root(target, True).is_dir()
    assert not target.exists()
    execute(plan, files, target, sidecar=no_sidecar)
    assert output_bytes(target, plan, files)["w"] == torch.ones(8).numpy().tobytes()
    target.unlink()
    with pytest.raises(OutputError, match="exists"):
        execute(plan, files, target, sidecar=no_sidecar)
    assert sidecar_root(target, True).is_dir()


def test_allocation_refuses_links(tmp_path: Path) -> None:
    """A link planted inside the folder in the making is not written through."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="exists"):
        output_files.allocate(tmp_path / "file", 10)
    assert (tmp_path / "victim").read_text() == "mine"
