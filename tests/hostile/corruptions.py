"""Seeded damage to the files of a checkpoint: what disks, networks, people and attackers do to them.

Each function takes the checkpoint's root and a random generator, changes the directory, and says what it
did. ``corrupt`` picks one or several.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Damage = Callable[[Path, random.Random], str]

#: values that break what expects another kind of value
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "nan", "../x", "\0", "é\ud800", [], {}, [[]], [0], {"": 0}, "1000", "F64", [1, 2], [10**15],
)  # fmt: skip


class Canary:
    """An object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def files_of(root: Path) -> list[Path]:
    """Regular files, sorted."""
    if root.is_file():
        return [root]
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def _pick(root: Path, rng: random.Random, *suffixes: str) -> Path | None:
    found = [path for path in files_of(root) if not suffixes or path.name.endswith(suffixes)]
    return rng.choice(found) if found else None


def _any(root: Path, rng: random.Random) -> Path:
    path = _pick(root, rng)
    assert path is not None
    return path


def flip_bits(root: Path, rng: random.Random) -> str:
    """A few bits anywhere in one file."""
    return _flip(_any(root, rng), rng, 0.0, 1.0)


def flip_head(root: Path, rng: random.Random) -> str:
    """A few bits in the first kilobytes: headers, pickles, JSON."""
    return _flip(_any(root, rng), rng, 0.0, None)


def flip_tail(root: Path, rng: random.Random) -> str:
    """A few bits in the last kilobytes: directories of archives."""
    return _flip(_any(root, rng), rng, None, 1.0)


def _flip(path: Path, rng: random.Random, low: float | None, high: float | None) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return f"{path.name} is empty already"
    first = max(0, len(data) - 3000) if low is None else 0
    last = min(len(data), 3000) if high is None else len(data)
    places = [rng.randrange(first, last) for _ in range(rng.choice((1, 1, 2, 8)))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bits flipped in {path.name} at {places}"


def lost_sector(root: Path, rng: random.Random) -> str:
    """Zeros or noise in place of a sector."""
    path = _any(root, rng)
    data = bytearray(path.read_bytes())
    size = rng.choice((1, 8, 64, 512, 4096))
    start = rng.randrange(max(1, len(data)))
    size = len(data[start : start + size])
    data[start : start + size] = bytes(size) if rng.random() < 0.5 else rng.randbytes(size)
    path.write_bytes(data)
    return f"{size} bytes lost in {path.name} at {start}"


def truncate(root: Path, rng: random.Random) -> str:
    """A file that ends early."""
    path = _any(root, rng)
    size = path.stat().st_size
    keep = rng.choice((0, 1, 7, 8, 9, max(0, size - 1), rng.randrange(size + 1)))
    path.write_bytes(path.read_bytes()[:keep])
    return f"{path.name} cut to {keep} of {size}"


def grow(root: Path, rng: random.Random) -> str:
    """A file with something behind, or before, or inside."""
    path = _any(root, rng)
    data = path.read_bytes()
    extra = rng.choice((b"\0", b"\n", rng.randbytes(100), bytes(4096), data))
    at = rng.choice((len(data), len(data), 0, rng.randrange(len(data) + 1)))
    path.write_bytes(data[:at] + extra + data[at:])
    return f"{path.name}: {len(extra)} bytes put in at {at} of {len(data)}"


def remove(root: Path, rng: random.Random) -> str:
    """A file that is not there."""
    path = _any(root, rng)
    path.unlink()
    return f"{path.name} removed"


def rename(root: Path, rng: random.Random) -> str:
    """A file under another name: a new one, or another file's."""
    path, other = _any(root, rng), _any(root, rng)
    name = rng.choice((path.name + ".bak", "model.safetensors", "x", other.name, path.name.upper()))
    path.rename(root / name)
    return f"{path.name} renamed to {name}"


def swap(root: Path, rng: random.Random) -> str:
    """Two files that changed names."""
    suffix = rng.choice(("", ".safetensors", ".json", ".pt"))
    one, other = _pick(root, rng, suffix) or _any(root, rng), _pick(root, rng, suffix) or _any(root, rng)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one.name} and {other.name} swapped"


