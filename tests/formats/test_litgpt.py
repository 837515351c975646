"""LitGPT directories, widened and resumed through LitGPT's model and Lightning Fabric."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli.errors import CheckpointError, SpecError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.formats.directory import rewritten_yaml
from sparkling_cli.training import rewarm
from tests.formats.widening import check_moments, widen


def test_yaml_lines_stay() -> None:
    """Only the numbers change; a key that was implied is added at the end."""
    text = "a: 1\nn_embd: 48\nname: x # a remark\nnested:\n  n_embd: 3\n"
    assert rewritten_yaml(text, {"n_embd": 96, "head_size": 8, "nested.n_embd": 6}, "x") == (
        "a: 1\nn_embd: 96\nname: x # a remark\nnested:\n  n_embd: 6\nhead_size: 8\n"
    )


def test_half_a_directory(tmp_path: Path) -> None:
    """One of the two files is missing: the error names it."""
    (tmp_path / "lit_model.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="without model_config"):
        open_checkpoint(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied", "axes"),
    [
        ("LLAMA", False, {"ffn": 2}),
        ("LLAMA", False, {"hidden": 2, "ffn": 3}),
        ("LLAMA", False, {"q_per_kv": 2, "kv_heads": 2}),
        ("LLAMA", True, {"hidden": 2}),
        ("NEOX", False, {"hidden": 2, "ffn": 2, "kv_heads": 2}),
        ("MIXTRAL", False, {"hidden": 2, "expert_ffn": 3}),
        ("EXPERTS", False, {"hidden": 2, "ffn": 2, "q_per_kv": 2}),
        ("GROUPED", False, {"ffn": 2}),
        ("GROUPED", False, {"hidden": 2, "expert_ffn": 3, "kv_heads": 2}),
        ("GROUPED_MIXTRAL", False, {"hidden": 2, "ffn": 2}),
        ("DENSE_FIRST", False, {"ffn": 2, "expert_ffn": 3}),
        ("DENSE_FIRST", False, {"hidden": 2, "expert_ffn": 2, "q_per_kv": 2}),
        ("LATENT", False, {"hidden": 2, "ffn": 2, "heads": 2}),
        ("DEEPSEEK", False, {"ffn": 2, "expert_ffn": 2}),
        ("DEEPSEEK", False, {"hidden": 2, "expert_ffn": 3, "heads": 2}),
    ],
)
def test_resumes_where_it_was(tmp_path: Path, family: str, tied: bool, axes: dict[str, Any]) -> None:
    """Same logits and first loss from the widened config; counters and moments kept; trains on."""
    _check(tmp_path, family, tied, axes)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["GROUPED", "DENSE_FIRST", "DEEPSEEK"])
def test_uneven_factors(tmp_path: Path, family: str) -> None:
    """Where some entries have more copies than others, ``function`` scaling keeps the function."""
    axes = {"ffn": 1.5} if family == "GROUPED" else {"ffn": 1.5, "expert_ffn": 1.5}
    _check(tmp_path, family, False, axes, scaling="function")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "axes"),
    [
        ("MIXTRAL", {}),
        ("MIXTRAL", {"hidden": 2, "ffn": 2}),
        ("MIXTRAL", {"layers": 2}),
        ("EXPERTS", {"layers": 1.5, "kv_heads": 2}),
        ("PLAIN_DENSE_FIRST", {"expert_ffn": 2}),
    ],
)
@pytest.mark.parametrize("state", [True, False])
def test_more_experts(tmp_path: Path, family: str, axes: dict[str, float], state: bool) -> None:
    """Parameters of their own: the optimizer gets new ones behind each layer's, by number."""
    pytest.importorskip("litgpt", reason="pip install litgpt==0.5.13")
    from tests.formats import make_litgpt as made

    model = made.make_litgpt(tmp_path / "step-3", getattr(made, family))
    file = tmp_path / "step-3" / "lit_model.pth"
    if not state:
        saved = torch.load(file, weights_only=False)
        torch.save({"model": saved["model"]}, file)
    axes = {"experts": 2, "experts_per_token": 2, **axes}
    schedule: dict[str, Any] = {"rewarmup": {"steps": 4}} if state else {}
    if state:
        schedule["baseline"] = {"type": "constant", "peak": 2e-3, "total_steps": 40, "warmup_steps": 0}
    target = widen(tmp_path / "step-3", tmp_path / "wide", axes, allow_locked=not state, **schedule)
    if not state:
        with (target / "model_config.yaml").open() as text:
            wide = made.GPT(made.Config(**made.yaml.safe_load(text)))
        wide.load_state_dict(torch.load(target / "lit_model.pth", weights_only=True)["model"])
        ids = made.batch(9)
        torch.testing.assert_close(wide(ids), model(ids), rtol=1e-5, atol=2e-5)
        return
    fabric, wide, optimizer, _ = made.resume_litgpt(target)
    ids = made.batch(9)
    torch.testing.assert_close(wide(ids), model(ids), rtol=1e-5, atol=2e-5)
    if axes.keys() == {"experts", "experts_per_token"}:
        _check_experts(model, torch.load(file, weights_only=False)["optimizer"], wide, optimizer)
    rewarming = rewarm(optimizer.optimizer, wide, target, announce=False)
    made.train(fabric, wide, optimizer, 1)
    assert rewarming.metrics()["learning_rate_new"] > 0


