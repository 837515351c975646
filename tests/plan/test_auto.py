"""``--init auto`` is the pair that was ahead where it was measured, and the paper's elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparkling_cli import api
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.layout.model import TensorPattern
from sparkling_cli.results.evidence import PARAMETERS, STEPS, pair_for
from sparkling_cli.schedule.plan import settled
from sparkling_cli.spec.sources import make_spec

FFN, HIDDEN = [{"axis": "ffn", "factor": 1.5}], [{"axis": "hidden", "factor": 2}]
LAYERS = [{"axis": "layers", "factor": 2}]
LONG = {"type": "cosine", "peak": 1e-3, "minimum": 1e-5, "warmup_steps": 10}


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({"axes": FFN}, ("random-zero", "function")),
        ({"axes": FFN, "scaling": "calibrated"}, ("random-zero", "calibrated")),
        ({"axes": HIDDEN}, ("copy-copy", "rms")),
        ({"axes": FFN + HIDDEN}, ("copy-copy", "rms")),
        ({"axes": LAYERS}, ("copy-copy", "rms")),
        ({"axes": FFN + LAYERS}, ("random-zero", "function")),
        ({"axes": FFN, "baseline": {**LONG, "total_steps": 600 + STEPS}}, ("random-zero", "function")),
        ({"axes": FFN, "baseline": {**LONG, "total_steps": 601 + STEPS}}, ("copy-copy", "rms")),
    ],
)
def test_the_pair_follows_axis_and_steps_left(
    dense_checkpoint: Path, asked: dict[str, Any], chosen: tuple[str, str]
) -> None:
    """The plan has the pair itself, and says so; the checkpoint is at step 600 of 1,200."""
    plan = api.make_plan(dense_checkpoint, init="auto", **asked).plan
    assert (plan.spec.init, plan.spec.scaling) == chosen
    assert f"--init auto is {chosen[0]}, --scaling {chosen[1]}" in plan.notes


@pytest.mark.parametrize(("more", "chosen"), [(0, "random-zero"), (1, "copy-copy")])
def test_larger_models_take_copies_but_in_what_is_new(more: int, chosen: str) -> None:
    """Of more parameters than were measured to the end; copies in new layers would stay locked."""
    assert pair_for(["ffn"], STEPS, PARAMETERS + more)[0] == chosen
    assert pair_for(["ffn", "layers"], STEPS, PARAMETERS + more)[0] == "random-zero"


def test_what_is_recorded_is_the_pair(dense_checkpoint: Path, tmp_path: Path) -> None:
    """The output is that of the pair by name, bit by bit, and is proved as that."""
    for name, options in (
        ("auto", {"init": "auto"}),
        ("named", {"init": "random-zero", "scaling": "function"}),
    ):
        found = api.expand(dense_checkpoint, tmp_path / name, axes=FFN, report="none", **options)
        assert found.report is not None and "--init random-zero --scaling function" in found.report.command
        api.verify(dense_checkpoint, tmp_path / name)
    auto, named = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("auto", "named"))
    assert auto == named


def test_a_norm_inside_the_mlp_takes_copies(dense_checkpoint: Path) -> None:
    """Where new columns of zeros would not keep the function."""
    layout = api.layout_of(dense_checkpoint)
    norm = TensorPattern("model.layers.{layers}.mlp.norm.weight", "scale ffn")
    spec = make_spec({"axes": FFN, "init": "auto"})
    found = settled(spec, open_checkpoint(dense_checkpoint), replace(layout, tensors=(*layout.tensors, norm)))
    assert found.init == "copy-copy"
