"""Run by ``torchrun``: the tiny model in a DeepSpeed engine under ZeRO, in float32 or bfloat16 with masters.

Usage: zero_run.py OUT; writes ``<case>-<run>.pt`` with the whole fp32 parameters at the end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparkling_cli.training import rewarm
from tests.training import loops
from tests.training import reference as ref

#: name -> stage, and other options of the engine; groups of 300 entries make several steps of one
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1": (1, {}),
    "zero2": (2, {}),
    "zero3": (3, {}),
    "zero2-bfloat16": (2, {"bf16": {"enabled": True}}),
    "zero3-bfloat16": (3, {"bf16": {"enabled": True}}),
    "zero2-accelerate": (2, {}),
    "zero2-offloaded": (2, {"zero_force_ds_cpu_optimizer": False}),
    "zero3-offloaded": (3, {"zero_force_ds_cpu_optimizer": False}),
}
#: DeepSpeed's own optimizer for the host's memory, which is compiled when it is first used
CPU_ADAM: dict[str, tuple[int, dict[str, Any]]] = {
    "zero2-cpuadam-offloaded": (2, {}),
    "zero3-cpuadam-offloaded": (3, {}),
}
RUNS = ("whole", "legs", "plain")


def initialized(net: Any, optimizer: Any, config: dict[str, Any], by_accelerate: bool) -> tuple[Any, Any]:
    """An engine, and what a user has as the optimizer."""
    import deepspeed

    if not by_accelerate:
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        return engine, engine.optimizer
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    AcceleratorState._reset_state()  # one in a process, but for this
    engine, wrapper = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)).prepare(
        net, optimizer
    )
    assert wrapper.optimizer is engine.optimizer
    return engine, wrapper


def engine_of(case: str) -> tuple[Any, Any]:
    """The expanded model and state at step TE."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    stage, options = {**CASES, **CPU_ADAM}[case]
    net, optimizer, _ = ref.expanded(loops.adamw, torch.float32)
    states = {name: optimizer.state[p] for name, p in net.named_parameters()}
    if "bf16" in options:  # masters are made from what the model has
        net = net.bfloat16()
    named = dict(net.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1]},
        {"params": [p for p in named.values() if p.ndim < 2]},
    ]
    offload = {"offload_optimizer": {"device": "cpu"}} if case.endswith("offloaded") else {}
    sizes = {"stage3_param_persistence_threshold": 0, "sub_group_size": 300}
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, **sizes, **offload},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        **options,
    }
    made = loops.adamw(groups)
    if case in CPU_ADAM:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        made = DeepSpeedCPUAdam(groups, lr=ref.BASE.peak, weight_decay=0.1)
    engine, given = initialized(net, made, config, case.endswith("accelerate"))
    for group in engine.optimizer.param_groups:  # a step that makes the state and moves nothing
        group["lr"] = 0.0
    engine.backward(engine(ref.data(0)))
    engine.step()
    if stage < 3:  # it links the state after the first group's step, when the second has none
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, p in engine.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            value = states[name][key].float()
            if stage < 3:
                safe_set_full_optimizer_state(p, value, key)
            else:  # the other is wrong for sizes that do not divide
                share, rank = p.ds_tensor.ds_numel, dist.get_rank()
                held = torch.nn.functional.pad(value.flatten(), (0, share * dist.get_world_size()))
                safe_set_local_optimizer_state(p, held[rank * share :][:share], key)
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = ref.TE if case in CPU_ADAM else torch.tensor(float(ref.TE))
    return engine, given


def train(case: str, run: str, out: Path) -> dict[str, torch.Tensor]:
    """Fifty steps; of ``legs``, thirty of them in another engine that loads what the first has saved."""
    from deepspeed.utils import safe_get_full_fp32_param

    rank, ranks = dist.get_rank(), dist.get_world_size()
    for number, first, last in loops.legs((20, 30) if run == "legs" else (50,)):
        engine, given = engine_of(case)
        kept = engine.load_checkpoint(str(out / case))[1] if number else None
        if run != "plain":
            rewarming = rewarm(given, engine.module, loops.history(), measure_every=1)
            if kept is not None:
                rewarming.load_state_dict(kept["rewarming"])
        for step in range(first, last):
            for group in engine.optimizer.param_groups:
                group["lr"] = ref.BASE(step)
            engine.backward(engine(ref.data(step).chunk(ranks)[rank]))
            engine.step()
            if run != "plain":
                assert rewarming.step == step + 1
        if run != "plain":
            engine.save_checkpoint(str(out / case), client_state={"rewarming": rewarming.state_dict()})
            found = rewarming.metrics()
            assert abs(found["learning_rate_new"] / loops.rate(last - 1) - 1) < 1e-9
            assert min(found["update_rms_new"], found["update_rms_old"]) > 0
    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}


def main(out: Path) -> None:
    """All runs of one process."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for case in sys.argv[2:] or CASES:
        for run in RUNS:
            whole = train(case, run, out)
            if dist.get_rank() == 0:
                torch.save(whole, out / f"{case}-{run}.pt")
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
