"""What lies in the files that no format reads: averages, masters, second copies, random states.

Nothing may be carried over unseen, so every file that could hold tensors is opened and its tensors are
listed. Nothing of a pickle is executed. Files that can be written back with other shapes stay parsed.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checkpoint, Declared, Further, OutputFile
from sparkling_cli.formats.safetensors import SafetensorsFile, lay_out_safetensors, read_safetensors
from sparkling_cli.formats.statedict import with_shapes
from sparkling_cli.formats.torchfile import TorchFile, read_torch_file
from sparkling_cli.formats.torchfile.file import walk
from sparkling_cli.formats.torchfile.objects import Call, TensorNode
from sparkling_cli.formats.torchfile.unpickle import Anything, InertUnpickler
from sparkling_cli.storage.tensors import StoredTensor

#: how a file in torch's format of before 1.6 begins: with a pickled number
_LEGACY = 0x1950A86A20F9469CFC6C
_PICKLES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"})
#: weights in formats that are not read: of the old size after widening, so they are left out
_EXPORTED = (".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf", ".tflite")
#: files that are no text and hold no tensors of a model: tokenizers, pictures; and logs
_NO_TENSORS = frozenset({".model", ".tiktoken", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf", ".pyc"})
_EVENTS = "events.out.tfevents"
#: a pickle of more bytes is no state of a run's loaders and generators
_LONGEST_PICKLE = 1 << 28


#: a further file that can be written back with other shapes
OpenFile = TorchFile | SafetensorsFile


def further_in(file: TorchFile, used: Collection[str], label: str = "") -> list[Further]:
    """Every tensor of a torch file that is not among those used, and every array, which can only be copied.

    Args:
        file: the file, of which the tensors can be written with other shapes.
        used: keys of its weights and states.
        label: stands before the tensors' places in their names; by default the file's own path.
    """
    where = label or file.where
    tensors = (
        Further(f"{where}: {key[len(file.relative) + 1 :]}", file.relative, key, stored)
        for key, stored in file.tensors.items()
        if key not in used
    )
    return [*tensors, *(item._replace(file=file.relative) for item in _arrays(file.tree, where))]


def with_further(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every tensor of the files that are carried over, and without exported weights.

    Raises:
        CheckpointError: a file that is named like one of tensors cannot be looked into.
    """
    found: list[Further] = []
    files: dict[str, OpenFile] = {}
    unknown: list[str] = []
    carried = tuple(path for path in checkpoint.carried if not path.endswith(_EXPORTED))
    for relative in carried:
        read = _read(checkpoint.root, relative)
        if read is None:
            unknown.append(relative)
            continue
        tensors, parsed = read
        found += tensors
        if parsed is not None and tensors:
            files[relative] = parsed
    exported = [path for path in checkpoint.carried if path.endswith(_EXPORTED)]
    left_out = [f"{path} is not carried over: it holds the weights at their old size" for path in exported]
    notes = (*checkpoint.notes, *left_out)
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        which = f"{', '.join(unknown[:5])}{more}"
        notes = (
            *notes,
            f"{which}: of no known format, carried as they are without a look at what is in them",
        )
    further = (*checkpoint.further, *found)
    return replace(checkpoint, carried=carried, further=further, further_files=files, notes=notes)


def lay_out_further(
    checkpoint: Checkpoint, declared: tuple[Declared, ...]
) -> tuple[tuple[Declared, ...], tuple[OutputFile, ...]]:
    """Output tensors that lie in the format's own files, and the further files that are written anew.

    Args:
        checkpoint: the source.
        declared: all output tensors.
    """
    files = {item.key: item.file for item in checkpoint.further if item.file in checkpoint.further_files}
    apart: dict[str, list[Declared]] = {}
    for item in declared if files else ():
        if item.key in files:
            apart.setdefault(files[item.key], []).append(item)
    if not apart:
        return declared, ()
    own = tuple(item for item in declared if item.key not in files)
    found = checkpoint.further_files.items()
    return own, tuple(_with_new_shapes(file, name, apart[name]) for name, file in found if name in apart)


def _with_new_shapes(file: OpenFile, relative: str, declared: Sequence[Declared]) -> OutputFile:
    if isinstance(file, TorchFile):
        return with_shapes(file, {item.key: (item.dtype, item.shape) for item in declared})
    rows = ((d.key, d.key.removeprefix(f"{relative}:"), d.dtype, d.shape) for d in declared)
    return lay_out_safetensors(relative, rows, file.metadata)


def left_out(root: Path, names: Iterable[str]) -> list[Further]:
    """Every tensor of files that are not part of the output."""
    read = (_read(root, relative) for relative in names)
    return [item._replace(left_out=True) for found in read if found is not None for item in found[0]]


def _read(root: Path, relative: str) -> tuple[list[Further], OpenFile | None] | None:
    """Tensors of a file, and the file if it can be written with other shapes; None of an unknown format."""
    path = root / relative
    with path.open("rb") as stream:
        start = stream.read(1 << 10)
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path, relative)
        if start[:4] == b"PK\x03\x04" and path.suffix not in (".npz", ".zip", ".docx", ".jar"):
            return _torch(path, relative)
        if start[:1] == b"\x80" and (path.suffix in _PICKLES or start[1:2] in b"\2\3\4\5"):
            return _pickle(path, relative), None
        if start[:4] == b"\x93NUM" or path.suffix == ".npz":
            return list(_numpy(path, relative)), None
        if path.name == ".metadata":
            return _distributed(root, relative), None
    except CheckpointError as error:
        return [Further(f"{relative}: ({error.message})", relative, "", None)], None
    part = path.suffix == ".distcp" and (path.parent / ".metadata").is_file()
    known = part or path.suffix in _NO_TENSORS or _EVENTS in path.name or b"\0" not in start
    return ([], None) if known else None


