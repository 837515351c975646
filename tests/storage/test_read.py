"""Reading stored tensors: every box, stride, dtype and row range against torch itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.storage import byte_ranges
from sparkling_cli.storage.read import TensorSource, read_tensor
from sparkling_cli.storage.tensors import Extent, StoredTensor


def write(path: Path, tensor: torch.Tensor, offset: int = 0) -> None:
    """Write a tensor's storage behind ``offset`` junk bytes."""
    flat = tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy()
    path.write_bytes(b"\xa5" * offset + flat.tobytes())


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """A contiguous tensor at an odd offset is read bit for bit."""
    tensor = torch.randn(7, 5).to(dtype)
    write(tmp_path / "a.bin", tensor, offset=13)
    stored = StoredTensor(name_of(dtype), (7, 5), (Extent("a.bin", 13, (0, 0), (7, 5)),))
    found = read_tensor(tmp_path, stored)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    """A 0-d tensor and one without entries are tensors like any other."""
    write(tmp_path / "s", torch.tensor(3.5))
    scalar = read_tensor(tmp_path, StoredTensor("float32", (), (Extent("s", 0, (), ()),)))
    assert scalar.shape == () and scalar.item() == 3.5
    empty = read_tensor(tmp_path, StoredTensor("float32", (0, 4), (Extent("s", 0, (0, 0), (0, 4)),)))
    assert empty.shape == (0, 4)


@settings(max_examples=60)
@given(data=st.data())
def test_boxes_and_strides(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A tensor cut into boxes, each stored permuted, is put together again, also row by row."""
    root = tmp_path_factory.mktemp("boxes")
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    tensor = torch.randn(shape)
    dim = data.draw(st.integers(0, len(shape) - 1))
    cut = data.draw(st.integers(0, shape[dim]))
    order = data.draw(st.permutations(range(len(shape))))
    extents = []
    for i, (low, high) in enumerate([(0, cut), (cut, shape[dim])]):
        if low == high:
            continue
        box = tensor.narrow(dim, low, high - low)
        stored = box.permute(order).contiguous()
        write(root / f"{i}", stored, offset=4)
        strides = [0] * len(shape)
        for place, axis in enumerate(order):
            strides[axis] = stored.stride(place)
        start = tuple(low if d == dim else 0 for d in range(len(shape)))
        extents.append(Extent(f"{i}", 4, start, tuple(box.shape), tuple(strides)))
    whole = StoredTensor("float32", shape, tuple(extents))
    assert torch.equal(read_tensor(root, whole), tensor)
    low = data.draw(st.integers(0, shape[0]))
    high = data.draw(st.integers(low, shape[0]))
    assert torch.equal(read_tensor(root, whole, rows=slice(low, high)), tensor[low:high])


def test_strided_box(tmp_path: Path) -> None:
    """A transposed box, whole and in part."""
    tensor = torch.randn(37, 53)
    write(tmp_path / "t", tensor.t())
    stored = StoredTensor("float32", (37, 53), (Extent("t", 0, (0, 0), (37, 53), (1, 37)),))
    assert torch.equal(read_tensor(tmp_path, stored), tensor)
    assert torch.equal(read_tensor(tmp_path, stored, rows=slice(5, 9)), tensor[5:9])


def checkpoint_of(root: Path, stored: StoredTensor) -> Checkpoint:
    """A checkpoint that holds one weight ``w``."""
    return Checkpoint(root=root, format="test", tensors={"k": stored}, weights={"w": "k"})


def test_source_reads_pieces(tmp_path: Path) -> None:
    """The pieces of a tensor are its rows in order, also when a row is larger than a piece."""
    tensor = torch.arange(60.0).reshape(10, 6)
    write(tmp_path / "w", tensor)
    stored = StoredTensor("float32", (10, 6), (Extent("w", 0, (0, 0), (10, 6)),))
    with TensorSource(checkpoint_of(tmp_path, stored)) as source:
        assert torch.equal(torch.cat(list(source.pieces("k", nbytes=70))), tensor)
        assert len(list(source.pieces("k", nbytes=1))) == 10
        assert torch.equal(source.weight("w", rows=slice(2, 4)), tensor[2:4])


def test_source_over_a_single_file(tmp_path: Path) -> None:
    """The root may itself be the file; the extent's path is then empty."""
    tensor = torch.randn(4)
    write(tmp_path / "model.pt", tensor, offset=8)
    stored = StoredTensor("float32", (4,), (Extent("", 8, (0,), (4,)),))
    with TensorSource(checkpoint_of(tmp_path / "model.pt", stored)) as source:
        assert torch.equal(source.weight("w"), tensor)


def test_more_files_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor over more files than may be open at once is read all the same."""
    monkeypatch.setattr(byte_ranges, "_OPEN_FILES", 2)
    tensor = torch.randn(7, 3)
    extents = []
    for row in range(7):
        write(tmp_path / str(row), tensor[row])
        extents.append(Extent(str(row), 0, (row, 0), (1, 3)))
    stored = StoredTensor("float32", (7, 3), tuple(extents))
    with TensorSource(checkpoint_of(tmp_path, stored)) as source:
        assert torch.equal(source.read("k"), tensor)
        assert torch.equal(source.read("k"), tensor)


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    """A file that is too short or not there is the checkpoint's fault and is named."""
    write(tmp_path / "w", torch.randn(4))
    short = StoredTensor("float32", (5,), (Extent("w", 0, (0,), (5,)),))
    with pytest.raises(CheckpointError, match="ends at byte 16"):
        read_tensor(tmp_path, short)
    with pytest.raises(CheckpointError, match="nowhere"):
        read_tensor(tmp_path, StoredTensor("float32", (1,), (Extent("nowhere", 0, (0,), (1,)),)))


@pytest.mark.parametrize("second", [(0, 0), (0, 1), (2, 1), (1, 2)])
def test_boxes_that_overlap_are_refused(second: tuple[int, int]) -> None:
    """As many entries as the tensor has, some twice and some never: they would be read from nowhere."""
    boxes = (Extent("a", 0, (0, 0), (4, 2)), Extent("a", 32, second, (4, 2)))
    with pytest.raises(CheckpointError, match="'t' on disk overlap or leave a gap"):
        byte_ranges.Placement("float32", (4, 4), boxes, "t")
    whole = byte_ranges.Placement("float32", (4, 4), (boxes[0], boxes[1]._replace(start=(0, 2))), "t")
    assert not whole.flat
