"""Real ``torch.distributed.checkpoint`` directories, written by 1 to 4 gloo processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from tests.formats.make_nanogpt import GPT, GPTConfig, batch, loss_of, scatter, train

CONFIG = GPTConfig(n_layer=2, n_head=3, n_embd=15, vocab_size=67, bias=True)
LR = 3e-3


def on_ranks(count: int, work: Callable[..., None], *args: Any) -> None:
    """Run ``work(rank, *args)`` on so many gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: a fresh interpreter would spend most of its time importing torch.
    mp.start_processes(_started, (count, port, work, args), nprocs=count, start_method="fork")


def _started(rank: int, count: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count))
    dist.init_process_group("gloo", rank=rank, world_size=count)
    try:
        work(rank, *args)
    finally:
        dist.destroy_process_group()


def build(config: GPTConfig, *, sharded: bool) -> tuple[GPT, torch.optim.AdamW]:
    """The model, under FSDP2 if ``sharded``, and its optimizer."""
    torch.manual_seed(5)
    model = GPT(config)
    scatter(model)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.transformer["h"]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, model.optimizer(LR)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """What a careful training loop saves."""
    weights, moments = get_state_dict(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    return {
        "model": weights,
        "optimizer": moments,
        "lr_scheduler": scheduler.state_dict(),
        "train_state": {"step": step, "note": "kept"},
        "rng": torch.arange(7, dtype=torch.uint8),
    }


def save_trained(rank: int, path: str, config: GPTConfig = CONFIG, steps: int = 3) -> None:
    """Some real steps under FSDP2, then ``dcp.save``."""
    model, optimizer = build(config, sharded=True)
    train(model, optimizer, config, steps)
    dcp.save(state_of(model, optimizer, steps), checkpoint_id=path)


def save_single(path: Path, config: GPTConfig = CONFIG, steps: int = 3) -> GPT:
    """Some real steps in this process, then ``dcp.save`` without a process group."""
    model, optimizer = build(config, sharded=False)
    train(model, optimizer, config, steps)
    dcp.save(state_of(model, optimizer, steps), checkpoint_id=path, no_dist=True)
    return model


def save_resharded(rank: int, source: str, target: str, shape: tuple[int, ...]) -> None:
    """A single-process checkpoint saved again, its tensors sharded in all kinds of ways.

    Every tensor is given placements in turn: first dim, last dim, both, replicated; most do not divide.
    """
    mesh = init_device_mesh("cpu", shape)
    whole = _loaded_whole(Path(source))
    kinds: list[tuple[Placement, ...]] = [
        (Shard(0),) + (Replicate(),) * (len(shape) - 1),
        (Shard(1),) + (Replicate(),) * (len(shape) - 1),
        (Replicate(),) * len(shape),
    ]
    if len(shape) == 2:
        kinds.append((Shard(1), Shard(0)))

    def shard(value: Any, turn: list[int]) -> Any:
        if isinstance(value, dict):
            return {key: shard(inner, turn) for key, inner in value.items()}
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        turn[0] += 1
        placements = kinds[turn[0] % len(kinds)]
        if value.dim() == 1:
            placements = tuple(p if p == Shard(0) else Replicate() for p in placements)
        return distribute_tensor(value, mesh, placements)

    dcp.save(shard(whole, [0]), checkpoint_id=target)


def _loaded_whole(path: Path) -> dict[str, Any]:
    model, optimizer = build(CONFIG, sharded=False)
    train(model, optimizer, CONFIG, 1)
    state = state_of(model, optimizer, 0)
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def load_whole(path: Path, config: GPTConfig) -> tuple[GPT, torch.optim.AdamW, dict[str, Any]]:
    """``dcp.load`` into an unsharded model and optimizer; gives the raw state too."""
    model, optimizer = build(config, sharded=False)
    train(model, optimizer, config, 1)
    state = state_of(model, optimizer, 0)
    dcp.load(state, checkpoint_id=path, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return model, optimizer, state


def resume_sharded(rank: int, path: str, config: GPTConfig, result: str) -> None:
    """``dcp.load`` under FSDP2; writes the loss before and after one more step, from rank 0."""
    model, optimizer = build(config, sharded=True)
    train(model, optimizer, config, 1)
    state = state_of(model, optimizer, 0)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    ids = batch(config, 9)
    before = loss_of(model, ids)
    optimizer.zero_grad()
    before.backward()
    optimizer.step()
    after = loss_of(model, ids)
    if rank == 0:
        torch.save({"losses": [float(before.detach()), float(after.detach())]}, result)


def full(value: torch.Tensor) -> torch.Tensor:
    """A tensor, gathered if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value
