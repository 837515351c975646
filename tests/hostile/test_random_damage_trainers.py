"""What pre-training trainers leave: the same bytes again, killed runs, random damage refused in words."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from sparkling_cli import api
from tests.formats import (
    make_megatron_dist,
    make_nanochat,
    test_composer,
    test_lingua,
    test_megatron_legacy,
    test_olmo,
)
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
    "megatron, in buckets": (make_megatron_dist.make_megatron_dist, ""),
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


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a folder by its place in it; of a file its bytes."""
    files = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_bytes_again(tmp_path: Path, kind: str) -> None:
    """Another number of threads writes the same bytes."""
    make, name = MAKERS[kind]
    make(tmp_path / "run")
    found = []
    for threads in (1, 3):
        target = tmp_path / str(threads) / "wide"
        target.parent.mkdir()
        api.expand(tmp_path / "run" / name, target, axes=AXES, report="none", threads=threads)
        found.append(contents(target))
    assert found[0]
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_killed(tmp_path: Path, kind: str) -> None:
    """SIGKILL at random moments of the command: the source unchanged, no output or a whole one.

    The run after a kill is whole, whatever the kill left in its place.
    """
    make, name = MAKERS[kind]
    make(tmp_path / "run")
    axes = [f"--axis={entry['axis']}={entry['factor']}" for entry in AXES]
    command = [sys.executable, "-m", "sparkling_cli", "expand", str(tmp_path / "run" / name)]
    command += ["wide", *axes, "--report=none"]
    (tmp_path / "whole").mkdir()
    start = time.monotonic()
    subprocess.run(command, cwd=tmp_path / "whole", check=True, capture_output=True)
    duration = time.monotonic() - start
    before, whole = contents(tmp_path / "run"), contents(tmp_path / "whole" / "wide")
    rng = random.Random(kind)
    for number in range(4):
        place = tmp_path / str(number)
        place.mkdir()
        child = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(duration * rng.uniform(0.5, 1.05))
        child.kill()
        child.wait()
        assert contents(tmp_path / "run") == before
        if not (place / "wide").exists():
            subprocess.run(command, cwd=place, check=True, capture_output=True)
        assert contents(place / "wide") == whole