def _safetensors(path: Path, relative: str) -> tuple[list[Further], OpenFile]:
    parsed = read_safetensors(path, relative)
    found = parsed.tensors.items()
    return [Further(f"{relative}: {n}", relative, f"{relative}:{n}", stored) for n, stored in found], parsed


def _torch(path: Path, relative: str) -> tuple[list[Further], OpenFile | None]:
    try:
        file = read_torch_file(path, relative)
    except CheckpointError:  # objects of other libraries: listed, and only ever copied as a whole
        file = read_torch_file(path, relative, allow=Anything())
        return [item._replace(key="") for item in further_in(file, ())], None
    return further_in(file, ()), file


def _pickle(path: Path, relative: str) -> list[Further]:
    """Tensors and arrays in a pickle that is no archive: a plain one, or torch's format of before 1.6."""
    if path.stat().st_size > _LONGEST_PICKLE:
        with path.open("rb") as begin:
            legacy = _LEGACY.to_bytes(10, "little") in begin.read(64)
        kind = "a torch file of the format before 1.6" if legacy else "a pickle of more than 256 MiB"
        raise CheckpointError(f"{kind}, which is not looked into")
    data = path.read_bytes()
    stream = BytesIO(data)
    tree: Any = None
    for _ in range(4):  # magic number, version, machine, content
        try:
            tree = InertUnpickler(stream, relative).load()
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError) as error:
            raise CheckpointError(f"cannot be decoded: {error}") from error
        if tree != _LEGACY and stream.tell() >= len(data) - 1:
            break
        if not isinstance(tree, (int, dict)) or (isinstance(tree, dict) and "little_endian" not in tree):
            break
    return [*_nodes(tree, relative), *_arrays(tree, relative)]


def _nodes(tree: Any, relative: str) -> Iterator[Further]:
    for place, value in walk(tree):
        if isinstance(value, TensorNode):
            stored = StoredTensor(value.dtype, value.shape, ())
            yield Further(f"{relative}: {place}", relative, "", stored)


def _arrays(tree: Any, relative: str) -> Iterator[Further]:
    """NumPy arrays: random states, mostly."""
    for place, value in walk(tree):
        state = value.state[0] if isinstance(value, Call) and value.state else None
        if isinstance(state, tuple) and len(state) == 5 and value.function.path.endswith("._reconstruct"):
            shape, kind = state[1], state[2]
            code = str(kind.args[0]) if isinstance(kind, Call) and kind.args else ""
            if isinstance(shape, tuple) and all(type(size) is int for size in shape) and code in _NUMPY:
                yield Further(f"{relative}: {place}", relative, "", StoredTensor(_NUMPY[code], shape, ()))


def _numpy(path: Path, relative: str) -> Iterator[Further]:
    """The array of a ``.npy`` file, or all of an ``.npz``, by their headers."""
    import zipfile

    try:
        if path.suffix != ".npz":
            with path.open("rb") as stream:
                yield from _header(stream, relative, relative)
            return
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.endswith(".npy"):
                    with archive.open(entry) as stream:
                        yield from _header(stream, f"{relative}: {entry.removesuffix('.npy')}", relative)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"not a readable NumPy file: {error}") from error


def _header(stream: IO[bytes], name: str, relative: str) -> Iterator[Further]:
    """The array that a header describes; text is no tensor, and what else has no torch dtype is not known."""
    from numpy.lib import format as npy

    if npy.read_magic(stream) == (1, 0):
        shape, _, dtype = npy.read_array_header_1_0(stream)
    else:
        shape, _, dtype = npy.read_array_header_2_0(stream)
    if dtype.kind not in "US":
        kind = _NUMPY.get(f"{dtype.kind}{dtype.itemsize}")
        yield Further(name, relative, "", None if kind is None else StoredTensor(kind, shape, ()))


_NUMPY = {
    "f8": "float64", "f4": "float32", "f2": "float16", "i8": "int64", "i4": "int32", "i2": "int16",
    "i1": "int8", "u1": "uint8", "b1": "bool", "u2": "uint16", "u4": "uint32", "u8": "uint64",
    "c8": "complex64", "c16": "complex128",
}  # fmt: skip


def _distributed(root: Path, relative: str) -> list[Further]:
    """Every tensor of a ``torch.distributed.checkpoint`` in a folder of its own."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from sparkling_cli.formats.dcp.metadata import read_metadata

    folder = (root / relative).parent
    found = []
    for name, meta in read_metadata(folder).state_dict_metadata.items():
        if isinstance(meta, TensorStorageMetadata):
            dtype = str(meta.properties.dtype).removeprefix("torch.")
            stored = StoredTensor(dtype, tuple(meta.size), ())
            found.append(Further(f"{relative}: {name}", relative, "", stored))
    return found
