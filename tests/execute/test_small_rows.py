"""Small rows done together give the bytes that each gives by itself."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkling_cli.errors import CheckpointError, Interrupted
from sparkling_cli.execute import bundle
from sparkling_cli.execute import job as job_module
from sparkling_cli.execute.commit import Staging
from sparkling_cli.execute.job import make_job
from sparkling_cli.execute.worker import Worker
from sparkling_cli.formats.model import OutputFile
from sparkling_cli.formats.torchfile.writer import NewRecord, Slot, lay_out_archive
from sparkling_cli.plan.model import Plan
from sparkling_cli.storage.tensors import ITEM_BYTES, Extent
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
)

#: what mixtures of experts are made of: grown outside, grown inside and scaled, a router, a norm
KINDS = (
    (doubled(6, 0), kept(5, 1)),
    (kept(5, 0), doubled(6, 1, scale=0.5)),
    (kept(4, 0), kept(5, 1)),
    (kept(9, 0),),
    (doubled(3, 0, fill=Fill.ZERO), kept(7, 1)),
    (doubled(4, 0, fill=Fill.RANDOM), kept(3, 1)),
)


def in_a_row(plan: Plan, head: int = 24) -> tuple[OutputFile, ...]:
    """All rows behind each other in one file, as safetensors puts them."""
    at, tensors = head, []
    for row in plan.rows:
        tensors.append((row.key, Extent("out.bin", at, (0,) * len(row.shape), row.shape)))
        at += prod(row.shape) * ITEM_BYTES[row.dtype]
    return (OutputFile("out.bin", at, ((0, b"h" * head),), tuple(tensors), ()),)


def as_archive(plan: Plan) -> tuple[OutputFile, ...]:
    """Every row as a record of a torch archive, with its header before it and its checksum behind it."""
    parts = [NewRecord("head", (b"text",))]
    for i, row in enumerate(plan.rows):
        size = prod(row.shape) * ITEM_BYTES[row.dtype]
        parts.append(NewRecord(f"data/{2 * i}", (Slot(row.key, (0,) * len(row.shape), row.shape, size),)))
        parts.append(NewRecord(f"data/{2 * i + 1}", (b"step",)))  # a literal record between two tensors
    return (lay_out_archive("out.pt", "archive/", parts),)


LAYOUTS: dict[str, Callable[[Plan], tuple[OutputFile, ...]]] = {"row": in_a_row, "archive": as_archive}


@settings(max_examples=80)
@given(
    pattern=st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=40),
    repeats=st.integers(1, 6),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
    room=st.sampled_from([300, 1000, 1 << 20]),
    layout=st.sampled_from(["apart", "row", "archive"]),
)
def test_as_each_by_itself(
    tmp_path_factory: pytest.TempPathFactory,
    pattern: list[int],
    repeats: int,
    dtype: str,
    room: int,
    layout: str,
) -> None:
    """Any sequence of kinds, at any offset, in bundles of any size, against the reference arithmetic."""
    folder = tmp_path_factory.mktemp("bundle")
    kinds = [KINDS[i] for i in pattern * repeats]
    rows = {
        f"t{i}": (random_tensor(dtype, source_shape(view), seed=i), view, {}) for i, view in enumerate(kinds)
    }
    plan, files = raw_plan(folder / "src", rows)
    files = files if layout == "apart" else LAYOUTS[layout](plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "ROOM", room)
        execute(plan, files, folder / "dst", sidecar=no_sidecar, threads=1)
    found = output_bytes(folder / "dst", plan, files)
    for row in plan.rows:
        assert found[row.key] == expected(plan, row, rows[row.key][0]), row.key
    if layout == "archive":
        assert_whole(folder / "dst/out.pt")


def assert_whole(path: Path) -> None:
    """Every record has the checksum that stands behind it and in the directory (by another reader)."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        content = path.read_bytes()
        for info in archive.infolist():
            name, extra = struct.unpack_from("<HH", content, info.header_offset + 26)
            end = info.header_offset + 30 + name + extra + info.file_size
            assert content[end : end + 4] == b"PK\x07\x08"
            assert struct.unpack_from("<I", content, end + 4) == (info.CRC,)


def test_records_of_an_archive_are_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and checksums go with their tensors: a few large writes, not two for every tensor."""
    rows = {f"t{i:03}": (random_tensor("float32", (6, 5), i), KINDS[0], {}) for i in range(200)}
    plan, _ = raw_plan(tmp_path / "src", rows)
    written: list[int] = []
    real = os.pwrite

    def counted(descriptor: int, data: memoryview, offset: int) -> int:
        written.append(len(data))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    execute(plan, as_archive(plan), tmp_path / "dst", sidecar=no_sidecar, threads=1)
    assert_whole(tmp_path / "dst/out.pt")
    assert len(written) < 10
    assert max(written) > 200 * 6 * 5 * 4


def test_what_a_killed_run_wrote_between_tensors_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run takes tensors over by their checksums; what stands between them it writes again."""
    rows = {f"t{i:03}": (random_tensor("float32", (6, 5), i), KINDS[0], {}) for i in range(200)}
    plan, _ = raw_plan(tmp_path / "src", rows)
    monkeypatch.setattr(job_module, "TASK", 5000)
    # as if killed: everything stays but the lock
    monkeypatch.setattr(Staging, "discard", lambda staging: os.close(staging._lock))

    def killed(_: object) -> dict[str, bytes]:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        execute(plan, as_archive(plan), tmp_path / "dst", sidecar=killed, threads=1)
    monkeypatch.undo()
    monkeypatch.setattr(job_module, "TASK", 5000)
    (half,) = tmp_path.rglob("out.pt")
    content = bytearray(half.read_bytes())
    assert content.count(b"PK\x03\x04") == 401
    half.write_bytes(content.replace(b"PK\x03\x04", b"lost"))
    done: list[int] = []
    monkeypatch.setattr(Worker, "run", lambda _, task: done.append(len(task)))
    execute(plan, as_archive(plan), tmp_path / "dst", sidecar=no_sidecar, threads=1)
    assert not done  # nothing was computed again
    assert_whole(tmp_path / "dst/out.pt")


