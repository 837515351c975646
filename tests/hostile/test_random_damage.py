"""Random damage to a valid checkpoint's files: an error of ours or a right result, and never a hang."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.api import CheckpointException

from sparkling_cli import api
from sparkling_cli.errors import SparklingError

SECONDS = 10
AXES = [{"axis": "ffn", "factor": 1.5}]


class Hang(BaseException):
    """It took too long; no ``Exception``, so that nobody swallows it."""


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise :class:`Hang` in the main thread after that much processor time (loaded machines are slow)."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def damaged(content: bytes, rng: random.Random, json_like: bool) -> bytes:
    """One random change."""
    if json_like and rng.random() < 0.6:
        try:
            return json.dumps(_mutated(json.loads(content), rng)).encode()
        except ValueError:
            pass
    data = bytearray(content)
    # headers and directories lie at the ends, so damage is drawn there
    spot = rng.choice([rng.randrange(len(data)), min(rng.randrange(3000), len(data) - 1)])
    spot = rng.choice([spot, len(data) - 1 - min(rng.randrange(3000), len(data) - 1)])
    kind = rng.choice(["bit", "noise", "cut", "zeros", "insert", "double", "remove", "number"])
    if kind == "bit":
        data[spot] ^= 1 << rng.randrange(8)
    elif kind == "noise":
        data[spot : spot + 16] = rng.randbytes(len(data[spot : spot + 16]))
    elif kind == "cut":
        del data[spot:]
    elif kind == "zeros":
        data[spot : spot + 64] = bytes(len(data[spot : spot + 64]))
    elif kind == "insert":
        data[spot:spot] = rng.randbytes(rng.randrange(1, 9))
    elif kind == "double":
        data[spot:spot] = data[spot : spot + 100]
    elif kind == "remove":
        del data[spot : spot + rng.randrange(1, 20)]
    else:
        data[spot : spot + 8] = rng.choice([2**63 - 1, 2**64 - 1, 1, 2**32]).to_bytes(8, "little")
    return bytes(data)


def _mutated(value: Any, rng: random.Random) -> Any:
    """Plain data with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        changed = dict(value)
        if rng.random() < 0.15:
            del changed[key]
        else:
            changed[key] = _mutated(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        changed_list = list(value)
        at = rng.randrange(len(value))
        changed_list[at] = _mutated(value[at], rng)
        return changed_list
    return rng.choice(
        [
            None,
            True,
            -1,
            0,
            1,
            7,
            2**40,
            10**400,
            1.5,
            float("nan"),
            "",
            "x",
            "../../etc/passwd",
            [],
            {},
            [[]],
        ]
    )


def outcome(source: Path, target: Path, loads: Callable[[Path], object], **options: Any) -> str:
    """``refused``, ``accepted`` (and proved right), or what went wrong.

    Args:
        source: a checkpoint, damaged or not.
        target: where its expansion goes.
        loads: reads the output by its own library.
        options: of ``api.expand``.
    """
    try:
        with limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            api.expand(source, target, report="none", **options)
    except SparklingError as error:
        left = [path.name for path in target.parent.iterdir() if target.name in path.name]
        if left:
            return f"left behind: {left}"
        return "refused" if error.message.strip() else "an error without words"
    except Hang:
        return f"more than {SECONDS} s: {traceback.format_exc()[-700:]}"
    except BaseException:
        return traceback.format_exc()[-1500:]
    try:
        api.verify(source, target)
        loads(target)
    except (Exception, CheckpointException):  # which is no Exception
        return "accepted, but not right: " + traceback.format_exc()[-1500:]
    return "accepted"


def loads_trainer(root: Path) -> None:
    """Weights and optimizer of a Trainer's checkpoint."""
    for path in root.glob("*.safetensors"):
        safetensors.torch.load_file(path)
    if (root / "optimizer.pt").exists():
        torch.load(root / "optimizer.pt", weights_only=True)


def fuzz(original: Path, folder: Path, count: int, seed: int, names: list[str]) -> dict[str, int]:
    """Damage files one after the other; how often what came of it.

    Raises:
        AssertionError: something came of it that must not; shows the first few.
    """
    rng = random.Random(seed)
    source = folder / original.name
    shutil.copytree(original, source)
    tally: dict[str, int] = {}
    faults = []
    # an undamaged run first: imports are slow, and breaking one off would spoil the process
    api.expand(source, folder / "whole", axes=AXES, report="none")
    for number in range(count):
        name = rng.choice(names)
        path = source / name
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng, name.endswith(".json")))
        target = folder / f"out{number}"
        found = outcome(source, target, loads_trainer, axes=AXES)
        tally[found.split(":")[0][:20]] = tally.get(found.split(":")[0][:20], 0) + 1
        if found not in ("refused", "accepted"):
            faults.append(f"--- damage {number} (seed {seed}) to {name}: {found}")
        shutil.rmtree(target, ignore_errors=True)
        path.write_bytes(whole)
    report = os.environ.get("SPARKLING_FUZZ_REPORT")
    if report:
        Path(report).write_text(f"{tally}\n" + "\n".join(faults))
    assert not faults, f"{len(faults)} of {count}\n" + "\n".join(faults[:4])
    return tally


FILES = ["model.safetensors", "optimizer.pt", "config.json", "scheduler.pt", "trainer_state.json"]
FILES += ["training_args.bin", "model.safetensors", "optimizer.pt"]


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.survey)])
@pytest.mark.timeout(3600)
def test_damaged_trainer_checkpoint(dense_checkpoint: Path, tmp_path: Path, count: int) -> None:
    """Any damage to any file of a Trainer's checkpoint."""
    tally = fuzz(dense_checkpoint, tmp_path, count, count, FILES)
    assert tally.get("refused", 0) > count // 4
    assert tally.get("accepted", 0) > 0


def test_a_run_longer_than_any_number(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Found by the fuzzer: a step count too large for a float is refused in words."""
    source = tmp_path / dense_checkpoint.name
    shutil.copytree(dense_checkpoint, source)
    state = json.loads((source / "trainer_state.json").read_bytes())
    state["max_steps"] = 10**400
    (source / "trainer_state.json").write_text(json.dumps(state))
    assert outcome(source, tmp_path / "out", loads_trainer, axes=AXES) in ("refused", "accepted")
