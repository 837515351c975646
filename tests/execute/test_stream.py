"""Whole runs over raw checkpoints: bytes, checksums, digests, order, refusals."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest
import torch

from sparkling_cli.errors import CheckpointError, OutputError
from sparkling_cli.execute import job as job_module
from sparkling_cli.execute import output_files
from sparkling_cli.execute.commit import partial_of
from sparkling_cli.formats.model import OutputFile
from sparkling_cli.plan.model import Plan
from sparkling_cli.storage.crc import FileDigest
from sparkling_cli.storage.sidecar import sidecar_root
from sparkling_cli.storage.tensors import Extent, StoredTensor
from sparkling_cli.widening.geometry import Fill
from tests.execute.engine_support import (
    doubled,
    execute,
    expected,
    kept,
    no_sidecar,
    output_bytes,
    random_tensor,
    raw_plan,
    source_shape,
    to_bytes,
)
from tests.widening.whole import widen_tensor


def tensors() -> dict[str, tuple[torch.Tensor, tuple, dict[str, object]]]:  # type: ignore[type-arg]
    """A few rows of every kind: copied, scaled, random, zero fill, dropped, scalar, empty."""
    views = {
        "copied": ((kept(700, 0), kept(300, 1)), {}),
        "fan_out": ((doubled(400, 0), kept(500, 1)), {}),
        "fan_in": ((kept(500, 0), doubled(400, 1, scale=0.5)), {}),
        "both": ((doubled(300, 0), doubled(200, 1, scale=0.7)), {"scale": 1.5, "offset": 0.25}),
        "random": ((doubled(300, 0, fill=Fill.RANDOM), doubled(250, 1, scale=0.7)), {}),
        "moments": ((doubled(300, 0, fill=Fill.ZERO), doubled(250, 1, fill=Fill.ZERO)), {}),
        "dropped": ((doubled(30, 0), kept(20, 1)), {"zero": True}),
        "step": ((), {}),
        "empty": ((kept(0, 0), kept(4, 1)), {}),
        "small": ((doubled(3, 0),), {}),
    }
    return {
        key: (random_tensor("float32", source_shape(view), i), view, options)
        for i, (key, (view, options)) in enumerate(views.items())
    }


@pytest.mark.parametrize("threads", [1, 3])
def test_bytes_checksums_digests(tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor has the reference's bytes; every CRC is what zlib says of the bytes on disk."""
    monkeypatch.setattr(job_module, "TASK", 300_000)
    rows = tensors()
    plan, files = raw_plan(tmp_path / "src", rows, carried={"x/c.txt": b"carried", "d": b""}, seed=4)
    seen: list[int] = []
    written = execute(
        plan, files, tmp_path / "dst", threads=threads, sidecar=no_sidecar, progress=seen.append
    )
    found = output_bytes(tmp_path / "dst", plan, files)
    for row in plan.rows:
        assert found[row.key] == expected(plan, row, rows[row.key][0]), row.key
        assert written.tensors[row.key] == crc32(found[row.key])
        if not row.recipe.zero:
            assert written.sources[row.key] == crc32(to_bytes(rows[row.key][0]))
    assert "dropped" not in written.sources
    on_disk = {
        p.relative_to(tmp_path / "dst").as_posix() for p in (tmp_path / "dst").rglob("*") if p.is_file()
    }
    assert on_disk == {*written.files, "sparkling/manifest.json", "sparkling/files.crc32"}
    for path, digest in written.files.items():
        content = (tmp_path / "dst" / path).read_bytes()
        assert (digest.bytes, digest.crc32) == (len(content), crc32(content)), path
    for file in files:
        content = (tmp_path / "dst" / file.path).read_bytes()
        for checksum in file.checksums:
            value = crc32(content[checksum.start : checksum.stop]).to_bytes(4, "little")
            assert all(content[at : at + 4] == value for at in checksum.at)
    assert sum(seen) == sum(len(data) for data in found.values()) + len(b"carried")
    assert not partial_of(tmp_path / "dst").exists()


