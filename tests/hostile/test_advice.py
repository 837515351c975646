"""Damaged files are refused with advice: every message says where, what was found, and what to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sparkling_cli import api
from sparkling_cli.errors import CheckpointError
from sparkling_cli.plan.model import Plan
from sparkling_cli.spec.sources import make_spec
from tests.conftest import TinyCheckpoint


@pytest.fixture
def source(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A copy of a tiny Trainer checkpoint."""
    copy = tmp_path / "checkpoint-3"
    shutil.copytree(tiny_checkpoint("llama"), copy)
    return copy


def planned(source: Path) -> Plan:
    """The plan of an expansion of the MLPs."""
    return api.make_plan(source, spec=make_spec({"axes": [{"axis": "ffn", "factor": 2}]})).plan


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "config.json", "scheduler.pt"])
def test_a_damaged_file_comes_with_advice(source: Path, name: str) -> None:
    """Where, what, and what to do."""
    data = (source / name).read_bytes()
    for content in (data[:-2], data[: len(data) // 2], b"", bytes(len(data)), data + b"x"):
        (source / name).write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            planned(source)
        assert name in caught.value.message and caught.value.hint


def test_a_pipe_in_a_files_place(source: Path) -> None:
    """The message says what was found."""
    (source / "optimizer.pt").unlink()
    os.mkfifo(source / "optimizer.pt")
    with pytest.raises(CheckpointError, match="expected a regular file, found a named pipe") as caught:
        planned(source)
    assert caught.value.hint
