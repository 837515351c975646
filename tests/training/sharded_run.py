"""Run by ``torchrun``: the tiny model under FSDP, 1 and 2; in four processes, under tensor parallelism too.

Usage: sharded_run.py OUT HOW...; writes ``<optimizer>-<how>-<run>.pt`` with all parameters after 50 steps.
``legs`` is the run that is left and taken up again. Of Muon there is one step, with old entries' step kept
and without.
"""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import SGD, AdamW, Optimizer

from sparkling_cli.schedule.rewarmup import add_stage
from sparkling_cli.training import rewarm
from tests.training import reference as ref

STEPS = 50
RUNS = {"whole": (STEPS,), "legs": (20, STEPS - 20)}
WHOLE = StateDictOptions(full_state_dict=True)
#: ways to share out the model: FSDP2 over rows or columns, FSDP1 with parameters' own tensors or without
TWO = ("0", "1", "fsdp1", "fsdp1-flat")
#: FSDP2 in the host's memory, FSDP1 replicated
MORE_OF_TWO = ("host", "fsdp1-replicated", "fsdp1-flat-replicated")
#: FSDP1 as accelerate prepares a model
ACCELERATE = ("accelerate", "accelerate-flat")
#: tensor parallel and FSDP2 in two dims of a mesh, FSDP1 in groups that are replicated
FOUR = ("mesh", "fsdp1-hybrid")


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
    if how in ACCELERATE:
        return by_accelerate(net, how), dist.get_rank(), ranks
    if how.startswith("fsdp1"):
        return fsdp1(net, how), dist.get_rank(), ranks
    if how != "mesh":
        options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if how == "host" else {}
        dim = 0 if how == "host" else int(how)
        fully_shard(net, shard_placement_fn=lambda p: placement(p, dim, ranks), **options)
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


def fsdp1(net: torch.nn.Module, how: str) -> torch.nn.Module:
    """Two layers wrapped by themselves, and the rest."""
    strategy, groups = ShardingStrategy.FULL_SHARD, {}
    if how.endswith("replicated"):
        strategy = ShardingStrategy.NO_SHARD
    elif how.endswith("hybrid"):
        strategy = ShardingStrategy.HYBRID_SHARD
        groups = {"device_mesh": init_device_mesh("cpu", (2, 2))}
    options = {"use_orig_params": "flat" not in how, "device_id": torch.device("cpu"), **groups}
    for layer in ("up", "mixed"):
        inner = FullyShardedDataParallel(getattr(net, layer), sharding_strategy=strategy, **options)
        setattr(net, layer, inner)
    return FullyShardedDataParallel(net, sharding_strategy=strategy, **options)


def by_accelerate(net: torch.nn.Module, how: str) -> torch.nn.Module:
    """Wrapped by accelerate, which by itself uses FSDP on accelerators only."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState

    accelerator = Accelerator(cpu=True)
    for state in (PartialState(), accelerator.state):
        state.device = torch.device("cpu")
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1, use_orig_params="flat" not in how, auto_wrap_policy="no_wrap"
    )
    wrapped: torch.nn.Module = accelerator.prepare(net)
    assert isinstance(wrapped, FullyShardedDataParallel)
    return wrapped


def begun(name: str) -> dict[str, object]:
    """What an expansion leaves: the whole model and state at step TE."""
    net, optimizer, _ = ref.expanded(lambda params: make(name, params))
    for group in optimizer.param_groups:  # the scheduler's own; optimizers that have none yet do not take it
        del group["initial_lr"]
    model, state = get_state_dict(net, optimizer, options=WHOLE)
    return {"net": model, "optimizer": state}


def train(
    name: str, net: torch.nn.Module, share: tuple[int, int], steps: range, kept: dict[str, object]
) -> dict[str, object]:
    """Steps from what was kept on; every process takes its share of each batch."""
    optimizer = make(name, net.parameters())
    options = WHOLE if steps.start == ref.TE else None
    parts = {"model_state_dict": kept["net"], "optim_state_dict": kept["optimizer"]}
    set_state_dict(net, optimizer, options=options, **parts)  # type: ignore[arg-type]
    sched = ref.scheduler(optimizer, steps.start)
    rewarming = rewarm(optimizer, net, ref.history(tau=20), step=steps.start, announce=False)
    number, shares = share
    for step in steps:
        optimizer.zero_grad()
        net(ref.data(step).chunk(shares)[number]).backward()
        optimizer.step()
        sched.step()
    assert rewarming.step == steps.stop
    optimizer.zero_grad()
    model, state = get_state_dict(net, optimizer)
    return {"net": model, "optimizer": state}


def muon_step(net: torch.nn.Module, share: int, shares: int, *, keep: bool) -> None:
    """One step of the matrices; new entries at the rate of old ones."""
    muon = torch.optim.Muon([p for p in net.parameters() if p.ndim == 2], lr=ref.BASE.peak, weight_decay=0.1)
    history = ref.history_of(add_stage(None, ref.BASE, ref.TE, rho=1.0, steps=0, keep_step=keep))
    rewarm(muon, net, history, announce=False)
    net(ref.data(0).chunk(shares)[share]).backward()
    muon.step()


def main(out: Path, ways: list[str]) -> None:
    """All runs of one process."""
    dist.init_process_group("gloo")
    for name, how in product(("adamw", "sgd"), ways):
        for run, counts in RUNS.items():
            kept, first = begun(name), ref.TE
            for count in counts:
                steps = range(first, first + count)
                net, *share = sharded(how)
                kept = train(name, net, tuple(share), steps, kept)
                first += count
            whole = get_model_state_dict(net, options=WHOLE)
            if dist.get_rank() == 0:
                torch.save(whole, out / f"{name}-{how}-{run}.pt")
    for how in sorted({"0", "1", "mesh"} & set(ways)):
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
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        0
    )  # all is written; on a busy machine gloo's threads may abort an interpreter that is taken down
