"""Torch files: read without torch.load, written as torch writes them."""

from __future__ import annotations

import importlib.util
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from datetime import date, datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.torchfile import (
    REMOVED,
    TorchFile,
    lay_out,
    plain,
    read_torch_file,
    read_values,
)
from tests.formats.filling import filled, read_stored


def everything() -> dict[str, Any]:
    """A tree with every kind of object that torch.load(weights_only=True) takes."""
    shared = torch.randn(4, 6)
    linear = torch.nn.Linear(3, 4)
    return {
        "state": {i: {"step": torch.tensor(float(i)), "exp_avg": torch.randn(3, 4)} for i in range(200)},
        "model": linear.state_dict(),
        "parameter": linear.weight,
        "tied": [shared, shared],
        "bf16": torch.randn(3, 2).bfloat16(),
        "float8": torch.randn(3).to(torch.float8_e4m3fn),
        "unsigned": torch.arange(3).to(torch.uint16),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "size": torch.Size([2, 3]),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "bytes": [b"abc", bytearray(b"xyz")],
        "set": {1},
        "complex": 1 - 2j,
        "numbers": (0, 255, 256, 70000, -3, 2**31, -(2**31), -(2**31) - 1, 2**70, -(2**40), -128, 128, 1.5),
        "lists": [[], [1], list(range(1000)), list(range(1001)), list(range(2000))],
        "dicts": [{}, {1: 2}, {i: i for i in range(1000)}, {i: i for i in range(1001)}],
        "ordered": [OrderedDict((i, f"value {i}") for i in range(n)) for n in (0, 1, 2, 1000, 1001, 2000)],
        "text": "é\n\x00",
        "nothing": (None, True, False, ()),
    }


def saved(tmp_path: Path, tree: Any, name: str = "file.pt") -> TorchFile:
    """``tree`` through torch.save and our reader."""
    torch.save(tree, tmp_path / name)
    return read_torch_file(tmp_path / name, name)


def rewritten(file: TorchFile, target: Path, **changes: Any) -> Path:
    """Lay the file out and fill unchanged tensors from the source."""
    output = lay_out(file, **changes)
    root = file.path.parent
    target.write_bytes(filled(output, lambda key: read_stored(root, file.tensors[key])))
    return target


def equal(a: Any, b: Any) -> bool:
    """Whether two loaded trees are equal in types, structure and tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return same and torch.equal(*raw)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_unchanged_file_comes_out_byte_for_byte(tmp_path: Path) -> None:
    """Laying out an unchanged file gives torch.save's own bytes, CRCs and record order included."""
    file = saved(tmp_path, everything())
    target = rewritten(file, tmp_path / "again.pt")
    assert target.read_bytes() == file.path.read_bytes()


def harmless() -> dict[str, Any]:
    """Objects that trainers keep beside tensors, which ``torch.load(weights_only=True)`` does not take."""
    generator = np.random.default_rng(3)
    found = {
        "args": Namespace(hidden_size=64, lr=1e-3, params_dtype=torch.bfloat16, betas=(0.9, 0.95)),
        "time": [timedelta(seconds=3.5), datetime(2025, 5, 1, 12, 30, tzinfo=timezone.utc), date(2025, 5, 1)],
        "version": torch.torch_version.TorchVersion("2.7.1"),
        "path": PurePosixPath("data/train.bin"),
        "random": [np.random.RandomState(3).get_state(), generator, generator.bit_generator.state],
        "array": np.arange(6, dtype="int64").reshape(2, 3),
        "number": np.float32(2.5),
        "counts": defaultdict(int, a=1),
        "slice": slice(1, 4),
        "model": {"weight": torch.randn(3, 4)},
    }
    if importlib.util.find_spec("omegaconf"):
        from omegaconf import OmegaConf

        found["options"] = OmegaConf.create({"model": {"dim": 64, "layers": [1, 2]}, "run": "${model.dim}"})
    return found


def test_harmless_objects_come_out_byte_for_byte(tmp_path: Path) -> None:
    """Options, times and random states are stand-ins that are written back as they were."""
    file = saved(tmp_path, harmless())
    target = rewritten(file, tmp_path / "again.pt")
    assert target.read_bytes() == file.path.read_bytes()
    assert plain(file.tree["args"])["hidden_size"] == 64
    edited = rewritten(file, tmp_path / "edited.pt", edits={("args", "__3__", 0, "hidden_size"): 128})
    loaded, was = (torch.load(path, weights_only=False) for path in (edited, file.path))
    assert vars(loaded.pop("args")) == {**vars(was.pop("args")), "hidden_size": 128}
    assert loaded["random"][1].integers(1 << 30) == was["random"][1].integers(1 << 30)
    assert loaded["time"] == was["time"] and loaded["version"] == was["version"]
    assert np.array_equal(loaded["array"], was["array"])


def test_keys_dtypes_and_bytes(tmp_path: Path) -> None:
    """Every tensor is found under its path, with its dtype and its bytes; tied ones are aliases."""
    tree = everything()
    file = saved(tmp_path, tree)
    assert file.tensors["file.pt:state.7.exp_avg"].shape == (3, 4)
    assert file.tensors["file.pt:model.weight"].dtype == "float32"
    assert file.tensors["file.pt:float8"].dtype == "float8_e4m3fn"
    assert file.aliases == {"file.pt:tied.1": "file.pt:tied.0", "file.pt:parameter": "file.pt:model.weight"}
    assert file.paths["file.pt:state.7.exp_avg"] == ("state", 7, "exp_avg")
    found = read_stored(tmp_path, file.tensors["file.pt:state.7.exp_avg"]).tobytes()
    assert found == tree["state"][7]["exp_avg"].numpy().tobytes()
    assert read_values(file, ["file.pt:scalar"])["file.pt:scalar"] == (7).to_bytes(8, "little")
    assert plain(file.tree["size"]) == (2, 3) and plain(file.tree["bytes"][0]) == b"abc"


