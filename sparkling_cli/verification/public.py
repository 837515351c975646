"""Files of an output opened by the libraries that trainers open them with.

What our own readers open need not be what others can: safetensors, ``torch.load`` with ``weights_only``,
torch's distributed checkpoints and JSON are asked themselves. Nothing large is brought into memory: files are
mapped.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checkpoint

#: bytes of tensors of a distributed checkpoint that are loaded to see whether a file of it can be
_SAMPLE = 1 << 26
_INDEX = ".metadata"


def unreadable(output: Checkpoint, files: Collection[str], source: Path | None) -> list[str]:
    """Files that their own libraries do not open, or in which they find other tensors than we do.

    Args:
        output: as our own reader sees it.
        files: written files, relative to its root; those that were carried over unchanged left out.
        source: the checkpoint that it was made from; what cannot be opened there needs not be here.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, key in output.weights.items():
        stored = output.tensors[key]
        for path in {extent.path for extent in stored.extents}:
            shapes.setdefault(path, {})[name] = stored.shape
    found = []
    for path in sorted(files):
        try:
            _open(output.root, path, shapes.get(path, {}))
        except Exception as error:  # whatever the library raises on a file that it cannot read
            if source is None or not _fails(source, path):
                text = " ".join(str(error).split())
                found.append(f"{path or output.root.name} cannot be loaded: {text:.300}")
    return found


def _fails(root: Path, path: str) -> bool:
    """Whether the source's file of that name cannot be opened either."""
    try:
        _open(root, path, {})
    except FileNotFoundError:
        return False
    except Exception:  # see above
        return True
    return False


def _open(root: Path, path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Open a file by its own library.

    Args:
        root: of the checkpoint.
        path: of the file.
        shapes: name -> shape of the weights in it, where its names are theirs.

    Raises:
        Exception: it cannot be opened, or has other tensors.
    """
    file = root / path if path else root
    if file.suffix == ".json":
        json.loads(file.read_bytes())
    elif file.suffix == ".safetensors":
        _open_safetensors(file, shapes)
    elif find_spec("torch") is None:
        return
    elif file.name == _INDEX:
        _open_distributed(file.parent)
    elif zipfile.is_zipfile(file):
        import torch

        torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def _open_safetensors(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    from safetensors import safe_open

    with safe_open(str(file), framework="numpy") as opened:
        names = set(opened.keys())
        other = names ^ set(shapes)
        other |= {
            name for name in names & set(shapes) if tuple(opened.get_slice(name).get_shape()) != shapes[name]
        }
    if shapes and other:
        raise CheckpointError(f"safetensors finds other tensors in it, for one {min(other)!r}")


def _open_distributed(folder: Path) -> None:
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
