"""Small rows done together give the bytes that each gives by itself."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from engine_support import (
    doubled,
    expected,
    kept,
    no_sidecar,
    output_bytes,
    random_tensor,
    raw_plan,
    source_shape,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkling_cli.checkpoint.model import ITEM_BYTES, Extent, OutputFile
from sparkling_cli.errors import CheckpointError
from sparkling_cli.execute import bundle
from sparkling_cli.execute.job import make_job
from sparkling_cli.execute.stream import execute
from sparkling_cli.layout.geometry import Fill
from sparkling_cli.plan.model import Plan

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


@settings(deadline=None, max_examples=80)
@given(
    pattern=st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=40),
    repeats=st.integers(1, 6),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
    room=st.sampled_from([300, 1000, 1 << 20]),
    apart=st.booleans(),
)
def test_as_each_by_itself(
    tmp_path_factory: pytest.TempPathFactory,
    pattern: list[int],
    repeats: int,
    dtype: str,
    room: int,
    apart: bool,
) -> None:
    """Any sequence of kinds, at any offset, in bundles of any size, against the reference arithmetic."""
    folder = tmp_path_factory.mktemp("bundle")
    kinds = [KINDS[i] for i in pattern * repeats]
    rows = {
        f"t{i}": (random_tensor(dtype, source_shape(view), seed=i), view, {}) for i, view in enumerate(kinds)
    }
    plan, files = raw_plan(folder / "src", rows)
    files = files if apart else in_a_row(plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "ROOM", room)
        execute(plan, files, folder / "dst", sidecar=no_sidecar, threads=1)
    found = output_bytes(folder / "dst", plan, files)
    for row in plan.rows:
        assert found[row.key] == expected(plan, row, rows[row.key][0]), row.key


def test_equal_neighbours_are_computed_at_once(tmp_path: Path) -> None:
    """Three kinds in turn: a whole task is one bundle, and each kind of it one group."""
    rows = {}
    for i in range(60):
        view = KINDS[i % 3]
        rows[f"t{i:02}"] = (random_tensor("float32", source_shape(view), i), view, {})
    plan, _ = raw_plan(tmp_path / "src", rows)
    job = make_job(plan, in_a_row(plan))
    together = bundle.gather(job.tasks[0], 0, job.rows)
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


@pytest.mark.parametrize("gap", [12, 5])
def test_bytes_between_neighbours_do_not_matter(tmp_path: Path, gap: int) -> None:
    """A gap in the source that reads as NaN, and one that is no whole number of entries, are no finding."""
    assert torch.frombuffer(bytearray(b"\xff" * 4), dtype=torch.float32).isnan().all()
    rows = {f"t{i}": (random_tensor("float32", (4, 4), i), (kept(4, 0), kept(4, 1)), {}) for i in range(6)}
    plan, _ = raw_plan(tmp_path / "src", rows)
    files = in_a_row(plan)
    content = (tmp_path / "src/data.bin").read_bytes()
    spread, moved = bytearray(), []
    for row in plan.rows:
        assert row.source is not None
        (extent,) = row.source.extents
        spread += b"\xff" * gap
        place = extent._replace(offset=len(spread))
        moved.append(row._replace(source=row.source._replace(extents=(place,))))
        spread += content[extent.offset : extent.offset + 64]
    (tmp_path / "src/data.bin").write_bytes(spread)
    execute(replace(plan, rows=tuple(moved)), files, tmp_path / "dst", sidecar=no_sidecar)
    found = output_bytes(tmp_path / "dst", plan, files)
    for row in plan.rows:
        assert found[row.key] == expected(plan, row, rows[row.key][0])


def test_one_alone_is_no_bundle(tmp_path: Path) -> None:
    """A lone small row is done by itself."""
    view = KINDS[0]
    plan, _ = raw_plan(tmp_path / "src", {"t": (random_tensor("float32", source_shape(view), 0), view, {})})
    job = make_job(plan, in_a_row(plan))
    assert bundle.gather(job.tasks[0], 0, job.rows) is None
