"""The weight files of a model directory: one file or shards with an index, safetensors or torch files.

What an index says and what the files hold must agree exactly; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.deeper import by_source, renamed
from sparkling_cli.formats.directory import inside, literal_file, read_json
from sparkling_cli.formats.model import Declared, OutputFile, Pairs
from sparkling_cli.formats.other_files import OpenFile
from sparkling_cli.formats.safetensors import lay_out_safetensors, read_safetensors
from sparkling_cli.formats.statedict import bare_names
from sparkling_cli.formats.torchfile import (
    TensorNode,
    TorchFile,
    lay_out,
    lay_out_state_dict,
    read_torch_file,
)
from sparkling_cli.storage.tensors import ITEM_BYTES, StoredTensor

#: Where transformers looks for weights, in its order.
SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
#: Where FSDP with full state dicts puts them; beside it the Trainer writes the others, accelerate does not.
FSDP_FULL = "pytorch_model_fsdp.bin"
CANDIDATES = (SINGLE[0], INDEX[0], SINGLE[1], INDEX[1], FSDP_FULL)


@dataclass(frozen=True)
class WeightFiles:
    """All weight files of a directory, parsed.

    Attributes:
        index: relative path of the index, "" without one.
        index_metadata: its ``metadata``.
        names: name in the files -> key. Keys are these names; tied ones that share bytes share a key.
        tensors: key -> place.
        files: by relative path.
    """

    index: str
    index_metadata: Mapping[str, Any]
    names: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    files: dict[str, OpenFile] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, str]:
        """Weight name, without what wrappers (compilation, data parallelism) put in front -> key.

        Raises:
            CheckpointError: two names become one.
        """
        bare = bare_names(self.names)
        return {bare[name]: key for name, key in self.names.items()}

    @property
    def paths(self) -> frozenset[str]:
        """Every file that holds weights or says where they are."""
        return frozenset(self.files) | ({self.index} if self.index else set())


def deeper_weights(files: WeightFiles, pairs: Pairs) -> WeightFiles:
    """The files as those of a deeper model, whose tensors are read where those of the shallower one lie.

    Args:
        files: the source's.
        pairs: each weight of the deeper model and the one of the source that it is read from.

    Raises:
        CheckpointError: a wrapper's name stands inside a weight's.
    """
    bare, names = bare_names(files.names), by_source(pairs)
    found = WeightFiles(files.index, dict(files.index_metadata), files=files.files)
    keys: dict[tuple[str, int], str] = {}
    for name, key in files.names.items():
        for copy, other in enumerate(names.get(bare[name], (bare[name],))):
            own = keys.setdefault((key, copy), renamed(name, bare[name], other))  # tied names share a key
            found.names[renamed(name, bare[name], other)] = own
            found.tensors[own] = files.tensors[key]
    if isinstance(found.index_metadata.get("total_parameters"), int):
        sizes = [sum(prod(t.shape) for t in one.tensors.values()) for one in (files, found)]
        metadata = {"total_parameters": found.index_metadata["total_parameters"] + sizes[1] - sizes[0]}
        found = replace(found, index_metadata={**found.index_metadata, **metadata})
    return found


def find_weights(root: Path) -> str | None:
    """The file that transformers (failing that, FSDP) would load weights by, or None."""
    return next((name for name in CANDIDATES if (root / name).is_file()), None)


def read_weights(root: Path, present: Sequence[str]) -> WeightFiles:
    """Open the weight files of a directory.

    Args:
        root: the directory.
        present: all files in it.

    Raises:
        CheckpointError: no weights; index and files disagree; a shard is missing or left over; names twice.
    """
    entry = find_weights(root)
    if entry is None:
        raise CheckpointError(f"{root.name}: none of {', '.join(CANDIDATES)} is there")
    is_index = entry in INDEX
    kind = "safetensors" if "safetensors" in entry else "bin"
    shards: Mapping[str, list[str]] = {entry: []}
    metadata: Mapping[str, Any] = {}
    if is_index:
        shards, metadata = _read_index(root, entry)
    _check_left_over(entry, shards, present, kind)
    found = WeightFiles(entry if is_index else "", metadata)
    for relative in shards:
        path = inside(root, relative, entry)
        file: OpenFile
        if kind == "safetensors":
            file = read_safetensors(path, relative)
            names, tensors = {name: name for name in file.tensors}, file.tensors
        else:
            file = read_torch_file(path, relative)
            names, tensors = _named(file)
        if is_index:
            _check_shard(entry, relative, shards[relative], names)
        for name in names:
            if name in found.names:
                raise CheckpointError(f"{relative}: {name!r} is in another shard too")
        found.names.update(names)
        found.tensors.update(tensors)
        found.files[relative] = file
    return found


def _read_index(root: Path, entry: str) -> tuple[dict[str, list[str]], Mapping[str, Any]]:
    """Shards with the names that the index gives them, in order of first mention, and the metadata."""
    index = read_json(root, entry)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{entry}: its weight_map must map names to files")
    metadata = index.get("metadata", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{entry}: its metadata must be an object")
    shards: dict[str, list[str]] = {}
    for name, relative in weight_map.items():
        shards.setdefault(relative, []).append(name)
    for relative in shards:
        inside(root, relative, entry)
    return shards, metadata


def _check_left_over(entry: str, shards: Mapping[str, Any], present: Sequence[str], kind: str) -> None:
    """Refuse weight files of the same kind beside those that will be read."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for name in present:
        is_weights = "/" not in name and name.startswith(stem) and name.endswith(f".{kind}")
        if is_weights and name not in shards and name != FSDP_FULL:
            raise CheckpointError(
                f"{name}: lies beside {entry}, which does not name it; one of the two is left over",
                hint="move the file that does not belong to this model out of the directory",
            )
    if entry in SINGLE and INDEX[SINGLE.index(entry)] in present:
        raise CheckpointError(
            f"{entry} and {INDEX[SINGLE.index(entry)]} are both there; one of them is left over",
            hint="move the one that does not belong to this model out of the directory",
        )