def test_same_bytes_whatever_the_threads_and_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, tasks and memory change nothing in the output."""
    plan, files = raw_plan(tmp_path / "src", tensors(), seed=4)
    execute(plan, files, tmp_path / "a", threads=1, sidecar=no_sidecar)
    monkeypatch.setattr(job_module, "TASK", 100_000)
    execute(plan, files, tmp_path / "b", threads=4, memory=1 << 24, sidecar=no_sidecar)
    for path in ("sub/a.bin", "b.bin", "sparkling/manifest.json", "sparkling/files.crc32"):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def sharded(
    tensor: torch.Tensor, folder: Path, cuts: list[tuple[slice, ...]], transposed: bool
) -> StoredTensor:
    """A tensor stored as boxes, one file each, maybe with transposed storage."""
    extents = []
    for number, cut in enumerate(cuts):
        box = tensor[cut]
        start = tuple(s.start for s in cut)
        stored = box.permute(*reversed(range(box.ndim))) if transposed else box
        (folder / f"part{number}").write_bytes(b"abc" + to_bytes(stored))
        strides = tuple(reversed(stored.contiguous().stride())) if transposed else None
        extents.append(Extent(f"part{number}", 3, start, tuple(box.shape), strides))
    return StoredTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tuple(extents))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_boxes_of_source_and_target(tmp_path: Path, dim: int, transposed: bool) -> None:
    """Source and target in unequal boxes along any dim, also transposed in their files."""
    tensor = random_tensor("float32", (7, 6, 50), 1)
    view = (kept(7, 0), doubled(6, 1), doubled(50, 2, scale=0.5))
    plan, _ = raw_plan(tmp_path / "src", {"w": (tensor, view, {})})
    whole = [slice(0, n) for n in tensor.shape]
    cut = tensor.shape[dim] * 2 // 3
    low, high = list(whole), list(whole)
    low[dim], high[dim] = slice(0, cut), slice(cut, tensor.shape[dim])
    stored = sharded(tensor, tmp_path / "src", [tuple(low), tuple(high)], transposed)
    row = plan.rows[0]._replace(source=stored)
    plan = replace(plan, rows=(row,))
    files, boxes = [], []
    for number, (start, stop) in enumerate(((0, 1), (1, row.shape[dim]))):
        at, shape = [0, 0, 0], list(row.shape)
        at[dim], shape[dim] = start, stop - start
        strides = (1, shape[0], shape[0] * shape[1]) if transposed else None
        extent = Extent("", 9, tuple(at), tuple(shape), strides)
        size = 9 + 4 * shape[0] * shape[1] * shape[2] + 2
        files.append(OutputFile(f"o{number}", size, ((0, b"123456789"),), (("w", extent),)))
        boxes.append(tuple(slice(a, a + n) for a, n in zip(at, shape, strict=True)))
    written = execute(plan, tuple(files), tmp_path / "dst", sidecar=no_sidecar)
    wide = widen_tensor(tensor, view)
    assert written.tensors["w"] == crc32(to_bytes(wide))
    for file, box in zip(files, boxes, strict=True):
        content = (tmp_path / "dst" / file.path).read_bytes()
        stored_box = wide[box].permute(2, 1, 0) if transposed else wide[box]
        assert content[9:-2] == to_bytes(stored_box)
        assert written.files[file.path].crc32 == crc32(content)


def test_single_file(tmp_path: Path) -> None:
    """A single-file output has its small files in a folder beside it."""
    plan, files = raw_plan(tmp_path / "src", {"w": (random_tensor("float32", (4,), 0), (doubled(4, 0),), {})})
    source = replace(plan.source, root=tmp_path / "src" / "data.bin")
    row = plan.rows[0]
    extents = tuple(e._replace(path="") for e in row.source.extents)
    plan = replace(plan, source=source, rows=(row._replace(source=row.source._replace(extents=extents)),))
    single = (replace(files[0], path=""),)
    execute(plan, single, tmp_path / "out.pt", sidecar=no_sidecar)
    assert (tmp_path / "out.pt").is_file()
    assert (sidecar_root(tmp_path / "out.pt", True) / "sparkling" / "manifest.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.pt", "out.pt.sparkling", "src"]


def simple(tmp_path: Path, **options: object) -> tuple[Plan, tuple[OutputFile, ...]]:
    """One small row."""
    tensor = random_tensor("float32", (40, 30), 0)
    rows = {"w": (tensor, (doubled(40, 0), kept(30, 1)), {})}
    return raw_plan(tmp_path / "src", rows, **options)  # type: ignore[arg-type]


def digest(folder: Path) -> dict[str, bytes]:
    """Content of every file."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_refused_places(tmp_path: Path) -> None:
    """An existing output, one inside the source, a file as its parent, a dangling link, an odd name."""
    plan, files = simple(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "srclink").symlink_to(tmp_path / "src")
    before = digest(tmp_path)
    for place, word in (
        (tmp_path / "there", "exists"),
        (tmp_path / "link", "exists"),
        (tmp_path / "src", "inside the source"),
        (tmp_path / "src" / "out", "inside the source"),
        (tmp_path / "srclink" / "out", "inside the source"),
        (tmp_path / "link" / "out", "no folder|not a folder"),
        (tmp_path / "src" / "data.bin" / "out", "no folder|not a folder|inside"),
        (tmp_path / "there" / "..", "no name"),
    ):
        with pytest.raises(OutputError, match=word):
            execute(plan, files, place, sidecar=no_sidecar)
    assert digest(tmp_path) == before


