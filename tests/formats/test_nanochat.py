"""nanochat's step files: widened, loaded by the model and optimizer that wrote them, and trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.schedule.baseline import baseline_of
from sparkling_cli.spec.model import BaselineSpec
from sparkling_cli.training import rewarm
from tests.formats.make_nanochat import (
    BATCH,
    OPTIONS,
    STEP,
    MuonAdamW,
    batch,
    load,
    make_nanochat,
    save,
    train,
)
from tests.formats.widening import corner, widen

AXES = {"hidden": 2, "kv_heads": 2, "ffn": 2}


def slots_of(optimizer: MuonAdamW) -> dict[tuple[int, str], torch.Tensor]:
    """Every state tensor by group of one shape: (number of the parameter, slot)."""
    return {
        (number, slot): torch.as_tensor(value)
        for number, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
    }


def check_factor(old: torch.Tensor, new: torch.Tensor) -> None:
    """Old means stay, new entries are their mean; where the other side has become the longer one, all are."""
    side = 1 if new.shape[2] == 1 else 2
    assert new.shape[0] == old.shape[0] and new.shape[3 - side] == 1
    kept = old.shape[side] if old.shape[3 - side] == 1 else 0
    assert kept == 0 or torch.equal(new.narrow(side, 0, kept), old)
    fresh = new.narrow(side, kept, new.shape[side] - kept)
    assert torch.allclose(fresh, old.mean(dim=(1, 2), keepdim=True).expand_as(fresh), rtol=1e-6, atol=0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kv_heads", [8, 4])
def test_widened_and_trained_on(tmp_path: Path, ranks: int, kv_heads: int) -> None:
    """The same logits; every entry of the state; ten more steps, in which copies part."""
    vocab = 180 if ranks == 3 else 60  # tables of 192 rows can be shared out among three
    narrow = make_nanochat(tmp_path / "d4", ranks=ranks, n_kv_head=kv_heads, vocab_size=vocab)
    widen(tmp_path / "d4", tmp_path / "wide", AXES)
    (_, before), (model, optimizer) = load(tmp_path / "d4"), load(tmp_path / "wide")
    ids = batch(narrow.config, 99)
    torch.testing.assert_close(model(ids), narrow(ids), rtol=1e-5, atol=1e-5)
    old, new = slots_of(before), slots_of(optimizer)
    assert new.keys() == old.keys()
    for (number, slot), value in old.items():
        wide = new[number, slot]
        assert wide.dtype == value.dtype
        if slot == "second_momentum_buffer":
            check_factor(value, wide)
            continue
        rest = wide.clone()
        corner(rest, value.shape).zero_()
        assert torch.equal(corner(wide, value.shape), value) and not rest.any(), (number, slot)
    first = model.transformer["h"][0].mlp.c_fc.weight
    half = first.shape[0] // 2
    assert torch.equal(first[:half], first[half:])
    rewarm(optimizer, model, tmp_path / "wide", announce=False)
    train(model, optimizer, STEP, STEP + 10)
    alike = torch.nn.functional.cosine_similarity(first[:half], first[half:]).mean()
    assert alike < 0.9999


def test_schedule_and_options(tmp_path: Path) -> None:
    """The whole curve is read; the meta file has the option for the wider model, the note the others."""
    make_nanochat(tmp_path / "d4")
    found = open_checkpoint(tmp_path / "d4")
    curve, step = baseline_of(found, BaselineSpec())
    total, peak = OPTIONS["num_iterations"], 0.5
    decay = round(OPTIONS["warmdown_ratio"] * total)
    for it in range(total):
        if it < OPTIONS["warmup_steps"]:
            share = (it + 1) / OPTIONS["warmup_steps"]
        else:
            share = min(1.0, (total - it) / decay + (1 - (total - it) / decay) * OPTIONS["final_lr_frac"])
        assert curve(it) == pytest.approx(peak * share), it
    assert step == STEP
    widen(tmp_path / "d4", tmp_path / "wide", AXES)
    meta = json.loads((tmp_path / "wide" / f"meta_{STEP:06d}.json").read_text())
    assert meta["user_config"]["aspect_ratio"] == 32 and meta["model_config"]["n_embd"] == 128
    assert "Infinity" in (tmp_path / "wide" / f"meta_{STEP:06d}.json").read_text()
    assert any(f"--total-batch-size {BATCH}" in note for note in found.notes)


def test_one_of_several_steps(tmp_path: Path) -> None:
    """The message names one; named, it is widened, and files of the others are not carried along."""
    root = tmp_path / "d4"
    make_nanochat(root)
    model, optimizer = load(root)
    train(model, optimizer, STEP, STEP + 2)
    save(root, model, optimizer, step=STEP + 2)
    with pytest.raises(CheckpointError, match="holds steps 5, 7 of a nanochat run") as refused:
        open_checkpoint(root)
    assert str(root / "model_000007.pt") in str(refused.value.hint)
    target = widen(root / "model_000005.pt", tmp_path / "wide", AXES)
    assert sorted(path.name for path in target.glob("*_0*")) == [
        "meta_000005.json", "model_000005.pt", "optim_000005_rank0.pt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lost", "fault"),
    [
        ("meta_000005.json", r"meta_000005\.json is missing"),
        ("model_000005.pt", r"model_000005\.pt is missing"),
        ("optim_000005_rank0.pt", r"optim_000005_rank0\.pt is missing"),
        ("optim_000005_rank1.pt", r"optim_000005_rank1\.pt is missing.*2 ranks"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, lost: str, fault: str) -> None:
    """Sizes, or a rank's part of the state."""
    make_nanochat(tmp_path / "d4", ranks=2)
    (tmp_path / "d4" / lost).unlink()
    for path in (tmp_path / "d4", tmp_path / "d4" / "model_000005.pt"):
        if path.exists():
            with pytest.raises(CheckpointError, match=fault):
                open_checkpoint(path)


def test_another_optimizer(tmp_path: Path) -> None:
    """Groups that are none of nanochat's are not guessed at."""
    make_nanochat(tmp_path / "d4")
    path = tmp_path / "d4" / "optim_000005_rank0.pt"
    saved = torch.load(path, weights_only=True)
    saved["param_groups"][0]["params"] += saved["param_groups"].pop(1)["params"]
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="which is which cannot be told"):
        open_checkpoint(tmp_path / "d4")
