"""Where Megatron's distributed optimizer keeps a model's parameters: a flat fp32 tensor of each, per rank.

What a rank's parameter is of the checkpoint's tensors (a layer of a stack, rows or columns, halves of a gated
matrix) the model says itself, by the metadata that it is saved with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

from sparkling_cli.errors import SpecError
from sparkling_cli.training.slices import Piece


def is_distributed(optimizer: Any) -> bool:
    """Whether it is Megatron's, which shares out flat buffers of parameters among ranks."""
    return hasattr(optimizer, "gbuf_ranges")


def chained(optimizer: Any) -> list[Any]:
    """The optimizers of a chain of Megatron's; of any other, it alone."""
    found = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if found is None else list(found)


def base_of(distributed: Any) -> Any:
    """The optimizer whose ``step()`` changes the masters.

    Raises:
        SpecError: the masters lie elsewhere, or other optimizers step them.
    """
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
        if getattr(distributed.config, name, False):
            raise SpecError(
                f"Megatron's distributed optimizer with {name}: its masters are not what one optimizer steps",
                hint=f"re-warm without --{name.replace('_', '-')}",
            )
    return distributed.optimizer


def pieces_of(distributed: Any, model: nn.Module | Iterable[nn.Module]) -> Iterator[Piece]:
    """What this process holds of every parameter that the optimizer trains.

    Args:
        distributed: the optimizer.
        model: of this process, or its parts (virtual stages); wrapped or not.
    """
    parts: dict[int, list[Any]] = {}
    for one in [model] if isinstance(model, nn.Module) else model:
        while isinstance(inner := getattr(one, "module", None), nn.Module):
            one = inner
        for saved in _leaves(one.sharded_state_dict()):  # type: ignore[operator]
            if isinstance(saved.data, Tensor):
                parts[id(saved.data)] = _leaves(saved.build()) if hasattr(saved, "build") else [saved]
    for param, (group, place) in distributed.model_param_group_index_map.items():
        held = distributed._get_model_param_range_map(param)["param"]
        tensor = distributed.optimizer.param_groups[group]["params"][place]
        for part in parts[id(param)]:
            at = (part.data.data_ptr() - param.data_ptr()) // param.element_size()
            low, high = max(at, held.start), min(at + part.data.numel(), held.end)
            if low < high:
                sizes = (1,) * (len(part.global_shape) - len(part.local_shape)) + tuple(part.local_shape)
                box = tuple((a, a + n) for a, n in zip(part.global_offset, sizes, strict=True))
                assert prod(sizes) == part.data.numel()
                yield Piece(
                    part.key, tuple(part.global_shape), low - at, high - low, tensor, low - held.start, box
                )


def _leaves(value: Any) -> list[Any]:
    """What is saved of a model: tensors with their places, and what makes several of one parameter."""
    if isinstance(value, Mapping):
        return [leaf for one in value.values() for leaf in _leaves(one)]
    if isinstance(value, (list, tuple)):
        return [leaf for one in value for leaf in _leaves(one)]
    return [value] if hasattr(value, "build") or hasattr(value, "global_offset") else []
