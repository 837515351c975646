"""Torch files that are damaged, foreign or made to harm: each is refused, none is executed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparkling_cli.errors import CheckpointError, SparklingError, UnsafePickleError
from sparkling_cli.formats.torchfile import lay_out, read_attributes, read_torch_file


def archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A torch zip file by hand; ``data/0`` holds 16 bytes unless ``records`` says otherwise."""
    with zipfile.ZipFile(path, "w", **options) as target:
        target.writestr("x/data.pkl", pickled)
        for name, data in (records if records is not None else {"data/0": bytes(16)}).items():
            target.writestr(f"x/{name}", data)
    return path


def tensor_pickle(
    *, entries: int = 4, offset: int = 0, shape: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,)
) -> bytes:
    """A pickle of one float32 tensor with any numbers."""
    text = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", entries) if value == "HERE" else None

    class Tensor:
        def __reduce__(self) -> Any:
            args = ("HERE", offset, shape, stride, False, None)
            return torch._utils._rebuild_tensor_v2, args

    Pickler(text, 2).dump({"a": Tensor()})
    return text.getvalue()


def refused(path: Path, error: type[SparklingError] = CheckpointError) -> str:
    """The message with which our reader refuses a file; it names the file."""
    with pytest.raises(error) as caught:
        read_torch_file(path, path.name)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_hand_made_file_is_read(tmp_path: Path) -> None:
    """The hand-made files of this module are right but for what each test does to them."""
    file = read_torch_file(archive(tmp_path / "f.pt", tensor_pickle()), "f.pt")
    assert file.tensors["f.pt:a"].shape == (4,)


class Harm:
    """Pickles to a call that leaves a mark."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_calls_are_not_executed(tmp_path: Path, protocol: int) -> None:
    """A pickle that runs a command is refused by the name of the function, and nothing runs."""
    mark = tmp_path / "mark"
    harm = pickle.dumps({"a": Harm(os.system, f"touch {mark}")}, protocol)
    message = refused(archive(tmp_path / "f.pt", harm), UnsafePickleError)
    assert "posix.system" in message and not mark.exists()
    assert read_attributes(tmp_path / "f.pt") != {} and not mark.exists()


@pytest.mark.parametrize("function", [eval, getattr, __import__, pickle.loads, torch.load, io.open])
def test_other_globals_are_refused(tmp_path: Path, function: Callable[..., Any]) -> None:
    """Whatever is not on the list is refused by its full name."""
    message = refused(archive(tmp_path / "f.pt", pickle.dumps(Harm(function, "x"), 2)), UnsafePickleError)
    assert function.__name__ in message


@pytest.mark.parametrize(
    "pickled",
    [
        # BUILD on a global: would change the stand-in's class.
        b"\x80\x02ctorch\nFloatStorage\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02ctorch\nFloatStorage\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
        # BUILD on a list.
        b"\x80\x02]}X\x01\x00\x00\x00aK\x01sb.",
        # INST and OBJ, which no torch file has.
        b"\x80\x02(ios\nsystem\n.",
        b"\x80\x02(cos\nsystem\no.",
        # extension registry, text persistent id, protocol-0 text.
        b"\x80\x02\x82\x01.",
        b"Pabc\n.",
        b"I01\n.",
        # a persistent id that is no storage.
        b"\x80\x02X\x03\x00\x00\x00absQ.",
        b"\x80\x02K\x01Q.",
        # calling what cannot be called; memo never filled; empty stack; no STOP; nothing at all.
        b"\x80\x02K\x01)R.",
        b"\x80\x02h\x07.",
        b"\x80\x02.",
        b"\x80\x02]",
        b"",
        # a string longer than the file; a protocol that does not exist.
        b"\x80\x02X\xff\xff\xff\x7fab.",
        b"\x80\x63N.",
        # storages by other means.
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00K\x00K\x00K\x00K\x00tR.",
    ],
)
def test_odd_pickles_are_refused(tmp_path: Path, pickled: bytes) -> None:
    """No stream of opcodes gets past the reader other than as data."""
    refused(archive(tmp_path / "f.pt", pickled))


def test_absurd_memo_index_is_refused(tmp_path: Path) -> None:
    """Twenty bytes cannot make the decoder set aside gigabytes for its memo."""
    pickled = b"\x80\x02]r\xff\xff\xff\x7f."
    assert "memo" in refused(archive(tmp_path / "f.pt", pickled), UnsafePickleError)


def test_containers_that_repeat_or_hold_themselves(tmp_path: Path) -> None:
    """Lists named over and over, in themselves, or nested without end lead to an error, not out of memory."""
    again = b"".join(b"](" + b"h%c" % (i - 1) * 10 + b"eq%c" % i for i in range(1, 12))
    assert "too much" in refused(archive(tmp_path / "f.pt", b"\x80\x02]q\x00" + again + b"."))
    itself = b"\x80\x02]q\x00h\x00a."
    assert "contains itself" in refused(archive(tmp_path / "g.pt", itself))
    deep = b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b"."
    assert "deeply" in refused(archive(tmp_path / "h.pt", deep))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": 5}, "should have 20 bytes, it has 16"),
        ({"entries": 3}, "should have 12 bytes, it has 16"),
        ({"shape": (5,)}, "runs out of its storage"),
        ({"offset": 1}, "runs out of its storage"),
        ({"stride": (2,)}, "runs out of its storage"),
        ({"shape": (2, 2)}, "strides"),
        ({"shape": (-4,)}, "shape"),
        ({"stride": (-1,)}, "strides"),
        ({"offset": -1}, "offset"),
        ({"shape": (2.0,)}, "shape"),
        ({"shape": (2**62, 2**62), "stride": (1, 1)}, "runs out of its storage"),
        ({"entries": -1}, "no storage"),
    ],
)
def test_tensors_outside_their_storage(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Sizes, strides and offsets that do not fit the bytes are refused with the numbers."""
    assert message in refused(archive(tmp_path / "f.pt", tensor_pickle(**changes)))


