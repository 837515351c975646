"""Megatron's torch format by a faithful writer: slices per rank, stages, masters; widened and trained on."""

from __future__ import annotations

import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.detect import open_checkpoint
from sparkling_cli.training import rewarm
from tests.formats.widening import check_moments, widen

STEPS = 5
FILE = "model_optim_rng.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")
HIDDEN, FFN, VOCAB, LAYERS, HEADS, GROUPS, SIZE = 32, 48, 64, 4, 4, 2, 8
AXES = {"hidden": 2, "kv_heads": 2, "ffn": 2}


class Layer(nn.Module):
    """Queries beside their group's key and value; the MLP's two halves one after the other."""

    def __init__(self, hidden: int, ffn: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.input_layernorm, self.pre_mlp_layernorm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.self_attention = nn.ModuleDict(
            {
                "linear_proj": nn.Linear(heads * SIZE, hidden, bias=False),
                "linear_qkv": nn.Linear(hidden, (heads + 2 * groups) * SIZE, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "linear_fc1": nn.Linear(hidden, 2 * ffn, bias=False),
                "linear_fc2": nn.Linear(ffn, hidden, bias=False),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        each = self.heads // self.groups
        qkv = self.self_attention["linear_qkv"](self.input_layernorm(x))
        q, k, v = qkv.view(*x.shape[:2], self.groups, each + 2, SIZE).split([each, 1, 1], dim=3)
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.self_attention["linear_proj"](mixed.transpose(1, 2).flatten(2))
        gate, up = self.mlp["linear_fc1"](self.pre_mlp_layernorm(x)).chunk(2, dim=-1)
        return x + self.mlp["linear_fc2"](functional.silu(gate) * up)


class Gpt(nn.Module):
    """The names of Megatron-core's GPTModel."""

    def __init__(self, args: Namespace) -> None:
        super().__init__()
        groups, heads = args.num_query_groups, args.num_attention_heads
        table = nn.Embedding(VOCAB, args.hidden_size)
        self.embedding = nn.ModuleDict({"word_embeddings": table})
        layers = nn.ModuleList(
            Layer(args.hidden_size, args.ffn_hidden_size, heads, groups) for _ in range(args.num_layers)
        )
        self.decoder = nn.ModuleDict({"layers": layers, "final_layernorm": nn.RMSNorm(args.hidden_size)})
        self.output_layer = nn.Linear(args.hidden_size, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.embedding["word_embeddings"](ids)
        for layer in self.decoder["layers"]:
            x = layer(x)
        return self.output_layer(self.decoder["final_layernorm"](x))

    def optimizer(self) -> torch.optim.AdamW:
        """Decayed parameters, then the others."""
        params = list(self.parameters())
        groups = [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def train(model: Gpt, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Some real steps."""
    for step in range(first, last):
        ids = torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()


def cut(name: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A rank's slice of a whole weight, or of state of its shape."""
    if "linear_fc1" in name:
        return torch.cat([half.chunk(ranks)[rank] for half in tensor.chunk(2)])
    if "linear_qkv" in name or "word_embeddings" in name or "output_layer" in name:
        return tensor.chunk(ranks)[rank].clone()
    if "linear_proj" in name or "linear_fc2" in name:
        return tensor.chunk(ranks, dim=1)[rank].clone()
    return tensor.clone()


def joined(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The whole of all ranks' slices; what is whole on every rank must be the same there."""
    if "linear_fc1" in name:
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[place] for place in (0, 1) for half in halves])
    if "linear_qkv" in name or "word_embeddings" in name or "output_layer" in name:
        return torch.cat(parts)
    if "linear_proj" in name or "linear_fc2" in name:
        return torch.cat(parts, dim=1)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


def stage_of(name: str, stages: int) -> tuple[int, str]:
    """The pipeline stage that has a weight, and the name that it has there."""
    if name.startswith("decoder.layers."):
        _, _, number, rest = name.split(".", 3)
        each = LAYERS // stages
        return int(number) // each, f"decoder.layers.{int(number) % each}.{rest}"
    return (0 if name.startswith("embedding") else stages - 1), name


def folder(rank: int, stage: int, stages: int) -> str:
    """Of a rank."""
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")


def new_args() -> Namespace:
    """Some of the arguments of a run."""
    return Namespace(
        hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS, num_query_groups=GROUPS,
        group_query_attention=True, kv_channels=SIZE, num_layers=LAYERS, swiglu=True, num_experts=None,
        params_dtype=torch.bfloat16, untie_embeddings_and_output_weights=True,
    )  # fmt: skip


def make_megatron(root: Path, ranks: int, stages: int, *, half: bool = True) -> tuple[Gpt, Namespace]:
    """Train and save ``iter_0000005``; gives the model that masters make, and its arguments."""
    torch.manual_seed(0)
    args = new_args()
    model = Gpt(args)
    optimizer = model.optimizer()
    train(model, optimizer, 0, STEPS)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for stage in range(stages):
        for rank in range(ranks):
            weights: dict[str, Any] = {}
            state: dict[int, Any] = {}
            groups, masters = [], []
            for name, value in model.state_dict().items():
                if stage_of(name, stages)[0] == stage:
                    weights[stage_of(name, stages)[1]] = cut(name, value, rank, ranks)
                    if "linear_qkv" in name:
                        weights[stage_of(name, stages)[1].replace("weight", "_extra_state")] = None
            for group in optimizer.param_groups:
                own = [p for p in group["params"] if stage_of(names[p], stages)[0] == stage]
                numbers = list(range(len(state), len(state) + len(own)))
                for number, parameter in zip(numbers, own, strict=True):
                    slots = optimizer.state[parameter]
                    state[number] = {
                        slot: cut(names[parameter], slots[slot], rank, ranks)
                        for slot in ("exp_avg", "exp_avg_sq")
                    }
                masters.append([cut(names[p], p.detach(), rank, ranks) for p in own])
                groups.append({"lr": 9e-4, "betas": (0.9, 0.95), "step": STEPS, "params": numbers})
            inner = {"state": state, "param_groups": groups}
            held = {"optimizer": inner, "grad_scaler": None, "fp32_from_fp16_params": masters}
            clock = {
                "max_lr": 1e-3, "min_lr": 1e-4, "lr_warmup_steps": 16, "num_steps": 8 * STEPS,
                "lr_decay_style": "cosine", "lr_decay_steps": 320,
            }  # fmt: skip
            random_states = {
                "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {},
            }  # fmt: skip
            saved = {
                "args": args, "checkpoint_version": 3.0, "iteration": STEPS,
                "model": {n: v.bfloat16() if half and v is not None else v for n, v in weights.items()},
                "optimizer": held if half else inner, "opt_param_scheduler": clock,
                "rng_state": [random_states],
            }  # fmt: skip
            path = root / folder(rank, stage, stages)
            path.mkdir(parents=True)
            torch.save(saved, path / FILE)
    return model, args


def load(root: Path, ranks: int, stages: int, *, half: bool = True) -> tuple[Gpt, torch.optim.AdamW]:
    """Ranks and stages put together, masters for weights, as Megatron goes on with them."""
    files = {
        (rank, stage): torch.load(root / folder(rank, stage, stages) / FILE, weights_only=False)
        for stage in range(stages)
        for rank in range(ranks)
    }
    model = Gpt(files[0, 0]["args"])
    optimizer = model.optimizer()
    weights: dict[str, torch.Tensor] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for place, group in enumerate(optimizer.param_groups):
        counts = dict.fromkeys(range(stages), 0)
        for parameter in group["params"]:
            name = names[parameter]
            stage, local = stage_of(name, stages)
            found = [files[rank, stage] for rank in range(ranks)]
            opts = [one["optimizer"]["optimizer"] if half else one["optimizer"] for one in found]
            number = opts[0]["param_groups"][place]["params"][counts[stage]]
            optimizer.state[parameter] = {
                slot: joined(name, [opt["state"][number][slot] for opt in opts])
                for slot in ("exp_avg", "exp_avg_sq")
            }
            optimizer.state[parameter]["step"] = torch.tensor(float(STEPS))
            weights[name] = joined(name, [one["model"][local] for one in found])
            if half:
                lists = [one["optimizer"]["fp32_from_fp16_params"][place] for one in found]
                masters = joined(name, [masters[counts[stage]] for masters in lists])
                assert torch.equal(masters.bfloat16(), weights[name]), name
                weights[name] = masters
            counts[stage] += 1
    model.load_state_dict(weights)
    return model, optimizer


@pytest.mark.parametrize(
    ("ranks", "stages", "half"), [(1, 1, True), (1, 1, False), (2, 1, True), (1, 2, True), (2, 2, True)]
)
def test_widened_and_trained_on(tmp_path: Path, ranks: int, stages: int, half: bool) -> None:
    """Slices are widened as the whole would be, masters as weights; ten more steps in which copies part."""
    source = tmp_path / "iter_0000005"
    narrow, _ = make_megatron(source, ranks, stages, half=half)
    target = widen(source, tmp_path / "wide", AXES, rewarmup={"steps": 4})
    assert open_checkpoint(source).facts["global_step"] == STEPS
    (_, before), (wide, optimizer) = (
        load(source, ranks, stages, half=half),
        load(target, ranks, stages, half=half),
    )
    ids = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(wide(ids), narrow(ids), rtol=1e-5, atol=1e-5)
    old, new = before.state_dict()["state"], optimizer.state_dict()["state"]
    for number, slots in old.items():
        check_moments(slots, new[number], str(number))
    if half:
        rewarm(optimizer, wide, target, announce=False)
    train(wide, optimizer, STEPS, STEPS + 10)
    down = wide.decoder["layers"][0].mlp["linear_fc2"].weight
    assert functional.cosine_similarity(down[:, :FFN], down[:, FFN:], dim=0).mean() < 0.9999
    args = torch.load(target / folder(0, 0, stages) / FILE, weights_only=False)["args"]
    assert (args.hidden_size, args.num_query_groups, args.kv_channels) == (2 * HIDDEN, 2 * GROUPS, SIZE)


def test_almost_one(tmp_path: Path) -> None:
    """A missing rank, flat buckets, and a folder of iterations: the message says which, and what to do."""
    make_megatron(tmp_path / "run" / "iter_0000005", 2, 2)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(CheckpointError, match="folder of Megatron's iterations") as refused:
        open_checkpoint(tmp_path / "run")
    assert "iter_0000005" in str(refused.value.hint)
    root = tmp_path / "run" / "iter_0000005"
    lost = root / "mp_rank_01_000" / FILE
    lost.rename(tmp_path / "kept.pt")
    with pytest.raises(CheckpointError, match=r"mp_rank_01_000/model_optim_rng\.pt is missing"):
        open_checkpoint(root)
    (tmp_path / "kept.pt").rename(lost)
    torch.save({}, root / "mp_rank_00_000" / "distrib_optim.pt")
    with pytest.raises(CheckpointError, match="flat buckets") as refused:
        open_checkpoint(root)
    assert "--ckpt-format torch_dist" in str(refused.value.hint)
