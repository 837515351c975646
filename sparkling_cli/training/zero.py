"""Where DeepSpeed's ZeRO keeps a model's parameters: pieces of flat fp32 tensors, by its own addresses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, distributed, nn

from sparkling_cli.errors import SpecError
from sparkling_cli.training.slices import Piece

#: the flat fp32 tensors of stages 1 and 2, and of stage 3
FLAT = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")


def is_zero(optimizer: Any) -> bool:
    """Whether it is what a DeepSpeed engine has as ``optimizer`` under ZeRO."""
    return any(hasattr(optimizer, name) for name in FLAT)


def base_of(zero: Any) -> Any:
    """The optimizer whose ``step()`` changes the flat tensors.

    Raises:
        SpecError: other tensors are stepped, or another optimizer steps some of them.
    """
    for name in ("zenflow", "use_muon", "swap_optimizer", "backup_optimizer"):
        if getattr(zero, name, False):
            raise SpecError(
                f"DeepSpeed's {type(zero).__name__} with {name}: not all that it trains is stepped by one "
                "optimizer, or kept where it is",
                hint="re-warm under ZeRO 1, 2 or 3 without it",
            )
    return zero.optimizer


def pieces_of(zero: Any, model: nn.Module) -> Iterator[Piece]:
    """What this process holds of every trained parameter."""
    for name, param in model.named_parameters():
        if hasattr(param, "ds_tensor"):
            yield from _stage_3(zero, name, param)
        elif getattr(param, "_hp_mapping", None) is not None:
            yield _stage_1_and_2(zero, name, param)


def _stage_1_and_2(zero: Any, name: str, param: Tensor) -> Piece:
    found: Any = param._hp_mapping  # type: ignore[attr-defined]
    flat = getattr(zero, FLAT[0])[found.param_group_index]
    start, at = found.lp_fragment_address, found.hp_fragment_address
    return Piece(name, tuple(param.shape), start.start, start.numel, flat, at.start)


def _stage_3(zero: Any, name: str, param: Any) -> Iterator[Piece]:
    """Every process holds an equal share of every flattened parameter, the last ones padded."""
    if param.ds_id not in zero.grad_position:  # not trained
        return
    group, at, numel = zero.grad_position[param.ds_id]
    start = distributed.get_rank(param.ds_process_group) * numel
    held = min(numel, param.ds_numel - start)
    if held > 0:
        yield Piece(name, tuple(param.ds_shape), start, held, getattr(zero, FLAT[1])[group], at)