@pytest.mark.parametrize("mmap", [True, False])
def test_new_shapes_load(tmp_path: Path, mmap: bool) -> None:
    """Widened tensors, edited values and tied tensors load by plain torch.load; CRCs hold for zipfile."""
    tree = everything()
    file = saved(tmp_path, tree)
    wide = np.arange(48, dtype=np.float32).reshape(8, 6)
    new = {"file.pt:tied.0": ("float32", (8, 6)), "file.pt:tied.1": ("float32", (8, 6))}
    output = lay_out(
        file,
        new,
        edits={("numbers",): [1, 2], ("ordered", 2, 1): "x", ("dicts",): REMOVED},
        values={"file.pt:scalar": (9).to_bytes(8, "little")},
    )
    raw = wide.view("V4")
    target = tmp_path / "wide.pt"
    target.write_bytes(
        filled(output, lambda k: raw if k == "file.pt:tied.0" else read_stored(tmp_path, file.tensors[k]))
    )
    loaded = torch.load(target, weights_only=True, mmap=mmap)
    assert torch.equal(loaded["tied"][1], torch.from_numpy(wide))
    assert loaded["tied"][0].data_ptr() == loaded["tied"][1].data_ptr()
    assert loaded["numbers"] == [1, 2] and loaded["ordered"][2] == OrderedDict({0: "value 0", 1: "x"})
    assert "dicts" not in loaded and loaded["scalar"] == 9
    assert isinstance(loaded["parameter"], torch.nn.Parameter)
    for name in ("state", "bf16", "float8", "unsigned", "empty", "flags", "model"):
        assert equal(loaded[name], torch.load(file.path, weights_only=True)[name]), name
    assert "dicts" in file.tree and file.tree["ordered"][2][1] == "value 1", "the source's tree was changed"
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None


def test_views_come_out_contiguous_and_shared(tmp_path: Path) -> None:
    """Transposed, sliced and expanded tensors keep their values; disjoint views stay in one storage."""
    base = torch.arange(24.0).reshape(4, 6).clone()
    halves = torch.arange(12.0)
    tree = {
        "transposed": base.t(),
        "slice": torch.arange(100.0)[10:20:3],
        "expanded": torch.tensor([5.0]).expand(2, 3),
        "second": halves[6:].view(2, 3),
        "first": halves[:6],
    }
    file = saved(tmp_path, tree)
    target = rewritten(file, tmp_path / "again.pt")
    loaded = torch.load(target, weights_only=True)
    assert equal(loaded, tree)
    assert all(t.is_contiguous() for t in loaded.values())
    assert loaded["first"].untyped_storage().data_ptr() == loaded["second"].untyped_storage().data_ptr()
    assert loaded["slice"].untyped_storage().nbytes() == 16


def test_overlapping_views_are_refused(tmp_path: Path) -> None:
    """Two different views of the same entries cannot both grow."""
    base = torch.arange(24.0)
    file = saved(tmp_path, {"a": base[:16], "b": base[8:]})
    with pytest.raises(CheckpointError, match="overlaps another tensor"):
        lay_out(file)


def test_archive_inside_a_bigger_file(tmp_path: Path) -> None:
    """At an offset, extents are absolute and the laid-out file is relative to its own start."""
    torch.save(everything(), tmp_path / "plain.pt")
    inner = (tmp_path / "plain.pt").read_bytes()
    (tmp_path / "big.bin").write_bytes(b"x" * 777 + inner + b"y" * 99)
    file = read_torch_file(tmp_path / "big.bin", "big.bin", offset=777, length=len(inner))
    assert rewritten(file, tmp_path / "again.pt").read_bytes() == inner


def test_sizes_beyond_four_gibibytes(tmp_path: Path) -> None:
    """Zip64 headers and descriptors are those of torch's own writer (data left out: the files are sparse)."""
    from sparkling_cli.formats.torchfile.writer import NewRecord, Slot, lay_out_archive

    sizes = [1 << 32, 5, (1 << 32) + 7, 0xFFFFFFFF, 9, 0xFFFFFFFE, 0]
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "big.pt"))
    for i, size in enumerate(sizes):
        writer.write_record_metadata(f"data/{i}", size)
    writer.write_end_of_file()
    with zipfile.ZipFile(tmp_path / "big.pt") as archive:
        rest = [(i.filename.removeprefix("big/"), archive.read(i)) for i in archive.infolist()[len(sizes) :]]
    parts = [NewRecord(f"data/{i}", [Slot("", (0,), (size,), size)]) for i, size in enumerate(sizes)]
    parts += [NewRecord(name, [data]) for name, data in rest]
    output = lay_out_archive("big.pt", "big/", parts)
    assert output.size == (tmp_path / "big.pt").stat().st_size
    with (tmp_path / "big.pt").open("rb") as stream:
        for offset, literal in output.literals:
            stream.seek(offset)
            assert stream.read(len(literal)) == literal
