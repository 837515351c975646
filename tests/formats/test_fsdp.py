"""Trainer directories under FSDP2, sharded and full state, written and resumed by 2 gloo processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint
from tests.formats.make_dcp import on_ranks
from tests.formats.make_fsdp import MOE, SIZES, TIED, resume, resume_full, save, save_full
from tests.formats.widening import check_moments, widen

pytest.importorskip("transformers", reason="pip install transformers")


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"ffn": 2}, {"hidden": 2, "ffn": 2}, {"layers": 2}])
def test_resumes_where_it_was(tmp_path: Path, axes: dict[str, float]) -> None:
    """The layout is inferred from config.json; the losses of the next steps start where they were."""
    on_ranks(2, save, str(tmp_path / "checkpoint-3"))
    source = open_checkpoint(tmp_path / "checkpoint-3")
    assert source.facts["kind"] == "Trainer with FSDP"
    assert (source.facts["global_step"], source.facts["max_steps"]) == (3, 20)
    assert max(len(t.extents) for t in source.tensors.values()) == 2
    target = widen(tmp_path / "checkpoint-3", tmp_path / "wide" / "checkpoint-3", axes)
    for name in ("scheduler.pt", "trainer_state.json"):
        assert (target / name).read_bytes() == (tmp_path / "checkpoint-3" / name).read_bytes()
    found = {}
    for name, path in (("old", tmp_path / "checkpoint-3"), ("new", target)):
        on_ranks(2, resume, str(path), str(tmp_path / f"{name}.pt"))
        found[name] = torch.load(tmp_path / f"{name}.pt")
    assert found["new"]["steps"] == [5.0]
    assert found["new"]["losses"][0] == pytest.approx(found["old"]["losses"][0], abs=1e-4)
    assert found["new"]["losses"][1] == pytest.approx(found["old"]["losses"][1], abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "axes", "wide", "options"),
    [
        (SIZES, {"hidden": 2, "ffn": 2}, {"hidden_size": 60, "intermediate_size": 82}, {}),
        (TIED, {"hidden": 2}, {"hidden_size": 60}, {"init": "random-zero"}),
        (MOE, {"ffn": 2}, {"moe_intermediate_size": 40}, {}),
    ],
    ids=["dense", "tied", "experts"],
)
def test_full_state_resumes_where_it_was(
    tmp_path: Path,
    config: dict[str, Any],
    axes: dict[str, float],
    wide: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Both copies of the weights and the optimizer's file are widened; accelerate's own functions resume."""
    source, target = tmp_path / "checkpoint-3", tmp_path / "wide" / "checkpoint-3"
    on_ranks(2, save_full, str(source), config)
    opened = open_checkpoint(source)
    assert opened.facts["kind"] == "FSDP with full state dicts"
    assert opened.facts["optimizer_class"] == "AdamW"
    widen(source, target, axes, **options)
    assert sorted(p.name for p in source.iterdir()) == sorted(
        p.name for p in target.iterdir() if p.name not in ("sparkling", "README.md")
    )
    found = {}
    for name, path, sizes in (("old", source, config), ("new", target, {**config, **wide})):
        on_ranks(2, resume_full, str(path), sizes, str(tmp_path / f"{name}.pt"))
        found[name] = torch.load(tmp_path / f"{name}.pt")
    if not options:
        assert found["new"]["losses"][0] == pytest.approx(found["old"]["losses"][0], abs=1e-4)
        assert found["new"]["losses"][1] == pytest.approx(found["old"]["losses"][1], abs=0.3)
    for name, state in found["new"]["state"].items():
        old = found["old"]["state"][name]
        check_moments({k: old[k] for k in ("exp_avg", "exp_avg_sq")}, state, name)
        assert state["step"] == old["step"] == 3
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(target).state_dict()
    for name, value in found["new"]["weights"].items():
        assert torch.equal(value, reloaded[name]), name


def test_without_the_other_copy(tmp_path: Path) -> None:
    """Accelerate's ``save_state`` writes FSDP's file alone, which is the weights then; ``drop`` restarts."""
    source = tmp_path / "state"
    on_ranks(2, save_full, str(source), SIZES)
    (source / "model.safetensors").unlink()
    target = widen(source, tmp_path / "wide", {"ffn": 2}, optimizer="drop", allow_locked=True)
    weights = torch.load(target / "pytorch_model_fsdp.bin", weights_only=True)
    assert weights["model.layers.1.mlp.up_proj.weight"].shape == (82, 30)
    state = torch.load(target / "optimizer.bin", weights_only=True)["state"]
    assert all(s["step"] == 0 and not s["exp_avg"].any() for s in state.values())


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    """One rank's flat part, a second model, an optimizer with numbers: each is refused by name."""
    source = tmp_path / "checkpoint-3"
    on_ranks(1, save_full, str(source), SIZES)
    for name, message in (("0_rank1", "FULL_STATE_DICT"), ("1", "more than one model")):
        odd = source / f"pytorch_model_fsdp_{name}.bin"
        shutil.copy(source / "pytorch_model_fsdp.bin", odd)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(source)
        assert message in f"{caught.value} {caught.value.hint}"
        odd.unlink()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))])
    next(iter(optimizer.param_groups[0]["params"])).grad = torch.ones(2, 2)
    optimizer.step()
    torch.save(optimizer.state_dict(), source / "optimizer.bin")
    with pytest.raises(CheckpointError, match="by number"):
        open_checkpoint(source)