def _check_shard(entry: str, relative: str, expected: list[str], names: Mapping[str, str]) -> None:
    missing = [name for name in expected if name not in names]
    extra = sorted(set(names) - set(expected))
    if missing:
        raise CheckpointError(f"{entry}: says that {missing[0]!r} is in {relative}, where it is not")
    if extra:
        raise CheckpointError(f"{relative}: holds {extra[0]!r}, which {entry} does not say")


def _named(file: TorchFile) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Names and tensors of a torch file, by the first name of each."""
    if not isinstance(file.tree, dict) or not all(isinstance(v, TensorNode) for v in file.tree.values()):
        raise CheckpointError(f"{file.relative}: expected a state dict: names and tensors, nothing else")
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    for key, path_in_tree in file.paths.items():
        name = str(path_in_tree[0])
        names[name] = first.setdefault(file.aliases.get(key, key), name)
    return names, {name: file.tensors[key] for key, name in first.items()}


def weight_outputs(weights: WeightFiles, declared: Sequence[Declared]) -> tuple[OutputFile, ...]:
    """Lay out every weight file, and the index where there was one.

    Args:
        weights: the source's.
        declared: all output weights.

    Raises:
        CheckpointError: a dtype that the format does not have, or names twice.
    """
    in_files = weights.weights  # names with what wrappers put in front
    if any(name != other for name, other in in_files.items()):
        declared = [item._replace(name=in_files.get(item.name, item.name)) for item in declared]
    rows: dict[str, list[Declared]] = {}
    for item in declared:
        rows.setdefault(item.source_file, []).append(item)
    files = []
    for relative, parsed in weights.files.items():
        own = rows.pop(relative, [])
        if not own and weights.index:
            continue  # all that it held went into fused tensors of other shards
        if isinstance(parsed, TorchFile):
            files.append(_torch_output(parsed, own))
        else:
            plain = ((d.key, d.name, d.dtype, d.shape) for d in own)
            files.append(lay_out_safetensors(relative, plain, parsed.metadata))
    assert not rows, f"weights of files that are not in the source: {sorted(rows)}"
    if weights.index:
        files.append(_index_output(weights, declared))
    return tuple(files)


def _torch_output(file: TorchFile, own: Sequence[Declared]) -> OutputFile:
    """The file with new shapes if the names are the source's, else a new state dict."""
    in_file = {str(path[0]): key for key, path in file.paths.items()}
    names = {name for name, key in in_file.items() if key not in file.aliases}
    if {d.name for d in own} != names:
        rows = ((d.key, d.name, d.dtype, d.shape) for d in own)
        return lay_out_state_dict(file.relative, rows, prefix=file.archive.prefix)
    keys = {in_file[d.name]: d for d in own}
    laid_out = lay_out(file, {key: (d.dtype, d.shape) for key, d in keys.items()})
    tensors = tuple((keys[key].key, extent) for key, extent in laid_out.tensors)
    return OutputFile(laid_out.path, laid_out.size, laid_out.literals, tensors, laid_out.checksums)


def _index_output(weights: WeightFiles, declared: Sequence[Declared]) -> OutputFile:
    """The index as transformers writes it; parameters are counted from what was added."""
    metadata = dict(weights.index_metadata)
    if "total_size" in metadata:
        metadata["total_size"] = sum(prod(d.shape) * ITEM_BYTES[d.dtype] for d in declared)
    if isinstance(metadata.get("total_parameters"), int):
        before = sum(prod(tensor.shape) for tensor in weights.tensors.values())
        metadata["total_parameters"] += sum(prod(d.shape) for d in declared) - before
    weight_map = {d.name: d.source_file for d in declared}
    for name, key in weights.names.items():
        if name != key and key in weight_map:
            weight_map[name] = weight_map[key]
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    return literal_file(weights.index, text.encode(), last=True)
