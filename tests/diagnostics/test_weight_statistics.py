"""RMS of weights and state from files against float64 arithmetic in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diagnostics_support import opened
from safetensors.torch import save_file

from sparkling_cli.diagnostics.weights import measure_weights, role_and_layer
from sparkling_cli.formats.model import ParamState


def test_rms_is_the_root_mean_square(tmp_path: Path) -> None:
    """Every tensor's RMS, largest entry and zeros are those of the whole tensor, read in small pieces."""
    torch.manual_seed(0)
    tensors = {
        "layers.0.up.weight": torch.randn(37, 19),
        "layers.1.up.weight": torch.randn(37, 19).to(torch.bfloat16),
        "norm": torch.zeros(5),
        "scalar": torch.tensor(-3.0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    report = measure_weights(opened(tmp_path), piece=128)
    found = {stat.label: stat for stat in report.tensors}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        wide = tensor.double()
        assert found[name].rms == pytest.approx(float(wide.square().mean().sqrt()), rel=1e-12)
        assert found[name].largest == float(wide.abs().max())
        assert found[name].zeros == int((wide == 0).sum())
        assert found[name].entries == tensor.numel()
    assert report.nonfinite == ()


def test_experts_of_a_layer_are_one_entry(tmp_path: Path) -> None:
    """Tensors that differ in later numbers only are summed: RMS over all their entries."""
    torch.manual_seed(0)
    experts = [torch.randn(4, 3) * (e + 1) for e in range(3)]
    save_file(
        {f"layers.2.experts.{e}.w.weight": w for e, w in enumerate(experts)}, tmp_path / "a.safetensors"
    )
    (stat,) = measure_weights(opened(tmp_path)).tensors
    assert (stat.role, stat.layer, stat.tensors) == ("layers.*.experts.*.w.weight", 2, 3)
    assert stat.rms == pytest.approx(float(torch.stack(experts).double().square().mean().sqrt()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_and_inf_are_counted_and_left_out(tmp_path: Path, dtype: torch.dtype) -> None:
    """The RMS is over the finite entries; the others are counted by kind."""
    tensor = torch.full((4, 5), 2.0, dtype=dtype)
    tensor[1, 2] = float("nan")
    tensor[3, 0], tensor[3, 1] = float("inf"), float("-inf")
    save_file({"w": tensor}, tmp_path / "a.safetensors")
    report = measure_weights(opened(tmp_path))
    (stat,) = report.tensors
    assert (stat.nan, stat.inf) == (1, 2)
    assert stat.rms == pytest.approx(2.0)
    assert stat.largest == 2.0
    assert report.nonfinite == (stat.label,)


def test_state_is_listed_by_slot(tmp_path: Path) -> None:
    """Every moment has its own RMS under its parameter's role; step counters are left out."""
    torch.manual_seed(0)
    save_file(
        {"w": torch.randn(3, 3), "m": torch.randn(3, 3), "v": torch.rand(3, 3), "s": torch.tensor(7.0)},
        tmp_path / "a.safetensors",
    )
    plain = opened(tmp_path)
    checkpoint = replace(
        plain,
        weights={"layers.4.w": "w"},
        states=(ParamState("layers.4.w", {"exp_avg": "m", "exp_avg_sq": "v", "step": "s"}),),
    )
    report = measure_weights(checkpoint)
    assert [(stat.label, stat.slot) for stat in report.tensors] == [
        ("layers.4.w", ""),
        ("layers.4.w", "exp_avg"),
        ("layers.4.w", "exp_avg_sq"),
    ]
    assert report.slots == ("exp_avg", "exp_avg_sq")


def test_roles() -> None:
    """Numbers between dots are taken out, the first is the layer; digits inside words stay."""
    assert role_and_layer("model.layers.13.mlp.experts.7.w1.weight") == (
        "model.layers.*.mlp.experts.*.w1.weight",
        13,
    )
    assert role_and_layer("lm_head.weight") == ("lm_head.weight", None)
    assert role_and_layer("0.weight") == ("*.weight", 0)
