"""torchtitan's own checkpoints, widened and resumed by torchtitan's own checkpoint manager."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sparkling_cli.api import layout_of
from sparkling_cli.errors import LayoutError, SpecError
from sparkling_cli.layout.file import to_toml
from sparkling_cli.training import rewarm
from tests.formats.widening import check_moments, corner, widen

pytest.importorskip("torchtitan", reason="pip install torchtitan==0.3.0 triton")
from tests.formats.make_torchtitan import Run, Sizes, batch, logits_of, loss_of, make_torchtitan
from tests.formats.titan_families import compute_on_cpu

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def process_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Torchtitan wants a process group; one process will do."""
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "0")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("fuse_qkv", [True, False])
@pytest.mark.parametrize(
    ("axes", "wide"),
    [
        ({"ffn": 2}, Sizes(hidden_dim=80)),
        ({"hidden": 2}, Sizes(dim=96)),
        ({"hidden": 2, "ffn": 3}, Sizes(dim=96, hidden_dim=120)),
    ],
)
def test_resumes_where_it_was(tmp_path: Path, axes: dict[str, float], wide: Sizes, fuse_qkv: bool) -> None:
    """Same logits and first loss, step and schedule kept, state entry by entry, and it trains on."""
    _check(tmp_path, "llama3", axes, wide, fuse_qkv)


