"""Real DeepSpeed checkpoints on a CPU: ZeRO 1 to 3, converted by DeepSpeed's own ``ds_to_universal``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.formats.make_nanogpt import GPT, GPTConfig, batch, scatter


def start(folder: Path) -> Any:
    """DeepSpeed with a process group of one and without compiled kernels."""
    os.environ.update(DS_ACCELERATOR="cpu", DS_BUILD_OPS="0", LOCAL_RANK="0")
    import deepspeed
    import deepspeed.ops
    import torch.distributed as dist

    for name in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__[name] = False
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    return deepspeed


def engine_of(deepspeed: Any, config: GPTConfig, stage: int, *, universal: bool = False) -> Any:
    """A bf16 GPT under ZeRO."""
    model = GPT(config)
    scatter(model)
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.1},
    ]
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    if universal:
        options["checkpoint"] = {"load_universal": True}
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=options)[0]


def train(engine: Any, config: GPTConfig, steps: int, first: int = 0) -> list[float]:
    """Some real steps; the losses before each."""
    losses = []
    for step in range(first, first + steps):
        ids = batch(config, step)
        logits = engine(ids).float()  # in bfloat16 the loss would have steps of 0.03
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def steps_of(engine: Any) -> set[float]:
    """The step counters that the optimizer goes on from."""
    return {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}


def convert(folder: Path, tag: str) -> Path:
    """DeepSpeed's own conversion; gives the Universal Checkpoint's folder."""
    target = folder / f"{tag}_universal"
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
        "--input_folder", str(folder / tag), "--output_folder", str(target),
        "--num_extract_workers", "1", "--num_merge_workers", "1",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return target
