"""Where models are built the cycle collector runs, which the command line stops: they hold cycles."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli.api import expand, layout_of
from sparkling_cli.diagnostics.inspect import inspect_checkpoint
from sparkling_cli.models import survey


@pytest.mark.parametrize(
    "work",
    [
        lambda source, _: inspect_checkpoint(source),
        lambda source, out: expand(source, out, axes={"ffn": 2}, report="full"),
        lambda source, out: expand(source, out, axes={"ffn": 2}, scaling="calibrated", report="none"),
        lambda source, _: layout_of(source / "config.json"),
        lambda _, __: survey.survey(["arcee"]),
    ],
    ids=["inspect", "report", "calibrated", "layout", "architectures"],
)
def test_models_are_built_while_it_runs(
    dense_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Path, Path], object],
) -> None:
    """As the command line does it, with nothing kept from earlier runs."""
    monkeypatch.setenv("SPARKLING_CACHE_DIR", str(tmp_path / "cache"))
    running = []
    build = torch.nn.Module.__init__

    def noted(self: torch.nn.Module, *args: Any, **options: Any) -> None:
        running.append(gc.isenabled())
        build(self, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "__init__", noted)
    gc.disable()
    try:
        work(dense_checkpoint, tmp_path / "out")
    finally:
        gc.enable()
    assert running and all(running)
