"""All or nothing: an output is made beside its final name and appears by one rename.

``.NAME.sparkling-partial/`` beside the target holds ``lock`` (held while a process works on it),
``plan`` (fingerprint of what is being made), ``journal-RANK`` (finished tasks) and ``data/NAME`` (the
output in the making; of a single file, its small files in ``sidecars``). A killed run leaves it behind;
the next run for the same target takes it over: it goes on where the fingerprint is the same, and starts
afresh otherwise.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sparkling_cli.errors import OutputError
from sparkling_cli.execute.signals import held
from sparkling_cli.storage.sidecar import sidecar_root

_SUFFIX = ".sparkling-partial"


def partial_of(destination: Path) -> Path:
    """Where an output is made before it appears."""
    name = destination.name
    if len(os.fsencode(name)) > 200:  # names need not be valid UTF-8
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return destination.with_name(f".{name}{_SUFFIX}")


def in_the_making(path: Path) -> bool:
    """Whether it lies where an output is made, to which it has not been given its name."""
    return any(parent.name.endswith(_SUFFIX) for parent in path.absolute().parents)


def standing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def check_destination(source: Path, destination: Path) -> Path:
    """The destination with its parent resolved, if an output may appear there.

    Folders above it that do not exist are made later, with the output.

    Raises:
        OutputError: it exists, lies inside the source (or the source inside it), or in what is no folder or
            one that cannot be written.
    """
    if destination.name in ("", ".", ".."):
        raise OutputError(f"{destination} is no name for an output", hint="give a new name")
    parent = destination.parent
    try:
        real = parent.resolve() / destination.name
        origin = source.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{parent} is no folder that an output can be put into: {error}") from error
    for base in (standing(parent), standing(real.parent)):  # the first may be a link that leads nowhere
        if not base.is_dir():
            raise OutputError(f"{base} is not a folder", hint="choose a place in a folder, or beside it")
    if real == origin or origin in real.parents:
        raise OutputError(
            f"the output {destination} lies inside the source {source}", hint="choose a place beside it"
        )
    if os.path.lexists(real):
        raise OutputError(
            f"{destination} exists", hint="choose another name, or remove it; nothing is overwritten"
        )
    if not os.access(base, os.W_OK | os.X_OK):
        raise OutputError(f"{base} cannot be written to", hint="check its permissions")
    return real


class Staging:
    """The folder that an output is made in, locked.

    Methods are called in this order: ``begin``, (the work in ``data``), ``commit`` or ``discard``.

    Args:
        source: the checkpoint that is read.
        destination: where the output shall appear.
        is_file: the output is a single file.
    """

    def __init__(self, source: Path, destination: Path, *, is_file: bool) -> None:
        self.destination = check_destination(source, destination)
        self.is_file = is_file
        self.partial = partial_of(self.destination)
        self._lock: int | None = None
        self._made: list[Path] = []

    @property
    def data(self) -> Path:
        """Root of the output in the making: a folder, or the single file."""
        return self.partial / "data" / self.destination.name

    @property
    def sidecars(self) -> Path:
        """The folder that becomes :func:`sidecar_root`."""
        return self.partial / "sidecars" if self.is_file else self.data

    def journal(self, rank: int) -> Path:
        """The tasks that a rank has finished."""
        return self.partial / f"journal-{rank}"

    def journals(self) -> list[Path]:
        """Every rank's, of a run that may have had another number of ranks."""
        return sorted(self.partial.glob("journal-*"))

    def begin(self, fingerprint: str) -> bool:
        """Take the folder; True if an earlier run left work in it that can be gone on with.

        Raises:
            OutputError: another process works on it, or it is not ours.
        """
        try:
            with held():
                self._make_parents()
                self._acquire()
            self._undo_half_commit()
            plan = self.partial / "plan"
            if plan.is_file() and not plan.is_symlink() and plan.read_bytes() == fingerprint.encode():
                return True
            self.restart(fingerprint)
        except OSError as error:
            if self._lock is None:
                with suppress(OSError):  # it was not made, or another process has begun in it
                    self.partial.rmdir()
            raise OutputError(
                f"cannot make {self.partial}: {error.strerror}",
                hint="check the folder's permissions, and the room on its disk",
            ) from error
        return False

    def restart(self, fingerprint: str) -> None:
        """Throw away what an earlier run left."""
        self._clear()
        (self.partial / "data").mkdir()
        write_new(self.partial / "plan", fingerprint.encode())

    def _make_parents(self) -> None:
        """The folders above the output; those that are new go again if the output does not come."""
        missing = []
        folder = self.destination.parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)

    def _acquire(self) -> None:
        while True:
            if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
                raise OutputError(f"{self.partial} is in the way", hint="remove it")
            made = not self.partial.exists()
            self.partial.mkdir(mode=0o777, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            try:
                lock = os.open(self.partial / "lock", flags, 0o666)
            except FileNotFoundError:
                continue  # the run that held it has just finished
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                raise OutputError(
                    f"another process is writing {self.destination}",
                    hint="wait for it, or end it and run the command again",
                ) from error
            except OSError as error:
                os.close(lock)
                if made:
                    with suppress(OSError):
                        (self.partial / "lock").unlink()
                        self.partial.rmdir()
                raise OutputError(
                    f"cannot lock {self.partial / 'lock'}: {error.strerror}",
                    hint="choose a place on a file system that has file locks (flock), such as a local disk; "
                    "Lustre has them where it is mounted with -o flock",
                ) from error
            if self._is_current(lock):
                self._lock = lock
                return
            os.close(lock)

    def _is_current(self, lock: int) -> bool:
        try:
            found = (self.partial / "lock").stat(follow_symlinks=False)
        except FileNotFoundError:
            return False
        mine = os.fstat(lock)
        return stat.S_ISREG(found.st_mode) and (found.st_ino, found.st_dev) == (mine.st_ino, mine.st_dev)

    def _undo_half_commit(self) -> None:
        """A run that died between two renames left a folder whose file never came."""
        folder, mark = sidecar_root(self.destination, True), self.partial / "commit"
        if self.is_file and os.path.lexists(folder):
            if not mark.exists():
                raise OutputError(f"{folder} exists", hint="remove it, or choose another name")
            shutil.rmtree(folder)
        mark.unlink(missing_ok=True)

    def _clear(self) -> None:
        for entry in self.partial.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def commit(self) -> None:
        """Make the output appear. All its files must be written; they are synced here.

        Raises:
            OutputError: something took its name meanwhile.
            OSError: the disk failed; nothing has appeared.
        """
        folder = sidecar_root(self.destination, self.is_file)
        for path in {self.destination, folder}:
            if os.path.lexists(path):
                raise OutputError(f"{path} appeared while the output was made; nothing is overwritten")
        if self.is_file:
            write_new(self.partial / "commit", b"")
            sync(self.partial)
        moves = [(self.sidecars, folder)] if self.is_file and self.sidecars.is_dir() else []
        moved: list[tuple[Path, Path]] = []
        try:
            for move in (*moves, (self.data, self.destination)):
                move[0].rename(move[1])
                moved.append(move)
            for folder in (self.destination.parent, *(made.parent for made in reversed(self._made))):
                sync(folder)
        except OSError:
            for origin, target in reversed(moved):
                with suppress(OSError):
                    target.rename(origin)
            raise
        self.discard()

    def discard(self) -> None:
        """Remove the folder, whatever is in it, and empty folders that were made for it."""
        with held():
            if self._lock is not None:
                shutil.rmtree(self.partial, ignore_errors=True)
                os.close(self._lock)
                self._lock = None
            while self._made:
                with suppress(OSError):  # something is in it: the output, or what others put there
                    self._made.pop().rmdir()


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet; its folder does.

    Raises:
        OSError: it exists, if only as a link, or cannot be written.
    """
    with path.open("xb") as file:
        file.write(content)


def replace_files(root: Path, files: Mapping[str, bytes]) -> None:
    """Put new small files in the place of those of an output that exists, all of them or none.

    Args:
        root: the folder that the paths begin at.
        files: path -> content.

    Raises:
        OutputError: they cannot be written.
    """
    new = {root / path: (root / path).with_name(f".{Path(path).name}.new") for path in files}
    with held():
        try:
            for name, content in files.items():
                written = new[root / name]
                written.unlink(missing_ok=True)
                write_new(written, content)
                sync(written)
            for path, written in new.items():
                written.replace(path)
            for folder in {path.parent for path in new}:
                sync(folder)
        except OSError as error:
            for written in new.values():
                written.unlink(missing_ok=True)
            raise OutputError(
                f"cannot write {error.filename or root}: {error.strerror}",
                hint="check the folder's permissions, and the room on its disk",
            ) from error


def sync(path: Path) -> None:
    """Bring a file or a folder's entries to the disk.

    Raises:
        OSError: the disk failed; names the path.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
