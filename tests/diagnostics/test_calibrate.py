"""Scaling ``calibrated``: every block adds to the stream what it added; the loss is no worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparkling_cli import api
from sparkling_cli.diagnostics.activations import measure
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.results.measured import Measurement

CASES = [
    ("ffn", 1.25, "copy-copy"),
    ("ffn", 1.5, "copy-copy"),
    ("hidden", 1.25, "copy-copy"),
    ("hidden", 1.5, "copy-copy"),
    ("hidden", 2.5, "copy-copy"),
    ("heads", 2, "random-copy"),
    ("ffn", 2, "zero-copy"),
    ("ffn", 2, "random-copy"),
    ("hidden", 2, "random-copy"),
    ("hidden", 2, "random-zero"),
]


def measured(folder: Path, data: Path) -> Measurement:
    """Of the model in a folder, on a little of a text."""
    return measure(open_checkpoint(folder), data=data, sequences=8)[0]


@pytest.mark.parametrize(("axis", "factor", "init"), CASES)
def test_blocks_add_what_they_added(
    axis: str, factor: float, init: Any, dense_checkpoint: Path, heldout_text: Path, tmp_path: Path
) -> None:
    """R of every function within 2 %, and the loss at most 0.01 above that of the method's factors."""
    before = measured(dense_checkpoint, heldout_text)
    found = {}
    for scaling in ("rms", "calibrated"):
        api.expand(
            dense_checkpoint,
            tmp_path / scaling,
            axes=[{"axis": axis, "factor": factor}],
            init=init,
            scaling=scaling,
            data=heldout_text if scaling == "calibrated" else None,
            report="none",
        )
        found[scaling] = measured(tmp_path / scaling, heldout_text)
    ratios = {stat.name: stat.r for stat in before.functions}
    for stat in found["calibrated"].functions:
        assert stat.r == pytest.approx(ratios[stat.name], rel=0.02), stat.name
    losses = [found[scaling].loss for scaling in ("calibrated", "rms")]
    assert None not in losses
    assert losses[0] <= losses[1] + 0.01  # type: ignore[operator]


def test_factors_are_recorded_proved_and_the_same_again(
    moe_checkpoint: Path, heldout_text: Path, tmp_path: Path
) -> None:
    """Two runs are equal to the byte; verify finds the factors that the manifest records."""
    for name in ("one", "two"):
        api.expand(
            moe_checkpoint,
            tmp_path / name,
            axes=[{"axis": "hidden", "factor": 1.5}, {"axis": "ffn", "factor": 1.5}],
            scaling="calibrated",
            data=heldout_text,
            report="none",
        )
    one, two = (
        {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    api.verify(moe_checkpoint, tmp_path / "one")
    data = json.loads((tmp_path / "one" / "sparkling" / "manifest.json").read_text())
    factors = data["stages"][-1]["calibration"]
    assert abs(factors["model.layers.0.mlp.experts.down_proj"] - 1) > 1e-4


def test_whole_factors_of_copies_are_left_alone(dense_checkpoint: Path, tmp_path: Path) -> None:
    """At 2x copy-copy nothing is to be made up for: the weights are those of ``rms``."""
    for scaling in ("rms", "calibrated"):
        asked = [{"axis": "ffn", "factor": 2}, {"axis": "hidden", "factor": 2}]
        api.expand(dense_checkpoint, tmp_path / scaling, axes=asked, scaling=scaling, report="none")
    name = "model.safetensors"
    assert (tmp_path / "rms" / name).read_bytes() == (tmp_path / "calibrated" / name).read_bytes()
