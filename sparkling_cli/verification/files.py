"""Files of an output: all there, none extra, and their bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sparkling_cli.errors import CheckpointError
from sparkling_cli.execute.output_files import digests_text
from sparkling_cli.manifest import Manifest
from sparkling_cli.storage.crc import FileDigest, Span, crc32

#: a range of a file that one task reads
_TASK = 1 << 25
#: kinds of files that people and loggers leave beside a checkpoint, and that nothing loads
_REMARKS = frozenset({".txt", ".md", ".log", ".out", ".csv", ".png", ".svg", ".pdf", ".html"})


@dataclass
class FileList:
    """Files to be read, what is already wrong, and files that were not written with the output.

    ``unwritten`` could be taken for a part of the checkpoint, ``extras`` could not.
    """

    checks: dict[str, FileDigest] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)


def check_small_files(sidecars: Path, digests: str, manifest: str) -> list[str]:
    """Whether the small files, the manifest first, are as written; the list of them guards itself.

    Args:
        sidecars: the folder that ``sparkling/...`` lies in.
        digests: path of the list.
        manifest: path of the manifest, which must be in it.
    """
    try:
        content = (sidecars / digests).read_bytes()
    except OSError as error:
        return [f"{digests} cannot be read: {error.strerror}"]
    body, _, last = content.removesuffix(b"\n").rpartition(b"\n")
    body += b"\n"
    if not content.endswith(b"\n") or last != b"%08x %d ." % (crc32(body), len(body)):
        return [f"{digests} was changed"]
    faults, seen = [], set()
    for line in body.decode(errors="replace").splitlines():
        crc, size, path = line.split(" ", 2)
        seen.add(path)
        try:
            found = (sidecars / path).read_bytes()
        except OSError as error:
            faults.append(f"{path} cannot be read: {error.strerror}")
            continue
        if len(found) != int(size) or crc32(found) != int(crc, 16):
            faults.append(f"{path} was changed")
    if manifest not in seen:
        faults.append(f"{digests} does not name {manifest}")
    return faults


def with_digests(content: bytes, changed: Mapping[str, bytes]) -> bytes:
    """The list of digests with other contents of some files; files that it lacks are added."""
    found = {}
    for line in content.decode(errors="replace").splitlines()[:-1]:
        crc, size, path = line.split(" ", 2)
        found[path] = FileDigest(int(size), int(crc, 16))
    return digests_text({**found, **{path: FileDigest.of(b) for path, b in changed.items()}})


def list_files(output: Path, sidecars: Path, manifest: Manifest, skip: Collection[str]) -> FileList:
    """Compare the files that are there with those that were written, by name and size.

    Args:
        output: a folder or a single file.
        sidecars: the folder that ``sparkling/...`` lies in.
        manifest: of the output.
        skip: small files that were looked at already.
    """
    found = FileList()
    there = _files_under(sidecars)
    if sidecars != output:
        there[""] = output
    for path, entry in manifest.files.items():
        here = there.pop(path, None)
        if path in skip:
            continue
        if here is None:
            found.faults.append(f"{path} is missing")
        elif here.is_symlink() or not here.is_file():
            found.faults.append(f"{path} is not a file of its own")
        elif here.stat().st_size != entry.bytes:
            size = here.stat().st_size
            found.faults.append(f"{path or output.name} has {size:,} bytes, {entry.bytes:,} were written")
        else:
            found.checks[path] = entry
    ours = {PurePosixPath(path).parts[0] for path in manifest.files if "/" in path} | {"sparkling"}
    for path in sorted(there):
        if path not in skip:
            harmless = _harmless(there[path], PurePosixPath(path), ours)
            (found.extras if harmless else found.unwritten).append(path)
    return found


def _harmless(file: Path, path: PurePosixPath, ours: Collection[str]) -> bool:
    """Whether no loader of checkpoints takes the file for a part of this one.

    What lies in a folder of its own, such as a later run's output, is not ours; beside our files only
    kinds that hold remarks and pictures are certain.
    """
    if file.is_symlink():
        return False
    return path.parts[0] not in ours if len(path.parts) > 1 else path.suffix.lower() in _REMARKS


def _files_under(root: Path) -> dict[str, Path]:
    return {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def gaps(used: list[tuple[int, int]], size: int) -> list[Span] | None:
    """Ranges of a file that are in none of the used ones, cut into tasks; None if those overlap."""
    found: list[Span] = []
    at = 0
    for start, stop in [*sorted(used), (size, size)]:
        if start < at or stop > size:
            return None
        for low in range(at, start, _TASK):
            found.append(Span(low, min(_TASK, start - low), 0))
        at = stop
    return found


def file_size(path: Path) -> int:
    """Size of a file.

    Raises:
        CheckpointError: it is not there.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