def _check_experts(old: torch.nn.Module, saved: Any, new: torch.nn.Module, optimizer: Any) -> None:
    """Every weight and moment of the model of twice as many experts, four in the old one."""
    numbers = {name: number for number, (name, _) in enumerate(old.named_parameters())}
    weights = dict(old.named_parameters())
    for name, value in new.named_parameters():
        own = re.search(r"(?<=experts\.)\d+", name)
        source = name if own is None else name.replace(f"experts.{own[0]}", f"experts.{int(own[0]) % 4}")
        fresh = own is not None and int(own[0]) >= 4
        gate = name.endswith("mlp.gate.weight")
        was = weights[source].repeat(2, 1) if gate else weights[source]
        assert torch.equal(value, was), name
        for slot in ("exp_avg", "exp_avg_sq"):
            kept = saved["state"][numbers[source]][slot]
            kept = torch.cat([kept, torch.zeros_like(kept)]) if gate else kept * (not fresh)
            assert torch.equal(optimizer.state[value][slot], kept), (name, slot)
        assert optimizer.state[value]["step"] == 3


@pytest.mark.slow
def test_chosen_copies_of_experts(tmp_path: Path) -> None:
    """Two copies of the second of four, as parameters with zero moments; the real GPT loads and steps."""
    pytest.importorskip("litgpt", reason="pip install litgpt==0.5.13")
    from tests.formats import make_litgpt as made

    old = made.make_litgpt(tmp_path / "step-3", made.MIXTRAL)
    schedule = {"type": "constant", "peak": 2e-3, "total_steps": 40, "warmup_steps": 0}
    options: dict[str, Any] = {"rewarmup": {"steps": 4}, "baseline": schedule}
    target = widen(
        tmp_path / "step-3", tmp_path / "wide", {"experts": 1.5}, copies={"all": [1, 3, 1, 1]}, **options
    )
    fabric, wide, optimizer, _ = made.resume_litgpt(target)
    weights = dict(old.named_parameters())
    for name, value in wide.named_parameters():
        own = re.search(r"(?<=experts\.)\d+", name)
        source = 1 if own is not None and int(own[0]) >= 4 else int(own[0]) if own is not None else 0
        was = weights[name if own is None else name.replace(f"experts.{own[0]}", f"experts.{source}")]
        was = was[[0, 1, 2, 3, 1, 1]] if name.endswith("mlp.gate.weight") else was
        assert torch.equal(value, was), name
        if own is not None and int(own[0]) >= 4:
            assert not optimizer.state[value]["exp_avg"].any()
    made.train(fabric, wide, optimizer, 1)
    with pytest.raises(SpecError, match="layers cannot differ here"):
        widen(
            tmp_path / "step-3",
            tmp_path / "no",
            {"experts": 1.5},
            copies={"0": [1, 3, 1, 1], "1": [2, 2, 1, 1]},
            **options,
        )


@pytest.mark.slow
def test_experts_in_groups(tmp_path: Path) -> None:
    """Refused by the config's key: copies would be in other groups."""
    pytest.importorskip("litgpt", reason="pip install litgpt==0.5.13")
    from tests.formats import make_litgpt as made

    made.make_litgpt(tmp_path / "step-3", made.GROUPED)
    with pytest.raises(SpecError, match="n_expert_groups is 3: known for none"):
        widen(tmp_path / "step-3", tmp_path / "no", {"experts": 2, "experts_per_token": 2})


def _check(tmp_path: Path, family: str, tied: bool, axes: dict[str, Any], **options: Any) -> None:
    pytest.importorskip("litgpt", reason="pip install litgpt==0.5.13")
    from tests.formats import make_litgpt as made

    model = made.make_litgpt(tmp_path / "step-3", getattr(made, family), tied=tied)
    target = widen(tmp_path / "step-3", tmp_path / "wide", axes, **options)
    assert (target / "hyperparameters.yaml").read_text() == "seed: 42\n"
    fabric, wide, optimizer, state = made.resume_litgpt(target, tied=tied)
    assert (state["iter_num"], state["step_count"]) == (12, 3)
    ids = made.batch(9)
    torch.testing.assert_close(wide(ids), model(ids), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(made.loss_of(wide, ids), made.loss_of(model, ids), rtol=1e-6, atol=1e-5)
    old = torch.load(tmp_path / "step-3" / "lit_model.pth", weights_only=True)["optimizer"]["state"]
    new = torch.load(target / "lit_model.pth", weights_only=True)["optimizer"]["state"]
    assert old.keys() == new.keys()
    for number, before in old.items():
        check_moments({k: before[k] for k in ("exp_avg", "exp_avg_sq")}, new[number], str(number))
    made.train(fabric, wide, optimizer, 1)
