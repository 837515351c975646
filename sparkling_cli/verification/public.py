"""Files of an output opened by the libraries that trainers open them with.

What our own readers open need not be what others can: safetensors, ``torch.load`` with ``weights_only``,
torch's distributed checkpoints and JSON are asked themselves. Nothing large is brought into memory: files are
mapped.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checkpoint

#: bytes of tensors of a distributed checkpoint that are loaded to see whether a file of it can be
_SAMPLE = 1 << 26
_INDEX = ".metadata"
Shape = tuple[int, ...]


def unreadable(
    output: Checkpoint, written: Collection[str], carried: Collection[str], source: Path | None
) -> tuple[list[str], dict[str, Counter[Shape]]]:
    """Files that their own libraries do not open, or in which they find other tensors than we do.

    Args:
        output: as our own reader sees it.
        written: files that were made, relative to its root.
        carried: files that are the source's, byte for byte; of these only tensors are looked for.
        source: the checkpoint that it was made from; what cannot be opened there needs not be here.

    Returns:
        What is wrong, and for every file how many tensors of each shape are anywhere in it.
    """
    weights: dict[str, dict[str, Shape]] = {}
    for name, key in output.stored_weights.items():
        stored = output.tensors[key]
        for path in {extent.path for extent in stored.extents}:
            weights.setdefault(path, {})[name] = stored.shape
    faults: list[str] = []
    shapes: dict[str, Counter[Shape]] = {}
    for path in sorted({*written, *carried}):
        try:
            shapes[path] = _open(output.root, path, weights.get(path, {}))
        except Exception as error:  # whatever the library raises on a file that it cannot read
            if path in written and (source is None or not _fails(source, path)):
                text = " ".join(str(error).split())
                faults.append(f"{path or output.root.name} cannot be loaded: {text:.300}")
    return faults, shapes


def _fails(root: Path, path: str) -> bool:
    """Whether the source's file of that name cannot be opened either."""
    try:
        _open(root, path, {})
    except FileNotFoundError:
        return False
    except Exception:  # see above
        return True
    return False


def _open(root: Path, path: str, weights: Mapping[str, Shape]) -> Counter[Shape]:
    """Open a file by its own library; how many tensors of each shape are anywhere in it.

    Args:
        root: of the checkpoint.
        path: of the file.
        weights: name -> shape of the weights in it, where its names are theirs.

    Raises:
        Exception: it cannot be opened, or has other tensors.
    """
    file = root / path if path else root
    if file.suffix == ".json":
        json.loads(file.read_bytes())
    elif file.suffix == ".safetensors":
        return _open_safetensors(file, weights)
    elif find_spec("torch") is None:
        return Counter()
    elif file.name == _INDEX:
        return _open_distributed(file.parent)
    elif file.suffix != ".distcp" and zipfile.is_zipfile(file):  # those are opened by their index
        import torch

        return Counter(_shapes_in(torch.load(file, map_location="cpu", mmap=True, weights_only=True)))
    return Counter()


def _shapes_in(value: Any) -> Iterator[Shape]:
    """Shapes of all tensors that are no bytes, at any depth of containers."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.dtype != torch.uint8:  # states of random generators
            yield tuple(value.shape)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _shapes_in(key)
            yield from _shapes_in(inner)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for inner in value:
            yield from _shapes_in(inner)


def _open_safetensors(file: Path, weights: Mapping[str, Shape]) -> Counter[Shape]:
    from safetensors import safe_open

    with safe_open(str(file), framework="numpy") as opened:
        there = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    if weights and there != weights:
        other = {name for name, _ in there.items() ^ weights.items()}
        raise CheckpointError(f"safetensors finds other tensors in it, for one {min(other)!r}")
    return Counter(there.values())


def _open_distributed(folder: Path) -> Counter[Shape]:
    """Read the index, and of every file the smallest tensor."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    index = reader.read_metadata()
    smallest: dict[str, tuple[int, str]] = {}
    for place, info in (index.storage_data or {}).items():
        kind = index.state_dict_metadata.get(place.fqn)
        if isinstance(kind, TensorStorageMetadata):
            size = kind.size.numel() * kind.properties.dtype.itemsize
            smallest[info.relative_path] = min(
                smallest.get(info.relative_path, (size, place.fqn)), (size, place.fqn)
            )
    wanted = {}
    for size, name in smallest.values():
        kind = index.state_dict_metadata[name]
        if size <= _SAMPLE and isinstance(kind, TensorStorageMetadata):
            wanted[name] = torch.empty(kind.size, dtype=kind.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single process
        load(wanted, storage_reader=reader, no_dist=True)
    kinds = index.state_dict_metadata.values()
    return Counter(tuple(kind.size) for kind in kinds if isinstance(kind, TensorStorageMetadata))
