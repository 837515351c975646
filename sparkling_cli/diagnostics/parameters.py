"""Parameters of a built model, read from the checkpoint's files when asked for.

Names on disk and in the module may differ, and a stacked expert tensor may lie on disk as one tensor
per expert and projection. Which on-disk tensors make which parameter is decided by transformers' own
conversion rules, so that what is measured is what ``from_pretrained`` would load.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sparkling_cli.errors import CheckpointError, MissingDependencyError
from sparkling_cli.storage.read import TensorSource
from sparkling_cli.storage.tensors import ITEM_BYTES, StoredTensor


@dataclass(frozen=True)
class Recipe:
    """How a parameter comes out of one weight on disk, or by a conversion out of several.

    Attributes:
        sources: (the conversion's source pattern, weight on disk), in stacking order.
        first: the name that the conversion is called with.
        converter: transformers' rule; copied before every use, as it keeps state. None: the weight as it is.
        sliceable: rows can be read without the rest; entry i of dim 0 of what is converted depends on the
            i-th weight of every pattern alone.
    """

    sources: tuple[tuple[str, str], ...]
    first: str = ""
    converter: Any = None
    sliceable: bool = True

    def nth(self, index: int) -> Recipe:
        """Of the ``index``-th weight of every pattern."""
        one = tuple((pattern, names[index]) for pattern, names in self._names.items() if index < len(names))
        return replace(self, sources=one)

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """Pattern -> its weights."""
        found: dict[str, list[str]] = {}
        for pattern, name in self.sources:
            found.setdefault(pattern, []).append(name)
        return found


class ParameterReader:
    """Reads a model's parameters and persistent buffers, whole or some rows, as float32 or as stored.

    Args:
        model: on the meta device; some conversions look at its shapes.
        source: the checkpoint's tensors.

    Attributes:
        recipes: name in the module -> how to make it.
        names: id of a parameter object -> its name with a recipe (tied ones have one).
        unused: weights on disk that the model does not use.

    Raises:
        CheckpointError: a parameter is not in the checkpoint, or has another shape there.
    """

    def __init__(self, model: nn.Module, source: TensorSource) -> None:
        self._model, self._source = model, source
        stored = {name: source.checkpoint.tensors[key] for name, key in source.checkpoint.weights.items()}
        wanted = dict(model.named_parameters(remove_duplicate=False))
        state = model.state_dict(keep_vars=True)
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in state}
        everything: dict[str, torch.Tensor] = {**buffers, **wanted}
        if all(name in stored for name in dict(model.named_parameters())):
            self.recipes = {name: Recipe((("", name),)) for name in everything if name in stored}
        else:
            self.recipes = _conversions(model, everything, stored)
        self.names: dict[int, str] = {}
        for name, parameter in wanted.items():
            if name in self.recipes:
                self.names.setdefault(id(parameter), name)
        for name, parameter in wanted.items():
            if id(parameter) not in self.names:
                raise CheckpointError(
                    f"the model's parameter {name!r} {tuple(parameter.shape)} is not among the checkpoint's "
                    f"{len(stored)} weights",
                    hint="config.json may describe another model, or a shard may be missing",
                )
        for name, recipe in self.recipes.items():
            weight = recipe.sources[0][1]
            if recipe.converter is None and stored[weight].shape != tuple(everything[name].shape):
                raise CheckpointError(
                    f"weight {weight!r} has shape {stored[weight].shape}; the model that "
                    f"config.json describes has {tuple(everything[name].shape)} there"
                )
        used = {weight for recipe in self.recipes.values() for _, weight in recipe.sources}
        self.unused = tuple(sorted(set(stored) - used))

    def whole(self, name: str) -> torch.Tensor:
        """The parameter, as stored."""
        recipe = self.recipes[name]
        if recipe.converter is None:
            return self._source.weight(recipe.sources[0][1])
        return _convert(self._model, recipe, self._source.weight)[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start <= i < stop`` of a sliceable parameter, as stored."""
        recipe = self.recipes[name]
        if recipe.converter is None:
            return self._source.weight(recipe.sources[0][1], rows=slice(start, stop))
        parts = [_convert(self._model, recipe.nth(i), self._source.weight)[name] for i in range(start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _conversions(
    model: nn.Module, wanted: dict[str, torch.Tensor], stored: Mapping[str, StoredTensor]
) -> dict[str, Recipe]:
    """Apply transformers' loading rules to the names on disk."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise MissingDependencyError(
            f"names on disk differ from the model's, and transformers' conversion rules are needed: {error}",
            hint="pip install -U '.[hf]' in the clone",
        ) from error
    rules = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = getattr(model, "base_model_prefix", None)
    recipes: dict[str, Recipe] = {}
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = rename_source_key(name, [], [], prefix, wanted)
        if renamed not in wanted:
            continue
        if pattern is None:
            recipes.setdefault(renamed, Recipe((("", name),)))
        else:
            groups.setdefault(renamed, (by_pattern[pattern], []))[1].append((pattern, name))
    for first, (converter, sources) in groups.items():
        recipe = Recipe(tuple(sources), first, converter, sliceable=False)
        recipes.update(_group_recipes(model, recipe, wanted, stored))
    return recipes


def _group_recipes(
    model: nn.Module,
    recipe: Recipe,
    wanted: Mapping[str, torch.Tensor],
    stored: Mapping[str, StoredTensor],
) -> dict[str, Recipe]:
    """Recipes of all parameters that one conversion yields, tried on the meta device."""

    def meta(name: str) -> torch.Tensor:
        return torch.empty(stored[name].shape, device="meta")

    made = _convert(model, recipe, meta)
    for name, tensor in made.items():
        if name in wanted and tuple(tensor.shape) != tuple(wanted[name].shape):
            raise CheckpointError(
                f"{len(recipe.sources)} weight(s) such as {recipe.sources[0][1]!r} make a tensor of shape "
                f"{tuple(tensor.shape)} for {name!r}; the model that config.json describes has "
                f"{tuple(wanted[name].shape)} there"
            )
    if _stacks(recipe.converter):
        one = _convert(model, recipe.nth(0), meta)
        stacked = all(one[name].shape == (1, *tensor.shape[1:]) for name, tensor in made.items())
        recipe = replace(recipe, sliceable=stacked)
    return {name: recipe for name in made if name in wanted}


def _stacks(converter: Any) -> bool:
    """Whether a conversion stacks along dim 0 first and leaves that dim alone afterwards."""
    first, *rest = converter.operations
    return (
        type(first).__name__ == "MergeModulelist"
        and first.dim == 0
        and all(type(op).__name__ == "Concatenate" and op.dim > 0 for op in rest)
    )


def _convert(
    model: nn.Module, recipe: Recipe, read: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    converter = copy.deepcopy(recipe.converter)
    for pattern, name in recipe.sources:
        converter.add_tensor(recipe.first, name, pattern, lambda name=name: read(name))
    made = converter.convert(recipe.first, model=model, config=getattr(model, "config", None))
    if isinstance(made, tuple):  # transformers 5.0: and what went wrong
        made = made[0]
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def nbytes_of(parameter: torch.Tensor) -> int:
    """Bytes of a parameter once it is in memory, float32."""
    return parameter.numel() * ITEM_BYTES["float32"]