def duplicate(root: Path, rng: random.Random) -> str:
    """A file there twice."""
    path = _any(root, rng)
    name = rng.choice(
        (
            "copy-" + path.name, "model.safetensors", "model-00099-of-00099.safetensors", "optimizer.bin",
            "optimizer_1.pt", "pytorch_model.bin", "x.safetensors", "config.json~", "sub/" + path.name,
        )
    )  # fmt: skip
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(path.read_bytes())
    return f"{path.name} is also {name}"


def replaced(root: Path, rng: random.Random) -> str:
    """Something that is no regular file in a file's place."""
    path = _any(root, rng)
    path.unlink()
    kind = rng.choice(("folder", "fifo", "dangling", "loop", "outside", "sibling"))
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        targets = {
            "dangling": "nowhere",
            "loop": path.name,
            "outside": "/etc/hostname",
            "sibling": "config.json",
        }
        path.symlink_to(targets[kind])
    return f"{path.name} is a {kind}"


def edit_config(root: Path, rng: random.Random) -> str:
    """One value, key or object of config.json, or of any JSON file where there is none."""
    return _edit_file(_pick(root, rng, "config.json") or _pick(root, rng, ".json"), rng)


def edit_json(root: Path, rng: random.Random) -> str:
    """One value, key or object of a JSON file that is not the config."""
    return _edit_file(_pick(root, rng, "state.json", "index.json"), rng)


def _edit_file(path: Path | None, rng: random.Random) -> str:
    if path is None:
        return "no JSON file to edit"
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return f"{path.name} is no JSON any more"
    said = _edit_tree(data, rng)
    text = json.dumps(data, indent=2)
    if rng.random() < 0.1:
        text = rng.choice((text[:-1], text + "}", "[" * 100_000, text.replace(":", "", 1), "\ufeff" + text))
        said += " and the syntax"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return f"{path.name}: {said}"


