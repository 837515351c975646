"""Files that our own readers open and other libraries do not are faults of an output."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparkling_cli import api
from sparkling_cli.errors import VerificationError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.verification import verify
from sparkling_cli.verification.public import unreadable


def test_a_torch_file_with_a_record_missing(dense_checkpoint: Path, tmp_path: Path) -> None:
    """What ``torch.load`` says is passed on; a file that is the same in the source is nobody's fault here."""
    output = open_checkpoint(dense_checkpoint)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        torch.save({"a": torch.ones(3), "b": torch.ones(5)}, folder / "optimizer.pt")
    with zipfile.ZipFile(whole / "optimizer.pt") as old, zipfile.ZipFile(broken / "optimizer.pt", "w") as new:
        for name in old.namelist():
            if not name.endswith("data/1"):
                new.writestr(name, old.read(name))
    damaged = replace(output, root=broken)
    faults, shapes = unreadable(replace(output, root=whole), ["optimizer.pt"], [], None)
    assert (faults, shapes) == ([], {"optimizer.pt": {(3,): 1, (5,): 1}})
    (fault,) = unreadable(damaged, ["optimizer.pt"], [], whole)[0]
    assert "optimizer.pt cannot be loaded" in fault
    assert unreadable(damaged, ["optimizer.pt"], [], broken)[0] == []


def test_safetensors_of_other_names(dense_checkpoint: Path, tmp_path: Path) -> None:
    """The names and shapes that safetensors finds are ours."""
    output = replace(open_checkpoint(dense_checkpoint), root=tmp_path)
    save_file({"other": torch.ones(3)}, tmp_path / "model.safetensors")
    (fault,) = unreadable(output, ["model.safetensors"], [], dense_checkpoint)[0]
    assert "finds other tensors" in fault


def test_verify_asks_torch(dense_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer file that our own reader opens and torch does not."""
    real = torch.load

    def load(file: Any, **options: Any) -> Any:
        if Path(file).is_relative_to(tmp_path):
            raise RuntimeError("PytorchStreamReader failed locating file data/0")
        return real(file, **options)

    api.expand(dense_checkpoint, tmp_path / "out", axes=[{"axis": "ffn", "factor": 2}], report="none")
    verify(dense_checkpoint, tmp_path / "out")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(VerificationError, match=r"optimizer\.pt cannot be loaded: .*data/0"):
        verify(dense_checkpoint, tmp_path / "out")
