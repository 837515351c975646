"""OLMo-core's own checkpoints, widened and resumed by OLMo-core's own checkpointer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli.errors import SpecError
from tests.formats.widening import check_moments, widen

pytest.importorskip("olmo_core", reason="pip install ai2-olmo-core==3.0.0")
from tests.formats.make_olmo_core import (
    EXPERTS,
    HYBRID,
    NARROW,
    batch,
    gather_by_expert,
    loss_of,
    make_olmo_core,
    resume_olmo_core,
    scatter_by_expert,
    train,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("changes", "axes"),
    [
        ({}, {"ffn": 2}),
        ({}, {"hidden": 2}),
        ({}, {"hidden": 2, "ffn": 3, "kv_heads": 2}),
        ({"use_head_qk_norm": False, "block_name": "reordered_norm"}, {"hidden": 2, "ffn": 2}),
        ({"use_head_qk_norm": False, "block_name": "reordered_norm"}, {"q_per_kv": 2}),
        ({"qk_norm": False, "n_kv_heads": None}, {"hidden": 2, "kv_heads": 2, "ffn": 2}),
        ({"overridden": [1]}, {"hidden": 2, "kv_heads": 2, "ffn": 2}),
    ],
)
def test_resumes_where_it_was(tmp_path: Path, changes: dict[str, Any], axes: dict[str, float]) -> None:
    """Same logits and first loss, trainer state kept, moments kept, config edited, and it trains on."""
    _check(tmp_path, {**NARROW, **changes}, axes)


@pytest.mark.parametrize(
    ("changes", "axes"),
    [
        ({}, {"hidden": 2, "expert_ffn": 2, "shared_ffn": 2}),
        ({"use_head_qk_norm": False, "reordered_norm": True}, {"expert_ffn": 3}),
        ({"use_head_qk_norm": False, "shared_expert_hidden_size": None}, {"ffn": 2, "kv_heads": 2}),
        ({"shared_expert_hidden_size": None}, {"experts": 2, "experts_per_token": 2}),
        ({"shared_expert_hidden_size": None}, {"experts": 3, "experts_per_token": 3, "hidden": 2, "ffn": 2}),
    ],
)
def test_experts(
    tmp_path: Path, changes: dict[str, Any], axes: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts and routers, which OLMo-core flattens; two of its kernels need a GPU and are stood in for."""
    _on_cpu(monkeypatch)
    _check(tmp_path, {**EXPERTS, **changes}, axes)


@pytest.mark.parametrize(
    ("changes", "axes", "scaling"),
    [
        ({}, {"ffn": 2, "expert_ffn": 3}, "rms"),
        ({}, {"hidden": 2, "ffn": 2, "expert_ffn": 2, "shared_ffn": 3}, "rms"),
        ({}, {"ffn": 1.5, "expert_ffn": 1.5}, "function"),
        ({"use_head_qk_norm": False, "reordered_norm": True}, {"hidden": 2, "expert_ffn": 2}, "rms"),
        (
            {"use_head_qk_norm": False, "shared_expert_hidden_size": None},
            {"hidden": 2, "ffn": 2, "kv_heads": 2},
            "rms",
        ),
    ],
)
def test_dense_beside_experts(
    tmp_path: Path,
    changes: dict[str, Any],
    axes: dict[str, float],
    scaling: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hybrid blocks, a dense MLP and experts side by side; the same two kernels are stood in for."""
    _on_cpu(monkeypatch)
    _check(tmp_path, {**HYBRID, **changes}, axes, scaling=scaling)


def test_number_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared experts weigh 1/(top_k + 1) in OLMo-core: refused where top_k grows, widened where it stays."""
    _on_cpu(monkeypatch)
    make_olmo_core(tmp_path / "step3", EXPERTS, tmp_path / "work")
    with pytest.raises(SpecError, match=r"shared_mlp is .*known for none"):
        widen(tmp_path / "step3", tmp_path / "no", {"experts": 2, "experts_per_token": 2})
    target = widen(tmp_path / "step3", tmp_path / "wide" / "step3", {"experts": 2})
    resumed, _ = resume_olmo_core(target, tmp_path / "work")
    found = json.loads((target / "config.json").read_text())["model"]["block"]["feed_forward_moe"]
    assert (found["num_experts"], found["router"]["top_k"]) == (8, 2)
    train(resumed, 1)


def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olmo_core.ops.moe.binned_gather", gather_by_expert)
    monkeypatch.setattr("olmo_core.ops.moe.binned_scatter", scatter_by_expert)


def _check(tmp_path: Path, sizes: dict[str, Any], axes: dict[str, float], **options: Any) -> None:
    module = make_olmo_core(tmp_path / "step3", sizes, tmp_path / "work")
    target = widen(tmp_path / "step3", tmp_path / "wide" / "step3", axes, **options)
    resumed, state = resume_olmo_core(target, tmp_path / "work")
    assert (state["global_step"], state["max_steps"], state["data_loader"]) == (3, 50, {"seed": 3})
    ids = batch(9)
    torch.testing.assert_close(resumed.model(ids), module.model(ids), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(loss_of(resumed.model, ids), loss_of(module.model, ids), rtol=1e-6, atol=1e-5)
    for (name, old), new in zip(module.model.named_parameters(), resumed.model.parameters(), strict=True):
        moments = {slot: module.optim.state[old][slot] for slot in ("exp_avg", "exp_avg_sq")}
        check_moments(moments, resumed.optim.state[new], name)
        assert resumed.optim.state[new]["step"] == module.optim.state[old]["step"]
    train(resumed, 1)
