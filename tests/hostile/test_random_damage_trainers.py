"""Random damage to what pre-training trainers leave: refused in words, or an output that is sound."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.formats import make_nanochat, test_composer, test_lingua, test_megatron_legacy, test_olmo
from tests.hostile.test_random_damage import damaged, outcome

AXES = [{"axis": axis, "factor": 2} for axis in ("hidden", "kv_heads", "ffn")]


def composer(root: Path) -> None:
    """A rank file in a folder of its own."""
    root.mkdir()
    torch.save(test_composer.made()[1], root / "ep0-ba5-rank0.pt")


#: trainer -> how its checkpoint is made in a folder, and what of the folder is named
MAKERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nanochat": (lambda root: make_nanochat.make_nanochat(root, ranks=2), ""),
    "megatron": (lambda root: test_megatron_legacy.make_megatron(root, 2, 1), ""),
    "composer": (composer, "ep0-ba5-rank0.pt"),
    "olmo": (test_olmo.make_olmo, ""),
    "lingua": (test_lingua.make_lingua, ""),
}


def loads(root: Path) -> None:
    """Every file by its own library."""
    for path in [root] if root.is_file() else root.rglob("*"):
        if path.suffix in (".pt", ".pth"):
            torch.load(path, weights_only=False)
        elif path.suffix == ".json" and "sparkling" not in path.parts:
            json.loads(path.read_text())
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.survey)])
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.timeout(3600)
def test_damaged_trainers(tmp_path: Path, kind: str, count: int) -> None:
    """One file of the checkpoint is damaged, in a way that the seed says."""
    make, name = MAKERS[kind]
    make(tmp_path / "run")
    source = tmp_path / "run" / name
    assert outcome(source, tmp_path / "whole", loads, axes=AXES) == "accepted"
    rng = random.Random(f"{kind} {count}")
    files = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())
    tally: Counter[str] = Counter()
    faults = []
    for number in range(count):
        path = rng.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng, path.suffix == ".json"))
        found = outcome(source, tmp_path / f"out{number}", loads, axes=AXES)
        tally[found.split(":")[0]] += 1
        if found not in ("refused", "accepted"):
            faults.append(f"--- damage {number} to {path.name}: {found}")
        path.write_bytes(whole)
        for left in tmp_path.glob(f"*out{number}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert not faults, f"{len(faults)} of {count}\n" + "\n".join(faults[:4])
    assert tally["refused"] > 0, tally