@pytest.mark.parametrize(
    ("family", "axes", "wide"),
    [
        (
            "qwen3",
            {"hidden": 2, "ffn": 2, "kv_heads": 2},
            {"dim": 96, "hidden_dim": 80, "n_heads": 12, "n_kv_heads": 4},
        ),
        ("qwen3-tied", {"hidden": 2, "q_per_kv": 2}, {"dim": 96, "n_heads": 12}),
        ("qwen3-moe", {"hidden": 2, "expert_ffn": 2}, {"dim": 96, "expert_dim": 48}),
        ("qwen3-moe", {"kv_heads": 3}, {"n_heads": 18, "n_kv_heads": 6}),
        (
            "deepseek-v3",
            {"hidden": 2, "ffn": 2, "expert_ffn": 2, "shared_ffn": 3},
            {"dim": 96, "hidden_dim": 80, "expert_dim": 48, "shared_dim": 96},
        ),
        ("deepseek-v3-lora", {"hidden": 2, "expert_ffn": 2}, {"dim": 96, "expert_dim": 48}),
        (
            "deepseek-v3-mtp",
            {"hidden": 2, "ffn": 2, "expert_ffn": 2, "shared_ffn": 3},
            {"dim": 96, "hidden_dim": 80, "expert_dim": 48, "shared_dim": 96},
        ),
        ("qwen3-moe", {"experts": 2}, {"experts": 8, "top_k": 4}),
        ("gpt-oss", {"experts": 2, "hidden": 2}, {"experts": 8, "top_k": 4, "dim": 96}),
        ("qwen3.5-moe", {"experts": 2}, {"experts": 8, "top_k": 4}),
        ("gpt-oss", {"ffn": 2}, {"expert_dim": 48}),
        ("gpt-oss", {"hidden": 2, "expert_ffn": 3}, {"dim": 96, "expert_dim": 72}),
        ("gpt-oss", {"kv_heads": 2, "q_per_kv": 2}, {"n_heads": 24, "n_kv_heads": 4}),
        ("qwen3.5", {"hidden": 2, "ffn": 2}, {"dim": 96, "hidden_dim": 80}),
        (
            "qwen3.5",
            {"kv_heads": 2, "q_per_kv": 2, "vision_ffn": 3},
            {"n_heads": 24, "n_kv_heads": 4, "vision_ffn": 60},
        ),
        (
            "qwen3.5-moe",
            {"hidden": 2, "expert_ffn": 2, "shared_ffn": 3},
            {"dim": 96, "expert_dim": 48, "shared_dim": 96},
        ),
        (
            "kimi",
            {"hidden": 2, "expert_ffn": 2, "vision_ffn": 3},
            {"dim": 96, "expert_dim": 48, "vision_ffn": 60},
        ),
        ("muse-glimmer", {"hidden": 2, "ffn": 2}, {"dim": 96, "hidden_dim": 80}),
        (
            "muse-glimmer-vision",
            {"hidden": 2, "ffn": 2, "vision_ffn": 3},
            {"dim": 96, "hidden_dim": 80, "vision_ffn": 60},
        ),
    ],
)
@pytest.mark.parametrize("fuse_qkv", [True, False])
def test_families(
    tmp_path: Path,
    family: str,
    axes: dict[str, float],
    wide: dict[str, int],
    fuse_qkv: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The packaged layouts of further models, with and without experts, say what the models compute.

    Experts compute in bfloat16, whose rounding would hide a wrong layout: here in float32. Flex attention,
    which windows, sinks and vision encoders need, cannot be trained on a CPU, and Qwen3.5's linear attention
    has kernels for GPUs only: plain torch stands in for both.
    """
    if family.startswith(("deepseek", "kimi", "muse", "qwen3.5")) and not fuse_qkv:
        pytest.skip("has nothing to fuse")
    compute_on_cpu(monkeypatch)
    _check(tmp_path, family, axes, Sizes(**wide), fuse_qkv)


@pytest.mark.parametrize(
    ("family", "axes", "wide"),
    [
        ("deepseek-v3-mtp", {"ffn": 1.5, "expert_ffn": 1.5}, {"hidden_dim": 60, "expert_dim": 36}),
        ("gpt-oss", {"ffn": 1.5}, {"expert_dim": 36}),
        ("qwen3.5", {"ffn": 1.5}, {"hidden_dim": 60}),
        ("qwen3.5-moe", {"ffn": 1.5, "shared_ffn": 1.5}, {"expert_dim": 36, "shared_dim": 48}),
        ("kimi", {"expert_ffn": 1.5, "vision_ffn": 1.5}, {"expert_dim": 36, "vision_ffn": 30}),
        ("muse-glimmer-vision", {"ffn": 1.5, "vision_ffn": 1.5}, {"hidden_dim": 60, "vision_ffn": 30}),
    ],
)
def test_uneven_factors(
    tmp_path: Path, family: str, axes: dict[str, float], wide: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where some entries have more copies than others, ``function`` scaling keeps the function."""
    compute_on_cpu(monkeypatch)
    _check(tmp_path, family, axes, Sizes(**wide), fuse_qkv=True, scaling="function")


@pytest.mark.parametrize("groups", [0, 2])
def test_experts_by_a_layout_of_ones_own(
    tmp_path: Path, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek-V3 normalizes shares; copies of a group are a group where there are more groups."""
    compute_on_cpu(monkeypatch)
    axes = {"experts": 2.0}
    narrow, wide = Sizes(groups=groups), Sizes(experts=8, top_k=4, groups=2 * groups)
    make_torchtitan(tmp_path / "first", narrow, family="deepseek-v3-norm")
    with pytest.raises(SpecError, match="which do not stand in the checkpoint") as refused:
        widen(tmp_path / "first" / "step-3", tmp_path / "no", axes)
    assert "--layout" in refused.value.message
    layout = layout_of(tmp_path / "first" / "step-3")
    own = replace(layout, axes={**layout.axes, "experts": replace(layout.axes["experts"], widenable=True)})
    (tmp_path / "own.toml").write_text(to_toml(own))
    options = {"narrow": narrow, "layout": tmp_path / "own.toml"}
    _check(tmp_path, "deepseek-v3-norm", axes, wide, True, **options)


def _check(
    tmp_path: Path, family: str, axes: dict[str, float], wide: Sizes, fuse_qkv: bool, **options: Any
) -> None:
    narrow = options.pop("narrow", None)
    run = make_torchtitan(tmp_path / "run", narrow, fuse_qkv=fuse_qkv, family=family)
    (tmp_path / "wide").mkdir()
    widen(tmp_path / "run" / "step-3", tmp_path / "wide" / "step-3", axes, **options)
    resumed = Run(tmp_path / "wide", wide, fuse_qkv=fuse_qkv, family=family)
    assert resumed.manager.load(3)
    assert (resumed.state.step, resumed.state.ntokens_seen) == (3, run.state.ntokens_seen)
    assert resumed.schedulers.state_dict() == run.schedulers.state_dict()
    ids = batch(run.sizes, 9)
    # A recurrence is a long way, on which float32 rounds more: in float64 a hundredth is left.
    atol = 5e-5 if family.startswith("qwen3.5") else 2e-5
    torch.testing.assert_close(logits_of(resumed.model, ids), logits_of(run.model, ids), rtol=1e-5, atol=atol)
    torch.testing.assert_close(loss_of(resumed.model, ids), loss_of(run.model, ids), rtol=1e-6, atol=1e-5)
    old, new = run.optimizers.optimizers[0], resumed.optimizers.optimizers[0]
    for (name, before), after in zip(run.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert new.state[after]["step"] == 3
        moments = {slot: old.state[before][slot] for slot in ("exp_avg", "exp_avg_sq")}
        check_moments(moments, new.state[after], name)
        for slot, value in moments.items():
            # New heads stand between the old ones.
            if ".att" not in name or not {"kv_heads", "q_per_kv"} & axes.keys():
                assert torch.equal(_old_entries(new.state[after][slot], value, name), value), name
    resumed.train(1)


def test_chosen_copies_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each layer others: torchtitan loads them behind the old ones, with moments of zero, and steps."""
    compute_on_cpu(monkeypatch)
    run = make_torchtitan(tmp_path / "run", family="qwen3-moe")
    (tmp_path / "wide").mkdir()
    copies = {"all": [1, 2, 1, 2], "1": [3, 1, 1, 1]}
    widen(tmp_path / "run" / "step-3", tmp_path / "wide" / "step-3", {"experts": 1.5}, copies=copies)
    resumed = Run(tmp_path / "wide", Sizes(experts=6), family="qwen3-moe")
    assert resumed.manager.load(3)
    old, new = run.optimizers.optimizers[0], resumed.optimizers.optimizers[0]
    grown = 0
    for (name, before), after in zip(run.model.named_parameters(), resumed.model.parameters(), strict=True):
        behind = [0, 0] if "layers.1." in name else [1, 3]
        more = after.shape != before.shape
        grown += more
        assert torch.equal(after, torch.cat([before, before[behind]]) if more else before), name
        for slot in ("exp_avg", "exp_avg_sq"):
            kept = old.state[before][slot]
            wanted = torch.cat([kept, torch.zeros_like(kept[behind])]) if more else kept
            assert torch.equal(new.state[after][slot], wanted), (name, slot)
    assert grown >= 2 * 4
    resumed.train(1)


def _old_entries(wide: torch.Tensor, old: torch.Tensor, name: str) -> torch.Tensor:
    """The entries that were there before: the first of every dim, or of each half that it consists of."""
    if not name.endswith(".eh_proj.weight"):
        return corner(wide, old.shape)
    halves = zip(wide.chunk(2, -1), old.chunk(2, -1), strict=True)
    return torch.cat([corner(after, before.shape) for after, before in halves], -1)


def test_new_entries_have_their_own_rate(tmp_path: Path) -> None:
    """``rewarm`` takes torchtitan's optimizers as they are: after one step only new entries differ."""
    make_torchtitan(tmp_path / "run")
    target = tmp_path / "wide" / "step-3"
    target.parent.mkdir()
    baseline = {"type": "cosine", "peak": 2e-3, "total_steps": 40, "warmup_steps": 2}
    widen(tmp_path / "run" / "step-3", target, {"ffn": 2}, baseline=baseline, rewarmup={"steps": 0})
    plain, rewarmed = (Run(tmp_path / "wide", Sizes(hidden_dim=80)) for _ in range(2))
    for run in (plain, rewarmed):
        assert run.manager.load(3)
    rewarm(list(rewarmed.optimizers), rewarmed.model, target, step=3)
    for run in (plain, rewarmed):
        run.train(1)
    for (name, one), other in zip(plain.model.named_parameters(), rewarmed.model.parameters(), strict=True):
        differs = (one != other).nonzero()
        if ".feed_forward.w" in name:
            dim = 1 if "w2" in name else 0
            assert len(differs) and int(differs[:, dim].min()) >= 40, name
        else:
            assert not len(differs), name


@pytest.mark.parametrize("family", ["llama3", "qwen3", "qwen3-tied", "gpt-oss"])
def test_weights_only(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model-only save, which torchtitan makes last: the bytes say whether embedding and head are tied."""
    compute_on_cpu(monkeypatch)
    run = make_torchtitan(tmp_path / "run", family=family)
    run.manager.last_save_model_only = True
    run.manager.save(4, last_step=True)
    target = tmp_path / "wide" / "step-4"
    target.parent.mkdir()
    widen(tmp_path / "run" / "step-4", target, {"hidden": 2, "ffn": 2}, allow_locked=True)
    resumed = Run(tmp_path / "wide", Sizes(dim=96, hidden_dim=80, expert_dim=48), family=family)
    import torch.distributed.checkpoint as dcp

    weights = resumed.model.state_dict()
    dcp.load(weights, checkpoint_id=target)
    resumed.model.load_state_dict(weights)
    ids = batch(run.sizes, 9)
    torch.testing.assert_close(logits_of(resumed.model, ids), logits_of(run.model, ids), rtol=1e-5, atol=2e-5)


def test_tied_weights_without_a_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no layout of a tied Qwen3 with experts; its names alone are those of the untied one."""
    compute_on_cpu(monkeypatch)
    run = make_torchtitan(tmp_path / "run", family="qwen3-moe-tied")
    run.manager.last_save_model_only = True
    run.manager.save(4, last_step=True)
    with pytest.raises(LayoutError, match=r"lm_head.weight and tok_embeddings.weight are not tied"):
        widen(tmp_path / "run" / "step-4", tmp_path / "wide" / "step-4", {"hidden": 2})
