"""Trainer directories under FSDP: sharded state (two DCP directories), and full state dicts (three files).

``accelerate`` does not use FSDP on a CPU, so the model is wrapped here, by ``fully_shard``. Sharded state is
saved by the calls that accelerate makes, full state dicts by accelerate's own functions.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 30,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
TIED: dict[str, Any] = {**SIZES, "tie_word_embeddings": True}
MOE: dict[str, Any] = {
    **SIZES,
    "model_type": "qwen3_moe",
    "hidden_size": 32,  # grouped matrix products want multiples of 16 bytes
    "moe_intermediate_size": 20,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LR = 2e-3


def build(config: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer]:
    """A Llama, or the class that the config names, under FSDP2 and AdamW in the Trainer's two groups."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer

    torch.manual_seed(1)
    sizes = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type", "llama"), **sizes))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=LR)


def batch(step: int = 0) -> torch.Tensor:
    """Random tokens, the same for the same step."""
    return torch.randint(67, (2, 16), generator=torch.Generator().manual_seed(40 + step))


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Some real steps; the losses before each."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        ids = batch(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad()
    return losses


def save(rank: int, folder: str, steps: int = 3) -> None:
    """Train and write ``checkpoint-N`` as the Trainer does with sharded state dicts."""
    model, optimizer = build(SIZES)
    train(model, optimizer, steps)
    weights, moments = get_state_dict(model, optimizer)
    root = Path(folder)
    dcp.save({"model": weights}, checkpoint_id=root / "pytorch_model_fsdp_0", planner=DefaultSavePlanner())
    dcp.save({"optimizer": moments}, checkpoint_id=root / "optimizer_0", planner=DefaultSavePlanner())
    if rank == 0:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
        torch.save(schedule.state_dict(), root / "scheduler.pt")
        state = {"global_step": steps, "max_steps": 20, "log_history": []}
        (root / "trainer_state.json").write_text(json.dumps(state))
        model.config.save_pretrained(root)
    dist.barrier()


def resume(rank: int, folder: str, result: str) -> None:
    """Load as the Trainer does; one step more; rank 0 writes the losses."""
    config = json.loads((Path(folder) / "config.json").read_text())
    keep = set(SIZES)
    model, optimizer = build({k: v for k, v in config.items() if k in keep})
    train(model, optimizer, 1)
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights}
    dcp.load(state, checkpoint_id=Path(folder) / "pytorch_model_fsdp_0", planner=DefaultLoadPlanner())
    more: dict[str, Any] = {"optimizer": moments}
    dcp.load(more, checkpoint_id=Path(folder) / "optimizer_0", planner=DefaultLoadPlanner())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=more["optimizer"])
    losses = train(model, optimizer, 2)
    steps = {float(s["step"]) for s in optimizer.state.values()}
    if rank == 0:
        torch.save({"losses": losses, "steps": sorted(steps)}, result)


def _accelerate() -> tuple[Any, Any]:
    """What accelerate's functions ask of its plugin and its accelerator, for full state dicts under FSDP2."""
    from accelerate import PartialState
    from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

    PartialState(cpu=True)  # its functions log through it
    config = SimpleNamespace(offload_to_cpu=True, rank0_only=True)
    plugin = SimpleNamespace(
        state_dict_type=StateDictType.FULL_STATE_DICT,
        state_dict_config=config,
        optim_state_dict_config=config,
        fsdp_version=2,
    )
    rank = dist.get_rank()
    accelerator = SimpleNamespace(
        num_processes=dist.get_world_size(),
        process_index=rank,
        is_fsdp2=True,
        is_main_process=rank == 0,
        wait_for_everyone=dist.barrier,
    )
    return plugin, accelerator


def save_full(rank: int, folder: str, config: dict[str, Any], steps: int = 3) -> None:
    """Train and write ``checkpoint-N`` as the Trainer does with full state dicts."""
    from accelerate.utils import save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model, optimizer = build(config)
    train(model, optimizer, steps)
    root = Path(folder)
    root.mkdir(exist_ok=True)
    plugin, accelerator = _accelerate()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(root, state_dict=weights)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
        torch.save(schedule.state_dict(), root / "scheduler.pt")
        state = {"global_step": steps, "max_steps": 20, "log_history": []}
        (root / "trainer_state.json").write_text(json.dumps(state))
    save_fsdp_model(plugin, accelerator, model, folder)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    dist.barrier()


def resume_full(rank: int, folder: str, config: dict[str, Any], result: str) -> None:
    """Load by accelerate's own functions; two steps more; rank 0 writes losses, steps and moments."""
    from accelerate.utils import load_fsdp_model, load_fsdp_optimizer
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model, optimizer = build(config)
    train(model, optimizer, 1)
    plugin, accelerator = _accelerate()
    load_fsdp_model(plugin, accelerator, model, folder)
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    losses = train(model, optimizer, 2)
    if rank == 0:
        torch.save({"losses": losses, "weights": weights, "state": moments["state"]}, result)
