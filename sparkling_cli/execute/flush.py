"""Bringing what is written to the disk while more is being written, and out of the page cache.

Left to itself, the page cache takes it all in and the disk idles until the last ``fsync``, which then takes
as long as everything before it. A thread that syncs now and then keeps both busy. An output that is larger
than the memory budget is not kept in the page cache either: what is on the disk makes room for what comes,
which spares the caches of others, and a virtual machine the memory that it would have to fetch.

On every host one rank brings that host's pages to the disk: another host cannot do it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

#: bytes between two rounds
_STEP = 1 << 27


class Flusher:
    """A thread that syncs files in the background; a context manager that ends it.

    Order of calls: ``wrote`` any number of times, ``finish``, ``result``.

    Args:
        paths: files that are being written; they exist.
        keep: leave what was written in the page cache.
    """

    def __init__(self, paths: Iterable[Path], *, keep: bool) -> None:
        self._paths = list(paths) if hasattr(os, "fdatasync") else []
        self._keep = keep or not hasattr(os, "posix_fadvise")
        self._written = 0
        self._wanted, self._over = threading.Event(), threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Flusher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._paths = []
        self.finish()
        self._thread.join()

    def wrote(self, size: int) -> None:
        """So many bytes more were written, somewhere in the files."""
        self._written += size
        if self._written >= _STEP:
            self._written = 0
            self._wanted.set()

    def finish(self) -> None:
        """The bulk is written: the last round begins."""
        self._over.set()
        self._wanted.set()

    def result(self) -> None:
        """Wait for the last round.

        Raises:
            OSError: the disk failed; names the file. The system tells a failure once, so it must not be
                lost here.
        """
        self.finish()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        over = False
        seen: dict[Path, int] = {}
        while not over:
            self._wanted.wait()
            self._wanted.clear()
            over = self._over.is_set()
            for path in self._paths:
                try:
                    changed = path.stat().st_mtime_ns
                    if over or seen.get(path) != changed:
                        seen[path] = changed
                        _sync(path, self._keep)
                except OSError as error:
                    self._error = OSError(error.errno, error.strerror, str(path))
                    return


def _sync(path: Path, keep: bool) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        if not keep:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
