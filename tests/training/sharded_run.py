"""Run by ``torchrun``: the tiny model under FSDP2; in four processes, under tensor parallelism too.

Usage: sharded_run.py OUT; writes ``<optimizer>-<how>-<run>.pt`` with the whole parameters after 50 steps.
``how`` is the dim that FSDP2 shards, or ``mesh``; ``legs`` is the run that is left and taken up again.
Of Muon there is one step, with old entries' step kept and without.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import SGD, AdamW, Muon, Optimizer

from sparkling_cli.schedule.rewarmup import add_stage
from sparkling_cli.training import rewarm
from tests.training import reference as ref

STEPS = 50
RUNS = {"whole": (STEPS,), "legs": (20, STEPS - 20)}


def make(name: str, params: object) -> Optimizer:
    """The optimizer of a run."""
    if name == "adamw":
        return AdamW(params, lr=ref.BASE.peak, weight_decay=0.1)  # type: ignore[arg-type]
    return SGD(params, lr=ref.BASE.peak, momentum=0.9)  # type: ignore[arg-type]


def placement(param: torch.nn.Parameter, dim: int, ranks: int) -> Shard:
    """Shard ``dim`` where FSDP2 can (dims other than 0 must be even), else dim 0."""
    possible = param.dim() > dim and param.shape[dim] % ranks == 0
    return Shard(dim if possible else 0)


def sharded(how: str) -> tuple[torch.nn.Module, int, int]:
    """The model; which share of a batch this process takes, and of how many."""
    net, ranks = ref.model(), dist.get_world_size()
    if how != "mesh":
        fully_shard(net, shard_placement_fn=lambda p: placement(p, int(how), ranks))
        return net, dist.get_rank(), ranks
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    plan = {
        "up": ColwiseParallel(output_layouts=Replicate()),
        "mixed": ColwiseParallel(output_layouts=Replicate()),
        "down": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(net, mesh["tensor"], plan)
    fully_shard(net, mesh=mesh["data"])
    assert all(net.get_parameter(f"{name}.weight").device_mesh.ndim == 2 for name in plan)
    return net, mesh["data"].get_local_rank(), ranks // 2


def train(
    name: str, net: torch.nn.Module, share: int, shares: int, first: int = ref.TE, last: int = ref.TE + STEPS,
    kept: dict[str, object] | None = None,
) -> dict[str, object]:  # fmt: skip
    """Steps from the expansion on, or from what was kept; every process takes its share of each batch."""
    optimizer = make(name, net.parameters())
    if kept is not None:
        parts = {"model_state_dict": kept["net"], "optim_state_dict": kept["optimizer"]}
        set_state_dict(net, optimizer, **parts)  # type: ignore[arg-type]
    sched = ref.scheduler(optimizer, first)
    rewarming = rewarm(optimizer, net, ref.history(tau=20), step=first, announce=False)
    for step in range(first, last):
        optimizer.zero_grad()
        net(ref.data(step).chunk(shares)[share]).backward()
        optimizer.step()
        sched.step()
    assert rewarming.step == last
    optimizer.zero_grad()
    model, state = get_state_dict(net, optimizer)
    return {"net": model, "optimizer": state}


def muon_step(net: torch.nn.Module, share: int, shares: int, *, keep: bool) -> None:
    """One step of the matrices; new entries at the rate of old ones."""
    muon = Muon([p for p in net.parameters() if p.ndim == 2], lr=ref.BASE.peak, weight_decay=0.1)
    history = ref.history_of(add_stage(None, ref.BASE, ref.TE, rho=1.0, steps=0, keep_step=keep))
    rewarm(muon, net, history, announce=False)
    net(ref.data(0).chunk(shares)[share]).backward()
    muon.step()


def main(out: Path) -> None:
    """All runs of one process."""
    dist.init_process_group("gloo")
    cases = [("adamw", "mesh"), ("sgd", "mesh")] if dist.get_world_size() == 4 else [
        (name, dim) for name in ("adamw", "sgd") for dim in ("0", "1")
    ]  # fmt: skip
    for name, how in cases:
        for run, counts in RUNS.items():
            kept, first = None, ref.TE
            for count in counts:
                net, share, shares = sharded(how)
                kept = train(name, net, share, shares, first, first + count, kept)
                first += count
            whole = {n: p.full_tensor().detach() for n, p in net.named_parameters()}
            if dist.get_rank() == 0:
                torch.save(whole, out / f"{name}-{how}-{run}.pt")
    for how in ("0", "1") if dist.get_world_size() == 2 else ("mesh",):
        for keep in (False, True):
            net, share, shares = sharded(how)
            muon_step(net, share, shares, keep=keep)
            whole = {n: p.full_tensor().detach() for n, p in net.named_parameters()}
            if dist.get_rank() == 0:
                torch.save(whole, out / f"muon-{how}-{keep}.pt")
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