def test_missing_parents_are_made(tmp_path: Path) -> None:
    """The folders above the output come with it, and go again where it does not come."""
    plan, files = simple(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def failing(_: object) -> dict[str, bytes]:
        assert (tmp_path / "new" / "deep").is_dir()
        raise OutputError("no small files")

    with pytest.raises(OutputError, match="no small files"):
        execute(plan, files, tmp_path / "new" / "deep" / "out", sidecar=failing)
    assert sorted(tmp_path.rglob("*")) == before
    execute(plan, files, tmp_path / "new" / "deep" / "out", sidecar=no_sidecar)
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_parent(tmp_path: Path) -> None:
    """A parent folder without write permission is an error before any work."""
    plan, files = simple(tmp_path)
    (tmp_path / "ro").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="cannot be written"):
        execute(plan, files, tmp_path / "ro" / "out", sidecar=no_sidecar)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"another"])
def test_a_damaged_plan_in_a_folder_that_was_left(tmp_path: Path, content: bytes) -> None:
    """It is no plan of this run, whatever its bytes are: everything is made afresh."""
    plan, files = simple(tmp_path)
    partial = partial_of(tmp_path / "dst")
    partial.mkdir()
    (partial / "plan").write_bytes(content)
    execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("left", [False, True])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool) -> None:
    """The message says so; what was there stays, what was made goes, and no file is left open."""
    plan, files = simple(tmp_path)
    partial = partial_of(tmp_path / "new" / "dst")
    if left:
        partial.mkdir(parents=True)
        (partial / "plan").write_bytes(b"another")

    def without(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", without)
    open_files = len([*Path("/proc/self/fd").iterdir()])
    with pytest.raises(OutputError, match=r"cannot lock .*: Function not implemented") as caught:
        execute(plan, files, tmp_path / "new" / "dst", sidecar=no_sidecar)
    assert "flock" in str(caught.value.hint)
    assert len([*Path("/proc/self/fd").iterdir()]) == open_files
    assert (tmp_path / "new").exists() is (partial / "plan").exists() is left


@pytest.mark.parametrize("when", ["before", "at a failing write"])
def test_a_carried_file_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """It is named where it is the fault; where a write fails, that is said."""
    plan, files = simple(tmp_path, carried={"c.txt": b"carried"})

    def failing(*_: object) -> int:
        (tmp_path / "src" / "c.txt").unlink(missing_ok=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "before":
        (tmp_path / "src" / "c.txt").unlink()
        expected: tuple[type[Exception], str] = (CheckpointError, r"cannot read .*c\.txt: No such file")
    else:
        monkeypatch.setattr(os, "pwrite", failing)
        expected = (OutputError, r"cannot write .*\.bin: No space left on device\n")
    with pytest.raises(expected[0], match=expected[1]):
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_symlink_in_the_way_of_the_partial_folder(tmp_path: Path) -> None:
    """A link planted where the output is made is refused, and what it points to is untouched."""
    plan, files = simple(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "plan").write_text("mine")
    partial_of(tmp_path / "dst").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="in the way"):
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert (tmp_path / "precious" / "plan").read_text() == "mine"


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil"])
def test_paths_that_leave_the_output(tmp_path: Path, path: str) -> None:
    """A format that names a file outside the output is not followed."""
    plan, files = simple(tmp_path)
    bad = tuple(replace(file, path=path) if file.tensors else file for file in files)
    with pytest.raises(CheckpointError, match="outside itself"):
        execute(plan, bad, tmp_path / "dst", sidecar=no_sidecar)
    with pytest.raises(CheckpointError, match="outside itself"):
        carried = replace(plan, source=replace(plan.source, carried=(path,)))
        execute(carried, files, tmp_path / "dst", sidecar=no_sidecar)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_truncated_source(tmp_path: Path) -> None:
    """A source file that ends early is named, and nothing is left."""
    plan, files = simple(tmp_path)
    (tmp_path / "src" / "data.bin").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=r"data\.bin ends at byte"):
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_nonfinite_is_refused_unless_allowed(tmp_path: Path) -> None:
    """NaN or Inf stops the run and names every tensor; the option lets it pass."""
    bad = torch.ones(40, 30)
    bad[3, 4] = float("nan")
    rows = {
        "good": (torch.ones(40, 30), (doubled(40, 0), kept(30, 1)), {}),
        "bad": (bad, (doubled(40, 0), kept(30, 1)), {}),
    }
    plan, files = raw_plan(tmp_path / "src", rows)
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\).*bad \(1 entries\)"):
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]
    plan = replace(plan, spec=plan.spec.model_copy(update={"allow_nonfinite": True}))
    execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    found = output_bytes(tmp_path / "dst", plan, files)["bad"]
    assert found == to_bytes(torch.cat([bad, bad]))


