"""Checkpoints of plain safetensors directories, opened without the package's own readers."""

from __future__ import annotations

import json
from pathlib import Path

from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.storage.tensors import Extent, StoredTensor

NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


def opened(directory: Path) -> Checkpoint:
    """The weights of a directory, without optimizer state."""
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            shape = tuple(entry["shape"])
            place = Extent(file.name, 8 + size + entry["data_offsets"][0], (0,) * len(shape), shape)
            tensors[name] = StoredTensor(NAMES[entry["dtype"]], shape, (place,))
    config = directory / "config.json"
    return Checkpoint(
        root=directory,
        format="test",
        tensors=tensors,
        weights={name: name for name in tensors},
        config=json.loads(config.read_text()) if config.is_file() else None,
    )
