"""The symmetry meter against channels compared by hand, before and after real training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fixtures.tiny import build_trainer
from sparkling_cli.api import expand
from sparkling_cli.diagnostics.symmetry import LOCKED, measure_symmetry
from sparkling_cli.errors import CheckpointError
from tests.conftest import TinyCheckpoint

TE, END = 3, 6


def widen(source: Path, out: Path, axis: str = "ffn", **options: Any) -> Path:
    """The expanded checkpoint."""
    axes = [{"axis": axis, "factor": 2}]
    return expand(source, out, axes=axes, report="none", threads=1, **options).destination


def train(wide: Path, out: Path) -> Path:
    """Three real steps from the expansion on, without hooks; the trained weights."""
    model = AutoModelForCausalLM.from_pretrained(wide)
    build_trainer(model, out, max_steps=END).train(resume_from_checkpoint=str(wide))
    model.save_pretrained(out / "trained")
    return out / "trained"


@pytest.fixture(scope="module")
def source(tiny_checkpoint: TinyCheckpoint) -> Path:
    """A tiny Llama after three real steps."""
    return tiny_checkpoint("llama", steps=TE)


def test_copied_state_stays_locked_and_reset_state_does_not(source: Path, tmp_path: Path) -> None:
    """Copies with copied moments are still copies after training; with the asymmetric reset they part."""
    locked = widen(source, tmp_path / "copy", optimizer="copy", allow_locked=True)
    parted = widen(source, tmp_path / "asymmetric", optimizer="asymmetric")
    before = measure_symmetry(locked, locked)
    assert before.locked == 1.0 and before.distance == 0.0 and before.cosine == pytest.approx(1.0)
    still = measure_symmetry(train(locked, tmp_path / "a"), locked)
    assert still.locked == 1.0
    assert still.cosine > 0.9999
    apart = measure_symmetry(train(parted, tmp_path / "b"), parted)
    assert apart.distance > 100 * still.distance
    assert apart.cosine < still.cosine


def test_numbers_are_those_of_the_tensors(source: Path, tmp_path: Path) -> None:
    """Cosine and distance of one layer, computed from the weights by hand."""
    wide = widen(source, tmp_path / "wide")
    weights = load_file(wide / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    size = weights["model.layers.0.mlp.up_proj.weight"].shape[0] // 2
    for part in ("gate_proj", "up_proj"):
        name = f"model.layers.0.mlp.{part}.weight"
        weights[name][size:] += 0.05 * torch.randn(weights[name][size:].shape, generator=generator)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((wide / "config.json").read_bytes())
    report = measure_symmetry(tmp_path, wide)
    columns = [weights[f"model.layers.0.mlp.{p}.weight"].double() for p in ("gate_proj", "up_proj")]
    whole = torch.cat([*columns, weights["model.layers.0.mlp.down_proj.weight"].double().T], dim=1)
    old, new = whole[:size], whole[size:]
    distance = (new - old).norm(dim=1) / old.norm(dim=1)
    rows = {(r.layer, r.axis): r for r in report.layers}
    assert rows[0, "ffn"].channels == size
    assert rows[0, "ffn"].distance == pytest.approx(distance.mean().item(), rel=1e-9)
    assert rows[0, "ffn"].cosine == pytest.approx(
        torch.nn.functional.cosine_similarity(new, old).mean().item(), rel=1e-9
    )
    assert rows[0, "ffn"].locked == pytest.approx((distance < LOCKED).double().mean().item())
    assert rows[1, "ffn"].locked == 1.0
    start = load_file(wide / "model.safetensors")
    moved = [weights[name] - start[name] for name in weights if "mlp" in name]
    entries = sum(one.numel() for one in moved) // 2
    squares = sum(float(one.double().square().sum()) for one in moved)
    assert report.update_rms_new == pytest.approx((squares / entries) ** 0.5, rel=1e-6)
    assert report.update_rms_old == 0.0 and report.moved is None


def test_experts_are_measured_one_by_one(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """A mixture: every expert has new channels of its own, whatever the names on disk."""
    source = tiny_checkpoint("qwen3_moe", steps=TE)
    wide = widen(source, tmp_path / "wide")
    report = measure_symmetry(wide, wide)
    config = json.loads((source / "config.json").read_text())
    channels = config.get("num_experts", config.get("num_local_experts")) * config["moe_intermediate_size"]
    assert [(r.axis, r.channels) for r in report.layers] == [("ffn", channels)] * 2
    assert report.locked == 1.0
    AutoModelForCausalLM.from_pretrained(wide).save_pretrained(tmp_path / "saved")
    again = measure_symmetry(tmp_path / "saved", wide)
    assert [(r.axis, r.channels, r.locked) for r in again.layers] == [("ffn", channels, 1.0)] * 2


def test_hidden_reaches_outside_the_layers(source: Path, tmp_path: Path) -> None:
    """Hidden channels: one row per layer, and one for embedding, head and final norm."""
    wide = widen(source, tmp_path / "wide", axis="hidden")
    report = measure_symmetry(wide, wide)
    assert {r.layer for r in report.layers} == {None, 0, 1}
    hidden = json.loads((source / "config.json").read_text())["hidden_size"]
    assert {r.channels for r in report.layers} == {hidden}
    assert report.locked == 1.0


def test_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    """The source of the expansion has not the widened shapes; without a manifest it ends."""
    wide = widen(source, tmp_path / "wide")
    with pytest.raises(CheckpointError, match="after the expansion"):
        measure_symmetry(source, wide)
    with pytest.raises(CheckpointError, match="manifest"):
        measure_symmetry(wide, source)