def _edit_tree(data: Any, rng: random.Random) -> str:
    """Change one place of a tree of dicts and lists, in place."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    if isinstance(data, (dict, list)):
        walk(data)
    if not places:
        return "nothing to edit"
    node, key = rng.choice(places)
    before = node[key]
    kind = rng.choice(("odd", "odd", "near", "near", "delete", "rename", "copy"))
    if kind == "near" and isinstance(before, (int, float)) and not isinstance(before, bool):
        node[key] = rng.choice((before + 1, before - 1, before * 2, before // 2, -before, before + 0.5))
    elif kind == "delete":
        del node[key]
        return f"{key!r} deleted"
    elif kind == "rename" and isinstance(node, dict):
        node[key + "x"] = node.pop(key)
        return f"{key!r} renamed"
    elif kind == "copy":
        other, name = rng.choice(places)
        node[key] = other[name] if other in (node,) or not isinstance(other[name], (dict, list)) else 0
    else:
        node[key] = rng.choice(ODD)
    return f"{key!r}: {str(before)[:40]!r} -> {str(node[key])[:40]!r}"


def edit_header(root: Path, rng: random.Random) -> str:
    """An entry of a safetensors header: another dtype, shape, place or name."""
    path = _pick(root, rng, ".safetensors")
    if path is None:
        return edit_json(root, rng)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    kind = rng.choice(
        ("tree", "dtype", "transpose", "flatten", "swap", "rename", "exchange", "twice", "absurd", "length")
    )
    if kind == "tree":
        kind += ": " + _edit_tree(header, rng)
    elif kind == "dtype":
        entry["dtype"] = rng.choice(("I32", "F16", "BF16", "F64", "U8", "BOOL", "F8_E4M3", "I64", "f32"))
    elif kind == "transpose":
        entry["shape"] = entry["shape"][::-1]
    elif kind == "flatten":
        entry["shape"] = rng.choice(([math.prod(entry["shape"])], [1, *entry["shape"]], [*entry["shape"], 0]))
    elif kind == "swap":
        header[name]["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            header[name]["data_offsets"],
        )
    elif kind == "rename":
        header[rng.choice((name + "x", "model." + name, "", "__metadata__x", "a/../b"))] = header.pop(name)
    elif kind == "exchange":
        header[name], header[other] = header[other], header[name]
    elif kind == "absurd":
        entry["shape"] = rng.choice(([10**15], [2**62, 4], [2**64, 0], [1] * 1000, [0, 10**18]))
    text = json.dumps(header)
    if kind == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    raw = text.encode("utf-8", "surrogatepass")
    stated = rng.choice((0, len(raw) + 1, 2**63, 2**40, 99)) if kind == "length" else len(raw)
    path.write_bytes(struct.pack("<Q", stated) + raw + data[8 + length :])
    return f"header of {path.name}: {name!r}: {kind}"


def edit_weights(root: Path, rng: random.Random) -> str:
    """NaN, Inf and other numbers in a weight file that is otherwise sound."""
    path = _pick(root, rng, ".safetensors")
    if path is None:
        return flip_bits(root, rng)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    value = rng.choice((math.nan, math.inf, -math.inf, 0.0, 1e38, -1.5))
    place = rng.randrange(start, len(data) - 4) // 4 * 4
    place += (start - place) % 4
    data[place : place + 4] = struct.pack("<f", value)
    path.write_bytes(data)
    return f"{path.name}: {value} at {place}"


def edit_optimizer(root: Path, rng: random.Random) -> str:
    """A state dict that was edited and saved again."""
    path = _pick(root, rng, "optimizer.pt")
    if path is None:
        return flip_bits(root, rng)
    try:
        data = torch.load(path, weights_only=True)
        state, groups = data["state"], data["param_groups"]
        number, other = rng.choice(list(state)), rng.choice(list(state))
        group = rng.choice(groups)
        numbers = group["params"]
    except Exception:
        return f"{path.name} cannot be edited any more"
    slot = rng.choice(("step", "exp_avg", "exp_avg_sq"))

    def put(key: Any, value: Any) -> Callable[[], Any]:
        return lambda: state[number].__setitem__(key, value)

    tensor = state[number][slot]
    edits: dict[str, Callable[[], Any]] = {
        "drop a state": lambda: state.pop(number),
        "drop a slot": lambda: state[number].pop(slot),
        "a strange slot": put("strange", torch.randn(3, 5)),
        "a strange value": put("strange", rng.choice(ODD)),
        "another shape": put(slot, torch.zeros(rng.choice(((1,), (3, 5), (0,), ())))),
        "transposed": put(slot, tensor.T.contiguous() if tensor.ndim == 2 else tensor.reshape(1, -1)),
        "a view": put(slot, tensor.T if tensor.ndim == 2 else tensor),
        "expanded": put(slot, torch.zeros(()).expand(tensor.shape)),
        "another dtype": put(slot, tensor.to(rng.choice((torch.int64, torch.float16, torch.complex64)))),
        "not finite": put(slot, torch.full_like(tensor, rng.choice((math.nan, math.inf)))),
        "a number": put(slot, rng.choice((3, 3.5, None, "3", [1]))),
        "shared": put(slot, state[other][slot]),
        "exchanged": lambda: state.update({number: state[other], other: state[number]}),
        "renumbered": lambda: state.update({rng.choice((99, -1, "0", "a", 1.5)): state.pop(number)}),
        "group shuffled": lambda: rng.shuffle(numbers),
        "group reversed": lambda: numbers.reverse(),
        "group misses one": lambda: numbers.pop(rng.randrange(len(numbers))),
        "group has one twice": lambda: numbers.append(rng.choice(numbers)),
        "group has a stranger": lambda: numbers.append(99),
        "groups exchanged": lambda: groups.reverse(),
        "a group less": lambda: groups.pop(),
        "a group more": lambda: groups.append(dict(group)),
        "no groups": groups.clear,
        "no state": state.clear,
        "a group's value": lambda: group.__setitem__(rng.choice(list(group)), rng.choice(ODD)),
        "betas": lambda: group.__setitem__(
            "betas", rng.choice(((0.9,), (2.0, 3.0), "ab", (None, 1), (0.9, 1.0)))
        ),
        "params": lambda: group.__setitem__("params", rng.choice((None, 3, "abc", [None], [[0]], {}))),
        "names": lambda: group.__setitem__("param_names", rng.choice(([], ["x"] * len(numbers), None, 3))),
        "top": lambda: data.__setitem__(
            rng.choice(("state", "param_groups")), rng.choice(([], {}, None, [3]))
        ),
        "more": lambda: data.__setitem__("more", rng.choice(ODD)),
    }
    kind = rng.choice(list(edits))
    edits[kind]()
    torch.save(data, path)
    return f"{path.name}: state {number}.{slot}: {kind}"


def edit_scheduler(root: Path, rng: random.Random) -> str:
    """Odd values in the scheduler's state."""
    path = root / "scheduler.pt"
    if not path.is_file():
        return flip_bits(root, rng)
    try:
        data = torch.load(path, weights_only=True)
        key = rng.choice(list(data))
        data[key] = rng.choice(ODD)
    except Exception:
        return f"{path.name} cannot be edited any more"
    torch.save(data, path)
    return f"{path.name}: {key!r} -> {data[key]!r}"