def test_missing_storage_and_missing_pickle(tmp_path: Path) -> None:
    """A tensor without bytes, and an archive without a pickle."""
    assert "missing" in refused(archive(tmp_path / "f.pt", tensor_pickle(), {}))
    with zipfile.ZipFile(tmp_path / "g.pt", "w") as target:
        target.writestr("x/data/0", b"")
    assert "data.pkl" in refused(tmp_path / "g.pt")


def test_big_endian_is_refused(tmp_path: Path) -> None:
    """The byte order is stated in the file; only little-endian is read."""
    records = {"data/0": bytes(16), "byteorder": b"big"}
    assert "'big'" in refused(archive(tmp_path / "f.pt", tensor_pickle(), records))


def test_legacy_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Files of torch's old format say how to convert them."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
    assert "torch.save(torch.load" in refused(tmp_path / "f.pt")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    """A TorchScript archive holds code; it is no checkpoint."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "f.pt"))
    assert "TorchScript" in refused(tmp_path / "f.pt")


def test_compressed_records_and_other_folders(tmp_path: Path) -> None:
    """What torch never writes is refused: compression, records outside the folder, names twice."""
    path = archive(tmp_path / "f.pt", tensor_pickle(), compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)
    with zipfile.ZipFile(tmp_path / "g.pt", "w") as target:
        target.writestr("x/data.pkl", tensor_pickle())
        target.writestr("../data/0", bytes(16))
    assert "outside the folder" in refused(tmp_path / "g.pt")
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "h.pt", "w") as target:
        target.writestr("x/data.pkl", tensor_pickle())
        target.writestr("x/data.pkl", tensor_pickle())
    assert "twice" in refused(tmp_path / "h.pt")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    """No file, and a folder in its place."""
    refused(tmp_path / "absent.pt")
    (tmp_path / "folder.pt").mkdir()
    refused(tmp_path / "folder.pt")


def real_file(tmp_path: Path) -> bytes:
    """The bytes of a small real file."""
    torch.manual_seed(0)
    torch.save({"w": torch.randn(3, 4), "n": [1, 2.5, "x"]}, tmp_path / "real.pt")
    return (tmp_path / "real.pt").read_bytes()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """A file cut anywhere, and one with something behind it, is refused."""
    data = real_file(tmp_path)
    for stop in range(0, len(data), 7):
        (tmp_path / "cut.pt").write_bytes(data[:stop])
        refused(tmp_path / "cut.pt")
    (tmp_path / "more.pt").write_bytes(data + b"\0")
    refused(tmp_path / "more.pt")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), wide=st.booleans())
def test_any_damage_is_harmless(tmp_path: Path, place: float, value: int, wide: bool) -> None:
    """One changed byte (or four) leads to a clean error, or to tensors inside the file."""
    data = bytearray(real_file(tmp_path))
    at = int(place * (len(data) - 4))
    data[at : at + (4 if wide else 1)] = struct.pack("<I", value * 0x01010101) if wide else bytes([value])
    path = tmp_path / "damaged.pt"
    path.write_bytes(data)
    try:
        file = read_torch_file(path, "damaged.pt")
        lay_out(file)
    except SparklingError:
        return
    for tensor in file.tensors.values():
        extent = tensor.extents[0]
        assert extent.offset >= 0 and (extent.strides or extent.offset + tensor.nbytes <= len(data))


def test_inert_reader_gives_attributes(tmp_path: Path) -> None:
    """The real TrainingArguments come back as plain data, without importing their modules."""
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        learning_rate=3e-4,
        warmup_steps=0.1,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        max_steps=123,
        report_to=[],
    )
    torch.save(args, tmp_path / "training_args.bin")
    found = read_attributes(tmp_path / "training_args.bin")
    assert found["learning_rate"] == args.learning_rate
    assert found["lr_scheduler_type"] == "cosine_with_min_lr"
    assert found["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert found["warmup_steps"] == 0.1 and found["max_steps"] == 123
    assert found["output_dir"] == args.output_dir and found["optim"] == args.optim.value
