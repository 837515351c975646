"""Run by ``torchrun``: the tiny model under FSDP2, with new entries on a rate of their own.

Usage: sharded_run.py OUT; writes ``<optimizer>-<dim>.pt`` with the whole parameters after 12 steps.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.optim import SGD, AdamW, Optimizer

from sparkling_cli.training import rewarm
from tests.training import reference as ref

STEPS = 12


def make(name: str, params: object) -> Optimizer:
    """The optimizer of a run."""
    if name == "adamw":
        return AdamW(params, lr=ref.BASE.peak, weight_decay=0.1)  # type: ignore[arg-type]
    return SGD(params, lr=ref.BASE.peak, momentum=0.9)  # type: ignore[arg-type]


def placement(param: torch.nn.Parameter, dim: int) -> Shard:
    """Shard ``dim`` where FSDP2 can (dims other than 0 must be even), else dim 0."""
    possible = param.dim() > dim and param.shape[dim] % dist.get_world_size() == 0
    return Shard(dim if possible else 0)


def train(name: str, net: torch.nn.Module, rank: int, ranks: int) -> None:
    """Twelve steps from the expansion on; every rank takes its share of each batch."""
    optimizer = make(name, net.parameters())
    sched = ref.scheduler(optimizer, ref.TE)
    rewarm(optimizer, net, ref.history(tau=3))
    for step in range(ref.TE, ref.TE + STEPS):
        optimizer.zero_grad()
        net(ref.data(step).chunk(ranks)[rank]).backward()
        optimizer.step()
        sched.step()


def main(out: Path) -> None:
    """All runs of one process."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name in ("adamw", "sgd"):
        for dim in (0, 1):
            net = ref.model()
            fully_shard(net, shard_placement_fn=lambda p, dim=dim: placement(p, dim))
            train(name, net, rank, ranks)
            whole = {n: p.full_tensor().detach() for n, p in net.named_parameters()}
            if rank == 0:
                torch.save(whole, out / f"{name}-{dim}.pt")
    dist.barrier()  # a rank that leaves early ends the others' connections
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        0
    )  # all is written; on a busy machine gloo's threads may abort an interpreter that is taken down