def inject(root: Path, rng: random.Random) -> str:
    """A pickle that would make a folder ``canary`` beside the checkpoint if it were executed."""
    path = _pick(root, rng, ".pt", ".pth", ".bin") or root / "training_args.bin"
    bait = Canary(root.parent / "canary")
    try:
        content = torch.load(path, weights_only=True)
    except Exception:
        content = None
    if isinstance(content, dict):
        content[rng.choice(("x", "state", "base_lrs"))] = bait
    else:
        content = bait
    torch.save(content, path)
    return f"{path.name} holds code"


def tamper_archive(root: Path, rng: random.Random) -> str:
    """Fields of a torch archive's directory, local headers and descriptors."""
    path = _pick(root, rng, ".pt", ".pth", ".bin")
    if path is None:
        return flip_tail(root, rng)
    data = bytearray(path.read_bytes())
    magic = rng.choice(
        (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08")
    )
    places = [i for i in range(len(data)) if data.startswith(magic, i)]
    if not places:
        return f"{path.name} is no archive any more"
    at = rng.choice(places) + rng.randrange(4, 46)
    value = rng.choice((b"\0", b"\1", b"\xff", b"\xff\xff\xff\xff", rng.randbytes(4), b"/../"))
    data[at : at + len(value)] = value
    path.write_bytes(data[: max(len(data), at)])
    return f"{path.name}: {value!r} at {at} behind {magic!r}"


DAMAGES: tuple[Damage, ...] = (
    flip_bits, flip_head, flip_head, flip_tail, lost_sector, truncate, grow, remove, rename, swap, duplicate,
    replaced, edit_config, edit_config, edit_json, edit_json, edit_header, edit_header, edit_header,
    edit_weights, edit_optimizer, edit_optimizer, edit_optimizer, edit_scheduler, inject, tamper_archive,
)  # fmt: skip


def corrupt(root: Path, rng: random.Random, damages: tuple[Damage, ...] = DAMAGES) -> str:
    """Damage a checkpoint once, sometimes twice or three times; says how."""
    said = [rng.choice(damages)(root, rng) for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 3)))]
    return "; ".join(said)
