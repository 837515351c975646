"""Checkpoints of composer: a rank file, and sharded ones, by a faithful writer of what it documents."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import LlamaConfig, LlamaForCausalLM

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.training import rewarm
from tests.formats.widening import check_moments, widen

AXES = {"ffn": 2, "hidden": 2, "kv_heads": 2}
SCHEDULE = {
    "baseline": {"type": "cosine", "peak": 1e-3, "minimum": 1e-4, "warmup_steps": 2, "total_steps": 40},
    "rewarmup": {"steps": 4},
}  # fmt: skip
STEPS = 5


class Holder(torch.nn.Module):
    """As composer's HuggingFaceModel holds a model."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        sizes = config or {
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        }  # fmt: skip
        self.model = LlamaForCausalLM(LlamaConfig(**sizes))


def tokens(step: int) -> torch.Tensor:
    """Random ones, the same for the same step."""
    return torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))


def train(holder: Holder, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Some real steps."""
    for step in range(first, last):
        optimizer.zero_grad()
        holder.model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()


def saved_state(holder: Holder, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What composer's ``State.state_dict`` and its rank file hold, after STEPS batches."""
    names = [name for name, _ in holder.named_parameters()]
    found = optimizer.state_dict()
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in found["param_groups"]]
    moments = {"state": {names[i]: slots for i, slots in found["state"].items()}, "param_groups": groups}
    clock = {"batch": STEPS, "epoch": 0, "total_wct": timedelta(seconds=3.25)}
    config = {"file_extension": ".json", "content": holder.model.config.to_dict()}
    state = {
        "model": holder.state_dict(),
        "optimizers": {"DecoupledAdamW": moments},
        "schedulers": {"LambdaLR": {"base_lrs": [1e-3], "last_epoch": STEPS, "_last_lr": [9e-4]}},
        "algorithms": [],
        "timestamp": {"Timestamp": clock},
        "rank_zero_seed": 17,
        "integrations": {"huggingface": {"model": {"config": config}}},
        "metadata": {"torch_version": torch.__version__},
    }
    return {"state": state, "rng": [{"python": (3, (1, 2)), "numpy": np.random.RandomState(1).get_state()}]}


def made() -> tuple[Holder, dict[str, Any]]:
    """A trained model, and what is saved of it."""
    torch.manual_seed(0)
    holder = Holder()
    optimizer = torch.optim.AdamW(holder.parameters(), lr=1e-3)
    train(holder, optimizer, 0, STEPS)
    return holder, saved_state(holder, optimizer)


def check(narrow: Holder, old: dict[str, Any], new: dict[str, Any], history: Path) -> None:
    """The wide model's logits, every entry of its state, ten more steps in which copies part."""
    config = new["integrations"]["huggingface"]["model"]["config"]["content"]
    wide = Holder({key: value for key, value in config.items() if key != "architectures"})
    wide.load_state_dict(new["model"])
    ids = tokens(99)
    torch.testing.assert_close(wide.model(ids).logits, narrow.model(ids).logits, rtol=1e-5, atol=1e-5)
    before, after = (state["optimizers"]["DecoupledAdamW"] for state in (old, new))
    assert before["state"].keys() == after["state"].keys()
    for name, slots in before["state"].items():
        check_moments(slots, after["state"][name], name)
    optimizer = torch.optim.AdamW(wide.parameters(), lr=1e-3)
    names = [name for name, _ in wide.named_parameters()]
    states = {i: after["state"][name] for i, name in enumerate(names)}
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    rewarm(optimizer, wide.model, history, announce=False)
    train(wide, optimizer, STEPS, STEPS + 10)
    up = wide.model.model.layers[0].mlp.up_proj.weight
    assert torch.nn.functional.cosine_similarity(up[:48], up[48:]).mean() < 0.9999


def test_rank_file(tmp_path: Path) -> None:
    """Recognized without options; step and peak are read; clocks and random states come out as they were."""
    narrow, saved = made()
    source = tmp_path / "ep0-ba5-rank0.pt"
    torch.save(saved, source)
    found = open_checkpoint(source)
    assert (found.facts["kind"], found.facts["global_step"]) == ("composer", STEPS)
    (tmp_path / "wide").mkdir()
    target = widen(source, tmp_path / "wide" / source.name, AXES, **SCHEDULE)
    loaded = torch.load(target, weights_only=False)
    assert loaded["state"]["timestamp"] == saved["state"]["timestamp"]
    assert np.array_equal(loaded["rng"][0]["numpy"][1], saved["rng"][0]["numpy"][1])
    check(narrow, saved["state"], loaded["state"], target)


def test_sharded(tmp_path: Path) -> None:
    """The same through torch.distributed.checkpoint, with the config key by key in the metadata."""
    narrow, saved = made()
    del saved["rng"][0]["python"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(saved, checkpoint_id=tmp_path / "ep0-ba5", no_dist=True)
    assert open_checkpoint(tmp_path / "ep0-ba5").facts["global_step"] == STEPS
    target = widen(tmp_path / "ep0-ba5", tmp_path / "wide", AXES, **SCHEDULE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(target, tmp_path / "whole.pt")
    check(narrow, saved["state"], torch.load(tmp_path / "whole.pt", weights_only=False)["state"], target)


def test_files_that_are_not_the_one(tmp_path: Path) -> None:
    """A folder of rank files names the latest one, another rank's file the first rank's."""
    for name in ("ep0-ba5-rank0.pt", "ep1-ba10-rank0.pt"):
        torch.save({"state": {"model": {"a.weight": torch.zeros(1)}}}, tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"folder of torch files: ep0-ba5-rank0\.pt, ep1-ba10"
    ) as refused:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "ep1-ba10-rank0.pt") in str(refused.value.hint)
    torch.save({"rng": []}, tmp_path / "ep0-ba5-rank1.pt")
    with pytest.raises(CheckpointError, match="in the first rank's file") as refused:
        open_checkpoint(tmp_path / "ep0-ba5-rank1.pt")
    assert str(refused.value.hint) == f"give {tmp_path / 'ep0-ba5-rank0.pt'}"


@pytest.mark.parametrize("lost", ["model", "optimizers"])
def test_almost_a_rank_file(tmp_path: Path, lost: str) -> None:
    """Without a model it is no checkpoint; without the optimizer it is one of weights, and says so."""
    _, saved = made()
    del saved["state"][lost]
    torch.save(saved, tmp_path / "ep0-ba5-rank0.pt")
    if lost == "model":
        with pytest.raises(CheckpointError, match="no state dict under"):
            open_checkpoint(tmp_path / "ep0-ba5-rank0.pt")
    else:
        assert any("weights only" in note for note in open_checkpoint(tmp_path / "ep0-ba5-rank0.pt").notes)
