"""Arrays in NumPy files beside a checkpoint are tensors of it like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sparkling_cli.api import make_plan
from sparkling_cli.errors import CheckpointError
from sparkling_cli.spec.sources import make_spec

#: of the bundled checkpoint
SPEC = make_spec({"axes": [{"axis": "ffn", "factor": 2}]}, "test")


@pytest.fixture
def source(dense_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint that files can be put into."""
    return Path(shutil.copytree(dense_checkpoint, tmp_path / "source"))


def growing(source: Path) -> tuple[int, ...]:
    """The shape of a weight that grows with ffn."""
    rows = make_plan(source, spec=SPEC).plan.rows
    return next(row.source.shape for row in rows if not row.slot and "up_proj" in row.name)


@pytest.mark.parametrize("form", ["as it is", "transposed", "stacked", "in a row"])
@pytest.mark.parametrize("name", ["ema.npy", "average/ema.npz"])
def test_arrays_that_would_stay_narrow_are_refused(source: Path, name: str, form: str) -> None:
    """By name, with an option that carries them all the same."""
    shape = growing(source)
    array = np.zeros(shape, np.float32)
    array = {
        "as it is": array, "transposed": array.T.copy(), "stacked": array[None].repeat(3, 0),
        "in a row": array.reshape(-1),
    }[form]  # fmt: skip
    path = source / name
    path.parent.mkdir(exist_ok=True)
    np.save(path, array) if path.suffix == ".npy" else np.savez(path, ema=array)
    with pytest.raises(CheckpointError, match=r"ema\.np[yz].*--carry") as refused:
        make_plan(source, spec=SPEC)
    assert refused.value.hint is not None
    pattern = refused.value.hint.partition("--carry '")[2].partition("'")[0]
    make_plan(source, spec=SPEC.model_copy(update={"carry": (pattern,)}))


def test_other_arrays_are_carried_and_accounted_for(source: Path) -> None:
    """Text is no tensor."""
    before = make_plan(source, spec=SPEC).plan.account
    np.savez(source / "counts.npz", seen=np.arange(7), names=np.array(["a", "bc"]))
    after = make_plan(source, spec=SPEC).plan.account
    assert (after.tensors, after.bytes_before) == (before.tensors + 1, before.bytes_before + 7 * 8)


def test_a_damaged_file_is_not_carried_unseen(source: Path) -> None:
    """What cannot be read is refused."""
    (source / "x.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(CheckpointError, match=r"x\.npz"):
        make_plan(source, spec=SPEC)
