"""A dense run as a mixture of experts: one expert, then copies; held to both real classes and to AdamW."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_support import shake
from training_support import backward, state_of, trained
from transformers import AutoModelForCausalLM, Trainer

from fixtures import training
from sparkling_cli import api
from sparkling_cli.errors import CheckpointError
from sparkling_cli.examples.upcycle import upcycle
from sparkling_cli.models.skeleton import build_model

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "intermediate_size": 20,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "tied": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 8},
}


def loaded(folder: Path) -> Any:
    """A checkpoint in its own class, in its own dtype."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", experts_implementation="eager"
    )


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of a checkpoint, by its own class."""
    with torch.no_grad():
        found: torch.Tensor = loaded(folder)(input_ids=ids, use_cache=False).logits
    return found


def stepped(model: Any, folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameters after one further step of AdamW with the state in a checkpoint, in the Trainer's order."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in decayed) == kind]}
        for kind in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    backward(model, ids)
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CONFIGS)
def test_one_expert_is_the_dense_model(case: str, tmp_path: Path) -> None:
    """Logits, and every parameter after AdamW's next step with the state that was carried over."""
    small = trained(CONFIGS[case], tmp_path / "dense")
    one = upcycle(tmp_path / "dense", tmp_path / "one")
    before, after = (logits(folder, small.ids) for folder in (small.folder, one))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)
    dense = stepped(loaded(small.folder), small.folder, small.ids)
    mixture = stepped(loaded(one), one, small.ids)
    for name, value in mixture.items():
        if name.endswith("experts.gate_up_proj"):
            start = name.removesuffix("experts.gate_up_proj")
            wanted = torch.cat([dense[f"{start}{part}_proj.weight"] for part in ("gate", "up")])[None]
        elif name.endswith("experts.down_proj"):
            wanted = dense[name.replace("experts.down_proj", "down_proj.weight")][None]
        elif name.endswith("mlp.gate.weight"):
            continue
        else:
            wanted = dense[name]
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CONFIGS)
def test_copies_of_the_only_expert(case: str, tmp_path: Path) -> None:
    """Eight of it, two for each token: the dense model's logits, whichever a token goes to; all its state."""
    small = trained(CONFIGS[case], tmp_path / "dense")
    one = upcycle(tmp_path / "dense", tmp_path / "one")
    axes = [{"axis": "experts", "to": 8}, {"axis": "experts_per_token", "to": 2}]
    found = api.expand(one, tmp_path / "eight", axes=axes, router_noise=0.5, threads=1)
    api.verify(one, tmp_path / "eight")
    before, after = (logits(folder, small.ids) for folder in (small.folder, tmp_path / "eight"))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert any("copies of the only one" in note for note in found.expansion.plan.notes)
    model = loaded(tmp_path / "eight")
    with torch.no_grad():
        routed = model(input_ids=small.ids, use_cache=False, output_router_logits=True).router_logits
    assert all(len(layer.topk(2).indices.unique()) > 2 for layer in routed)
    state = state_of(tmp_path / "eight")
    numbers = [number for number, slots in state.items() if slots["exp_avg"].dim() == 3]
    assert len(numbers) == 2 * 2
    for number in numbers:
        moment = state[number]["exp_avg"]
        assert moment[0].any() and not moment[1:].any()
    config = json.loads((tmp_path / "eight/config.json").read_text())
    assert config["num_experts_per_tok"] == 2
    assert 8 in (config.get("num_local_experts"), config.get("num_experts"))


@pytest.mark.slow
def test_the_trainer_goes_on(dense_checkpoint: Path, tmp_path: Path) -> None:
    """From a dense run to eight experts and on: the loss where it was, and every expert another soon."""
    one = upcycle(dense_checkpoint, tmp_path / "one" / dense_checkpoint.name)
    target = tmp_path / "eight" / dense_checkpoint.name
    api.expand(one, target, axes=[{"axis": "experts", "to": 8}], router_noise=0.5, report="none", threads=1)
    api.verify(one, target)
    step = json.loads((target / "trainer_state.json").read_text())["global_step"]
    losses = []
    for folder in (dense_checkpoint, target):
        model = AutoModelForCausalLM.from_pretrained(folder)
        run = tmp_path / f"{folder.parent.name}-run"
        trainer = training.build_trainer("dense", run, model=model, stop_at=step + 2)
        trainer.train(resume_from_checkpoint=str(folder))
        assert trainer.state.global_step == step + 2
        with torch.no_grad():
            losses.append(float(model(**next(iter(trainer.get_train_dataloader()))).loss))
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    stacks = [p.detach() for name, p in model.named_parameters() if name.endswith("experts.down_proj")]
    for p in stacks:
        assert float((p[1:] - p[:1]).flatten(1).abs().amax(1).min()) > 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another class": ({"model_type": "olmo2", **SMALL}, "for olmo2 no mixture is known"),
    "biases": (
        {"model_type": "llama", **SMALL, "mlp_bias": True},
        r"mixtral has no place for .*mlp\.\w+_proj\.bias",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_mixture_is_refused(case: str, tmp_path: Path) -> None:
    """In words that name the class, or what its config says."""
    config, words = WRONG[case]
    shake(build_model(config, meta=False)).save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=words):
        upcycle(tmp_path / "dense", tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Factored second moments are no tensors of the parameter's shape."""
    small = trained(CONFIGS["llama"], tmp_path / "dense")
    saved = torch.load(small.folder / "optimizer.pt", weights_only=True)
    for slots in saved["state"].values():
        slots["exp_avg_sq_row"] = slots.pop("exp_avg_sq").flatten()[:3]
    torch.save(saved, small.folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match="exp_avg_sq_row"):
        upcycle(small.folder, tmp_path / "one")
