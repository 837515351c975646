"""Where ``FullyShardedDataParallel`` (FSDP 1) keeps a model's parameters: pieces of flat tensors, as it says.

With ``use_orig_params=True`` an optimizer holds of every parameter the piece that lies in this process,
flattened; otherwise the flat tensor of a whole wrapped module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sparkling_cli.training.slices import Piece


def parts_of(model: nn.Module, held: set[int]) -> list[tuple[str, Tensor] | Piece] | None:
    """What this process has: pieces of parameters in flat tensors, and parameters that FSDP leaves alone.

    Args:
        model: wrapped as a whole, in parts, or not at all: then there is no list.
        held: ids of the tensors that the optimizers step; pieces of others are left out.
    """
    handles = [
        (name, module._handle)
        for name, module in model.named_modules()
        if hasattr(getattr(module, "_handle", None), "flat_param")
    ]
    if not handles:
        return None
    flat = {id(one) for _, handle in handles for one in _stepped(handle)}
    flat |= {id(handle.flat_param) for _, handle in handles}
    alone = [(name, p) for name, p in model.named_parameters() if id(p) not in flat]
    pieces = [piece for name, handle in handles for piece in _pieces(name, handle)]
    return [*(piece for piece in pieces if id(piece.tensor) in held), *alone]


def _stepped(handle: Any) -> list[Tensor]:
    """Of every parameter of a flat tensor the tensor that an optimizer holds."""
    flat = handle.flat_param
    return list(flat._params) if flat._params is not None else [flat] * len(flat._fqns)


def _pieces(prefix: str, handle: Any) -> Iterator[Piece]:
    """Of every parameter, also where this process holds nothing of it: the optimizer has it all the same."""
    flat = handle.flat_param
    infos = getattr(flat, "_shard_param_infos", None)
    if infos is None:  # replicated: every process holds all
        infos = handle._get_shard_metadata(0, flat.numel() - 1)
    for name, shape, info, tensor in zip(flat._fqns, flat._shapes, infos, _stepped(handle), strict=True):
        at = info.offset_in_shard if tensor is flat else 0
        start, numel = info.intra_param_start_idx, info.numel_in_shard
        whole = ".".join(part for part in (prefix, name) if part)
        yield Piece(whole, tuple(shape), start or 0, numel or 0, tensor, at or 0)
