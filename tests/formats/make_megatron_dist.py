"""Megatron's torch_dist format by a faithful writer: what is saved once, and state in flat buckets."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner

from tests.formats.test_megatron_legacy import MOMENTS, STEPS, Gpt, new_args, train

GROUP = "optimizer.distributed.dp_group_idx_0"
NAMED = "(torch.bfloat16, torch.float32)"


class Planner(DefaultSavePlanner):
    """Names as they are, and objects one by one in lists."""

    def transform_object(self, write_item: Any, object: Any) -> Any:  # noqa: A002
        """A tensor, or the bytes of anything else."""
        if isinstance(object, torch.Tensor):
            return object
        content = BytesIO()
        torch.save([object], content)
        return content


def in_buckets(model: Gpt, state: dict[Any, Any], size: int | None) -> dict[str, torch.Tensor]:
    """Parameters from the last to the first, each from a multiple of 64 on; between them is no number."""
    buckets: list[list[tuple[int, torch.nn.Parameter]]] = [[]]
    end = 0
    for parameter in reversed(list(model.parameters())):
        if size is not None and end >= size:
            buckets.append([])
            end = 0
        start = -(-end // 64) * 64
        end = start + parameter.numel()
        buckets[-1].append((start, parameter))
    found = {}
    for number, bucket in enumerate(buckets):
        last, parameter = bucket[-1]
        for slot in ("param", *MOMENTS):
            flat = torch.full((last + parameter.numel(),), float("nan"))
            for start, own in bucket:
                values = own.detach() if slot == "param" else state[own][slot]
                flat[start : start + own.numel()] = values.flatten()
            found[f"{GROUP}.gbuf_idx_0.dtype_{NAMED}.bucket_idx_{number}.{slot}"] = flat
    return found


def make_megatron_dist(
    root: Path,
    size: int | None = 4000,
    *,
    inside: bool = False,
    change: Callable[[Gpt], None] = lambda _: None,
) -> tuple[Gpt, torch.optim.AdamW]:
    """Train and save ``iter_0000005``; gives the model that masters make, and its optimizer.

    Args:
        root: the directory.
        size: entries of a bucket, from which on it is closed; None for one bucket.
        change: what is done to the model before it is saved.
        inside: what is saved once is an object among the others, as newer versions have it.
    """
    torch.manual_seed(0)
    args = new_args()
    model = Gpt(args)
    optimizer = model.optimizer()
    train(model, optimizer, 0, STEPS)
    change(model)
    fields = {"lr": 9e-4, "betas": (0.9, 0.95), "step": STEPS}
    groups = [{**fields, "weight_decay": group["weight_decay"]} for group in optimizer.param_groups]
    common = {
        "args": args, "checkpoint_version": 3.0, "iteration": STEPS,
        "optimizer": {"param_state_sharding_type": "dp_reshardable"},
        "opt_param_scheduler": {
            "max_lr": 1e-3, "min_lr": 1e-4, "lr_warmup_steps": 16, "num_steps": 8 * STEPS,
            "lr_decay_style": "cosine", "lr_decay_steps": 320,
        },
        "content_metadata": {"distrib_optim_sharding_type": "dp_reshardable"},
    }  # fmt: skip
    state: dict[str, Any] = {name: value.bfloat16() for name, value in model.state_dict().items()}
    state |= in_buckets(model, optimizer.state, size)
    state[f"{GROUP}.optimizer/shard_0_1"] = {"param_groups": groups}
    state[f"{GROUP}.per_bucket_numel/shard_0_1"] = [{"a": [1]}]
    if inside:
        state["common_state/shard_0_1"] = common
    root.mkdir(parents=True)
    dcp.save(state, checkpoint_id=root, planner=Planner(flatten_state_dict=False), no_dist=True)
    if not inside:
        torch.save(common, root / "common.pt")
    (root / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return model, optimizer


def load_by_parameter(root: Path) -> tuple[Gpt, torch.optim.AdamW, dict[str, Any]]:
    """Weights, masters and moments by torch's own reader; also what is saved once."""
    if (root / "common.pt").is_file():
        common = torch.load(root / "common.pt", weights_only=False)
    else:
        held: dict[str, Any] = {"common_state/shard_0_1": None}
        dcp.load(held, checkpoint_id=root, no_dist=True)
        (common,) = held["common_state/shard_0_1"]
    model = Gpt(common["args"])
    optimizer = model.optimizer()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    slots = {
        f"optimizer.state.{slot}.{name}": torch.empty(shape)
        for name, shape in shapes.items()
        for slot in ("param", *MOMENTS)
    }
    dcp.load(state, checkpoint_id=root, no_dist=True)
    dcp.load(slots, checkpoint_id=root, no_dist=True)
    for name, parameter in model.named_parameters():
        masters = slots[f"optimizer.state.param.{name}"]
        assert torch.equal(masters.bfloat16(), state[name]), name
        parameter.data.copy_(masters)
        moments = {slot: slots[f"optimizer.state.{slot}.{name}"] for slot in MOMENTS}
        optimizer.state[parameter] = {**moments, "step": torch.tensor(float(STEPS))}
    return model, optimizer, common