@pytest.mark.parametrize("where", ["sidecar", "check"])
def test_failure_before_the_commit(tmp_path: Path, where: str) -> None:
    """Whatever fails last leaves nothing."""
    plan, files = simple(tmp_path)

    def fail(_: object) -> dict[str, bytes]:
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        execute(
            plan,
            files,
            tmp_path / "dst",
            sidecar=fail if where == "sidecar" else no_sidecar,
            check=None if where == "sidecar" else fail,  # type: ignore[arg-type]
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_source_changed_meanwhile(tmp_path: Path) -> None:
    """A source that a training run writes into while it is read is no source."""
    plan, files = simple(tmp_path)

    def touch(_: int) -> None:
        os.utime(tmp_path / "src" / "data.bin", ns=(1, 1))

    with pytest.raises(CheckpointError, match="was changed while"):
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar, progress=touch)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_carried_file_changed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that changes when the tensors are done, before or after its own turn, is seen too."""
    plan, files = simple(tmp_path, carried={"c.txt": b"before", "d.txt": b"before"})
    real = output_files.copy_carried

    def changing(source: Path, target: Path) -> FileDigest:
        (tmp_path / "src" / "c.txt").write_bytes(b"after it")
        return real(source, target)

    monkeypatch.setattr(output_files, "copy_carried", changing)
    with pytest.raises(CheckpointError, match="was changed while"):
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_digest_of_a_carried_file_is_of_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of the source between reading and writing; a file of several pieces too."""
    source, target = tmp_path / "c.src", tmp_path / "c.dst"
    source.write_bytes(bytes(range(256)) * 5000)

    def changing(data: bytes) -> int:
        found = crc32(data)
        source.write_bytes(b"y" * 1_280_000)
        return found

    monkeypatch.setattr(output_files, "crc32", changing)
    digest = output_files.copy_carried(source, target)
    assert digest == FileDigest(1_280_000, crc32(target.read_bytes()))


def test_output_with_a_hole_in_it(tmp_path: Path) -> None:
    """Output boxes that do not tile a tensor are a fault that is seen before anything is written."""
    plan, files = simple(tmp_path)
    key, extent = files[0].tensors[0]
    broken = replace(files[0], tensors=((key, extent._replace(shape=(79, 30))),))
    with pytest.raises(CheckpointError, match="entries"):
        execute(plan, (broken, files[1]), tmp_path / "dst", sidecar=no_sidecar)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]
