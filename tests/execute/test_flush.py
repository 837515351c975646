"""Files are brought to the disk while they are written."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from sparkling_cli.execute import flush
from sparkling_cli.execute.flush import Flusher


def test_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round every so many bytes, a last one at the end, each over all files."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"x")
    synced: list[str] = []
    first = threading.Event()

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        if len(synced) == 2:
            first.set()

    monkeypatch.setattr(os, "fdatasync", noted)
    with Flusher(paths, keep=True) as flusher:
        flusher.wrote(flush._STEP - 1)
        assert not first.wait(0.05)
        flusher.wrote(1)
        assert first.wait(10)
        flusher.result()
        assert synced == ["a", "b"] * 2


def test_untouched_files_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many files only those that were written since the last round are synced; at the end, all."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"x")
    synced: list[str] = []
    rounds = threading.Semaphore(0)

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        rounds.release()

    monkeypatch.setattr(os, "fdatasync", noted)
    with Flusher(paths, keep=True) as flusher:
        flusher.wrote(flush._STEP)
        assert all(rounds.acquire(timeout=10) for _ in paths)
        os.utime(paths[1], ns=(1, 1))
        flusher.wrote(flush._STEP)
        assert rounds.acquire(timeout=10)
        flusher.result()
    assert synced == ["a", "b", "b", "a", "b"]


def test_a_file_that_is_gone_is_reported(tmp_path: Path) -> None:
    """An error of the thread is not lost, and ends it; leaving without asking waits for nothing."""
    with Flusher([tmp_path / "gone"], keep=True) as flusher, pytest.raises(OSError, match="gone"):
        flusher.result()
    with Flusher([tmp_path / "gone"], keep=True):
        pass


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such advice")
@pytest.mark.parametrize("keep", [True, False])
def test_what_is_on_the_disk_leaves_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    """A file is given up after it was synced, or never."""
    done: list[tuple[str, str]] = []

    def name(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name

    monkeypatch.setattr(os, "fdatasync", lambda fd: done.append(("sync", name(fd))))
    monkeypatch.setattr(
        os,
        "posix_fadvise",
        lambda fd, start, size, advice: done.append((f"{start} {size} {advice}", name(fd))),
    )
    (tmp_path / "a").write_bytes(b"x")
    with Flusher([tmp_path / "a"], keep=keep) as flusher:
        flusher.result()
    drop = [] if keep else [(f"0 0 {os.POSIX_FADV_DONTNEED}", "a")]
    assert done == [("sync", "a"), *drop]
