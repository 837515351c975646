"""Random damage to DCP directories and single files, and to what ``inspect`` is given."""

from __future__ import annotations

import random
import shutil
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError, SparklingError
from tests.formats.make_dcp import save_single
from tests.formats.make_nanogpt import make_nanogpt
from tests.formats.test_singlefile import _layout_file
from tests.hostile.test_random_damage import SECONDS, Hang, damaged, limit, outcome

AXES = [{"axis": "hidden", "factor": 2}, {"axis": "heads", "factor": 2}, {"axis": "ffn", "factor": 2}]


def loads_dcp(path: Path) -> None:
    """Everything in a DCP directory, as torch's own converter reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(path, path.with_name(path.name + ".loaded"))


def loads_file(path: Path) -> None:
    """Everything in a torch file."""
    torch.load(path, weights_only=True)


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.survey)])
@pytest.mark.parametrize("kind", ["dcp", "file"])
@pytest.mark.timeout(3600)
def test_damaged_formats(tmp_path: Path, kind: str, count: int) -> None:
    """Refused with nothing left, or an output that its own loader reads."""
    source = tmp_path / ("step-3" if kind == "dcp" else "ckpt.pt")
    layout = _layout_file(tmp_path, head_dim=5 if kind == "dcp" else 8)
    loads = loads_dcp if kind == "dcp" else loads_file
    if kind == "dcp":
        save_single(source)
    else:
        make_nanogpt(source)
    assert outcome(source, tmp_path / "whole", loads, axes=AXES, layout=layout) == "accepted"
    rng = random.Random(count)
    files = sorted(p for p in source.rglob("*") if p.is_file()) if kind == "dcp" else [source]
    tally: Counter[str] = Counter()
    faults = []
    for number in range(count):
        path = rng.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng, json_like=False))
        target = tmp_path / f"out{number}"
        found = outcome(source, target, loads, axes=AXES, layout=layout)
        tally[found.split(":")[0]] += 1
        if found not in ("refused", "accepted"):
            faults.append(f"--- damage {number} to {path.name}: {found}")
        path.write_bytes(whole)
        shutil.rmtree(target, ignore_errors=True)
        for left in tmp_path.glob(f"out{number}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert not faults, f"{len(faults)} of {count}\n" + "\n".join(faults[:4])
    assert tally["refused"] > count // 4, tally
    assert tally["accepted"] > 0, tally


def test_a_damaged_object_beside_the_tensors(tmp_path: Path) -> None:
    """What is carried over is checked against its own checksums; without any it is left alone."""
    source = tmp_path / "step-3"
    save_single(source)
    layout = _layout_file(tmp_path, head_dim=5)
    path = next(source.glob("*.distcp"))
    content = path.read_bytes()
    at = content.index(b"kept")  # a word in the training loop's own state
    path.write_bytes(content[:at] + b"lost" + content[at + 4 :])
    with pytest.raises(CheckpointError, match=r"train_state.*is damaged.*CRC"):
        api.expand(source, tmp_path / "out", axes=AXES, report="none", layout=layout)
    torch.serialization.set_crc32_options(False)
    try:
        shutil.rmtree(source)
        save_single(source)
    finally:
        torch.serialization.set_crc32_options(True)
    assert outcome(source, tmp_path / "unsummed", loads_dcp, axes=AXES, layout=layout) == "accepted"


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.survey)])
@pytest.mark.timeout(3600)
def test_inspect_of_damaged_outputs(dense_checkpoint: Path, tmp_path: Path, count: int) -> None:
    """Measured, or refused in words; never a crash, never a hang."""
    made = tmp_path / "made"
    api.expand(dense_checkpoint, made, axes=[{"axis": "ffn", "factor": 2}], report="none")
    api.inspect(made)
    rng = random.Random(count)
    files = sorted(p for p in made.rglob("*") if p.is_file() and p.suffix != ".html")
    tally: Counter[str] = Counter()
    for number in range(count):
        path = rng.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng, path.suffix == ".json"))
        options: dict[str, Any] = {"against": dense_checkpoint} if rng.random() < 0.5 else {}
        try:
            with limit(6 * SECONDS):
                api.inspect(made, **options)
            tally["measured"] += 1
        except SparklingError as error:
            assert error.message.strip()
            tally["refused"] += 1
        except (Exception, Hang) as error:
            raise AssertionError(
                f"damage {number} to {path.name}: {traceback.format_exc()[-1500:]}"
            ) from error
        path.write_bytes(whole)
    assert tally["refused"] > 0, tally