def test_equal_neighbours_are_computed_at_once(tmp_path: Path) -> None:
    """Three kinds in turn: a whole task is one bundle, and each kind of it one group."""
    rows = {}
    for i in range(60):
        view = KINDS[i % 3]
        rows[f"t{i:02}"] = (random_tensor("float32", source_shape(view), i), view, {})
    plan, _ = raw_plan(tmp_path / "src", rows)
    job = make_job(plan, in_a_row(plan))
    together = bundle.gather(job.tasks[0], 0, job)
    assert together is not None
    assert len(together.members) == 60
    assert len(together.stretches) == 1
    assert sorted(len(group) for group in bundle._alike(together.members)) == [20, 20, 20]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_bad_entry_is_found_among_many(tmp_path: Path, dtype: str) -> None:
    """The tensor with the NaN is named, with the number of its bad entries, and no other."""
    rows = {f"t{i:02}": (random_tensor(dtype, (12, 5), i), (kept(12, 0), kept(5, 1)), {}) for i in range(30)}
    rows["t17"][0][3, 2] = float("nan")
    rows["t17"][0][11, 4] = float("inf")
    plan, files = raw_plan(tmp_path / "src", rows)
    with pytest.raises(CheckpointError, match=r"NaN or Inf in 1 tensor\(s\).*: t17 \(2 entries\)"):
        execute(plan, files, tmp_path / "dst", sidecar=no_sidecar)


def spread_out(plan: Plan, gaps: Sequence[int], filler: bytes) -> Plan:
    """The same tensors in the source's file, before each one a gap of so many bytes."""
    path = plan.source.root / "data.bin"
    content, spread, moved = path.read_bytes(), bytearray(), []
    for row, gap in zip(plan.rows, gaps, strict=True):
        (extent,) = row.source.extents
        spread += filler * gap
        place = extent._replace(offset=len(spread))
        moved.append(row._replace(source=row.source._replace(extents=(place,))))
        spread += content[extent.offset : extent.offset + row.source.nbytes]
    path.write_bytes(spread)
    return replace(plan, rows=tuple(moved))


@pytest.mark.parametrize("gaps", [(0, 1, 3), (1, 2, 2), (3, 0, 4), (4, 4, 4)])
@pytest.mark.parametrize("bad", range(3))
def test_one_bad_entry_is_found_between_gaps_of_any_length(
    tmp_path: Path, gaps: tuple[int, ...], bad: int
) -> None:
    """Neighbours that do not lie at whole entries from each other, as in files without alignment."""
    view = (kept(4, 0), kept(24, 1))
    rows = {f"t{i}": (torch.full((4, 24), 0.5), view, {}) for i in range(3)}
    rows[f"t{bad}"][0][2, 0] = float("nan")
    plan, _ = raw_plan(tmp_path / "src", rows)
    files = in_a_row(plan)
    with pytest.raises(CheckpointError, match=rf"NaN or Inf in 1 tensor\(s\).*: t{bad} \(1 entries\)"):
        execute(spread_out(plan, gaps, b"\0"), files, tmp_path / "dst", sidecar=no_sidecar)


@pytest.mark.parametrize("gap", [12, 5])
def test_bytes_between_neighbours_do_not_matter(tmp_path: Path, gap: int) -> None:
    """A gap in the source that reads as NaN, and one that is no whole number of entries, are no finding."""
    assert torch.frombuffer(bytearray(b"\xff" * 4), dtype=torch.float32).isnan().all()
    rows = {f"t{i}": (random_tensor("float32", (4, 4), i), (kept(4, 0), kept(4, 1)), {}) for i in range(6)}
    plan, _ = raw_plan(tmp_path / "src", rows)
    files = in_a_row(plan)
    execute(spread_out(plan, [gap] * 6, b"\xff"), files, tmp_path / "dst", sidecar=no_sidecar)
    found = output_bytes(tmp_path / "dst", plan, files)
    for row in plan.rows:
        assert found[row.key] == expected(plan, row, rows[row.key][0])


def test_one_alone_is_no_bundle(tmp_path: Path) -> None:
    """A lone small row is done by itself."""
    view = KINDS[0]
    plan, _ = raw_plan(tmp_path / "src", {"t": (random_tensor("float32", source_shape(view), 0), view, {})})
    job = make_job(plan, in_a_row(plan))
    assert bundle.gather(job.tasks[0], 0, job) is None
