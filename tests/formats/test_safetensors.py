"""Safetensors: our header reader against the library's, our layout against ``save_file``'s bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.safetensors import lay_out_safetensors, read_safetensors
from tests.formats.filling import filled, read_stored

#: Every dtype that both the library and torch have.
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64,
)  # fmt: skip


def many_tensors() -> dict[str, torch.Tensor]:
    """Two tensors of every dtype, 0-d and empty ones, and names that JSON has to escape."""
    torch.manual_seed(0)
    tensors = {}
    for number, dtype in enumerate(DTYPES):
        for size in (3, 5):
            name = f"{number % 3}.{str(dtype)[6:]}.{size}"
            tensors[name] = torch.randint(1, 2, (size, 2)).to(dtype)
    tensors['odd "é"\n\x7f\u2028\\/'] = torch.randn(2, 3)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(2, 0, 3)
    return tensors


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {}])
def test_unchanged_file_comes_out_byte_for_byte(tmp_path: Path, metadata: Any) -> None:
    """Reading a file and laying it out again gives ``save_file``'s bytes."""
    save_file(many_tensors(), tmp_path / "a.safetensors", metadata=metadata)
    file = read_safetensors(tmp_path / "a.safetensors", "a.safetensors")
    rows = [(f"key {name}", name, t.dtype, t.shape) for name, t in reversed(file.tensors.items())]
    output = lay_out_safetensors("a.safetensors", rows, file.metadata)
    found = filled(output, lambda key: read_stored(tmp_path, file.tensors[key.removeprefix("key ")]))
    assert found == (tmp_path / "a.safetensors").read_bytes()


def test_reader_agrees_with_the_library(tmp_path: Path) -> None:
    """Names, dtypes, shapes and bytes are those that safe_open gives."""
    path = tmp_path / "a.safetensors"
    save_file(many_tensors(), path)
    file = read_safetensors(path, "a.safetensors")
    with safe_open(path, "pt") as library:
        assert set(library.keys()) == set(file.tensors)
        for name, stored in file.tensors.items():
            tensor = library.get_tensor(name)
            assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{stored.dtype}", stored.shape)
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert read_stored(tmp_path, stored).tobytes() == raw


def test_widened_file_loads(tmp_path: Path) -> None:
    """New shapes are what safe_open reads back, in the order that ``save_file`` would choose."""
    values = {"w": np.arange(12, dtype=np.float32).reshape(4, 3), "n": np.ones(2, np.float32)}
    rows = [(name, name, "float32", value.shape) for name, value in values.items()]
    output = lay_out_safetensors("b.safetensors", rows, {"format": "pt"})
    path = tmp_path / "b.safetensors"
    path.write_bytes(filled(output, lambda key: values[key].view("V4")))
    save_file({k: torch.from_numpy(v) for k, v in values.items()}, tmp_path / "c", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "c").read_bytes()


def raw_file(header: Any, data: int = 16) -> bytes:
    """A file with any header (text or JSON value) and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(begin: int = 0, end: int = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    """A header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x01\x02", "truncated"),
        (raw_file({"a": entry()})[:-1], "truncated: 16 bytes of data expected, 15 found"),
        (raw_file({"a": entry()}, 17), "1 bytes behind the last tensor"),
        (raw_file({}, 1), "1 bytes behind the last tensor"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "truncated"),
        (raw_file(b"[]"), "should start with"),
        (raw_file(b" {}", 0), "should start with"),
        (raw_file(b'{"a": '), "no JSON"),
        (raw_file(b'{"a": "\xff"}'), "no JSON"),
        (raw_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "no JSON"),
        (raw_file(b'{"a": 1, "a": 2}'), "has 'a' twice"),
        (raw_file(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "has 'dtype' twice"),
        (raw_file(b'{"a": 1, "a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'), "has 'a' twice"),
        (
            raw_file(b'{"a": {"dtype": "F32", "shape": [0], "shape": [0], "data_offsets": [0, 0]}}'),
            "has 'shape' twice",
        ),
        (raw_file(b'{"__metadata__": {"a": "b", "a": "c"}}'), "has 'a' twice"),
        (raw_file(b'{"__metadata__": {}, "__metadata__": {}}'), "has '__metadata__' twice"),
        (
            raw_file(b'{"a\\"": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a\\u0022": {}}'),
            "twice",
        ),
        (raw_file({"a": 5}), "must have dtype, shape and data_offsets"),
        (raw_file({"a": {**entry(), "more": 1}}), "must have dtype, shape and data_offsets"),
        (raw_file({"a": entry(dtype="F4")}), "known are U64"),
        (raw_file({"a": entry(dtype=["F32"])}), "known are U64"),
        (raw_file({"a": entry(shape=[-4])}), "has shape"),
        (raw_file({"a": entry(shape=[4.0])}), "has shape"),
        (raw_file({"a": entry(shape=[True, 4])}), "has shape"),
        (raw_file({"a": entry(shape=7)}), "has shape"),
        (raw_file({"a": entry(begin=-16, end=0)}), "data_offsets"),
        (raw_file({"a": entry(shape=[5])}), "takes 20 bytes"),
        (raw_file({"a": entry(shape=[1 << 40, 1 << 40])}), "takes"),
        (raw_file({"a": entry(), "b": entry()}), "overlaps the tensor before it"),
        (raw_file({"a": entry(), "b": entry(20, 36)}, 36), "leaves a hole from 16 on"),
        (raw_file({"a": entry(4, 20)}, 20), "leaves a hole from 0 on"),
        (raw_file({"__metadata__": {"a": 1}, "a": entry()}), "__metadata__"),
        (raw_file({"__metadata__": [], "a": entry()}), "__metadata__"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Each breach of the format is refused with the file, what was expected and what was found."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path, "bad.safetensors")
    assert message in str(caught.value) and "bad.safetensors" in str(caught.value)


def test_absurd_header_size_is_refused_unread(tmp_path: Path) -> None:
    """A header of a gibibyte (of a sparse file) is refused by its length."""
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as stream:
        stream.write((1 << 30).to_bytes(8, "little") + b"{}")
        stream.truncate(2 << 30)
    with pytest.raises(CheckpointError, match="at most 100000000"):
        read_safetensors(path, "bad.safetensors")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_any_damage_is_harmless(tmp_path: Path, place: float, value: int) -> None:
    """One changed byte of the header leads to a clean error or to tensors inside the file."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, path, metadata={"format": "pt"})
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    data[int(place * header)] = value
    path.write_bytes(data)
    try:
        file = read_safetensors(path, "a.safetensors")
    except CheckpointError:
        return
    ends = [t.extents[0].offset + t.nbytes for t in file.tensors.values()]
    assert max(ends, default=0) <= len(data)


def test_layout_refuses_what_the_format_lacks() -> None:
    """complex128 has no code; two tensors cannot have one name."""
    with pytest.raises(CheckpointError, match="does not have"):
        lay_out_safetensors("a", [("k", "a", "complex128", (1,))], None)
    with pytest.raises(CheckpointError, match="two tensors"):
        lay_out_safetensors("a", [("k", "a", "int8", (1,)), ("l", "a", "int8", (1,))], None)
