"""Parameters of a built model, read from the checkpoint's files when asked for.

Names on disk and in the module may differ, and a stacked expert tensor may lie on disk as one tensor
per expert and projection. Which on-disk tensors make which parameter is decided by transformers' own
conversion rules, so that what is measured is what ``from_pretrained`` would load.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import CheckpointError, MissingDependencyError
from sparkling_cli.storage.read import TensorSource
from sparkling_cli.storage.tensors import ITEM_BYTES, StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Direct:
    """The parameter is one weight on disk."""

    weight: str


@dataclass(frozen=True)
class Converted:
    """The parameter comes out of a conversion of several weights on disk.

    Attributes:
        first: the name that the conversion is called with.
        converter: transformers' rule; copied before every use, as it keeps state.
        sources: (the rule's source pattern, weight on disk), in stacking order.
        stacked: entry i of dim 0 depends on the i-th weight of every pattern alone.
    """

    first: str
    converter: Any
    sources: tuple[tuple[str, str], ...]
    stacked: bool = False


Recipe = Direct | Converted


@dataclass
class _Group:
    converter: Any
    sources: list[tuple[str, str]] = field(default_factory=list)


class ParameterReader:
    """Reads a model's parameters and persistent buffers, whole or some rows, as float32 or as stored.

    Args:
        model: on the meta device; some conversions look at its shapes.
        source: the checkpoint's tensors.
        recipes: name in the module -> how to make it.
        names: id of a parameter object -> its name with a recipe (tied ones have one).
        unused: weights on disk that the model does not use.
    """

    def __init__(
        self,
        model: nn.Module,
        source: TensorSource,
        recipes: Mapping[str, Recipe],
        names: Mapping[int, str],
        unused: tuple[str, ...],
    ) -> None:
        self.model = model
        self.source = source
        self.recipes = recipes
        self.names = names
        self.unused = unused

    def sliceable(self, name: str) -> bool:
        """Whether rows can be read without the rest."""
        recipe = self.recipes[name]
        return isinstance(recipe, Direct) or recipe.stacked

    def whole(self, name: str) -> torch.Tensor:
        """The parameter, as stored."""
        recipe = self.recipes[name]
        if isinstance(recipe, Direct):
            return self.source.weight(recipe.weight)
        return _convert(self.model, recipe, recipe.sources, self.source.weight)[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start <= i < stop`` of a sliceable parameter, as stored."""
        import torch

        recipe = self.recipes[name]
        if isinstance(recipe, Direct):
            return self.source.weight(recipe.weight, rows=slice(start, stop))
        parts = [
            _convert(self.model, recipe, _nth(recipe.sources, i), self.source.weight)[name]
            for i in range(start, stop)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def parameter_reader(model: nn.Module, source: TensorSource) -> ParameterReader:
    """Find how every parameter of ``model`` is stored.

    Raises:
        CheckpointError: a parameter is not in the checkpoint, or has another shape there.
    """
    stored = {name: source.checkpoint.tensors[key] for name, key in source.checkpoint.weights.items()}
    wanted = dict(model.named_parameters(remove_duplicate=False))
    buffers = _persistent_buffers(model)
    everything: dict[str, torch.Tensor] = {**buffers, **wanted}
    if all(name in stored for name in dict(model.named_parameters())):
        recipes: dict[str, Recipe] = {name: Direct(name) for name in everything if name in stored}
    else:
        recipes = _conversions(model, everything, stored)
    names: dict[int, str] = {}
    for name, parameter in wanted.items():
        if name in recipes:
            names.setdefault(id(parameter), name)
    for name, parameter in wanted.items():
        if id(parameter) not in names:
            raise CheckpointError(
                f"the model's parameter {name!r} {tuple(parameter.shape)} is not among the checkpoint's "
                f"{len(stored)} weights",
                hint="config.json may describe another model, or a shard may be missing",
            )
    _check_shapes(recipes, everything, stored)
    used = {weight for recipe in recipes.values() for weight in _weights_of(recipe)}
    return ParameterReader(model, source, recipes, names, tuple(sorted(set(stored) - used)))


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    state = set(model.state_dict(keep_vars=True))
    return {name: buffer for name, buffer in model.named_buffers() if name in state}


def _weights_of(recipe: Recipe) -> tuple[str, ...]:
    if isinstance(recipe, Direct):
        return (recipe.weight,)
    return tuple(name for _, name in recipe.sources)


def _check_shapes(
    recipes: Mapping[str, Recipe],
    wanted: Mapping[str, torch.Tensor],
    stored: Mapping[str, StoredTensor],
) -> None:
    for name, recipe in recipes.items():
        if isinstance(recipe, Direct) and stored[recipe.weight].shape != tuple(wanted[name].shape):
            raise CheckpointError(
                f"weight {recipe.weight!r} has shape {stored[recipe.weight].shape}; the model that "
                f"config.json describes has {tuple(wanted[name].shape)} there"
            )


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
    groups: dict[str, _Group] = {}
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if renamed not in wanted and name in wanted:
            renamed, pattern = rename_source_key(name, [], [], prefix, wanted)
        if renamed not in wanted:
            continue
        if pattern is None:
            recipes.setdefault(renamed, Direct(name))
        else:
            group = groups.setdefault(renamed, _Group(by_pattern[pattern]))
            group.sources.append((pattern, name))
    for first, group in groups.items():
        recipes.update(_group_recipes(model, first, group, wanted, stored))
    return recipes


def _group_recipes(
    model: nn.Module,
    first: str,
    group: _Group,
    wanted: Mapping[str, torch.Tensor],
    stored: Mapping[str, StoredTensor],
) -> dict[str, Recipe]:
    """Recipes of all parameters that one conversion yields, tried on the meta device."""

    def meta(name: str) -> torch.Tensor:
        import torch

        return torch.empty(stored[name].shape, device="meta")

    recipe = Converted(first, group.converter, tuple(group.sources))
    made = _convert(model, recipe, recipe.sources, meta)
    for name, tensor in made.items():
        if name in wanted and tuple(tensor.shape) != tuple(wanted[name].shape):
            raise CheckpointError(
                f"{len(recipe.sources)} weight(s) such as {recipe.sources[0][1]!r} make a tensor of shape "
                f"{tuple(tensor.shape)} for {name!r}; the model that config.json describes has "
                f"{tuple(wanted[name].shape)} there"
            )
    if _stacks(group.converter):
        stacked = Converted(first, group.converter, tuple(group.sources), stacked=True)
        one = _convert(model, stacked, _nth(stacked.sources, 0), meta)
        if all(one[name].shape == (1, *tensor.shape[1:]) for name, tensor in made.items()):
            recipe = stacked
    return {name: recipe for name in made if name in wanted}


def _stacks(converter: Any) -> bool:
    """Whether a conversion stacks along dim 0 first and leaves that dim alone afterwards."""
    first, *rest = converter.operations
    return (
        type(first).__name__ == "MergeModulelist"
        and first.dim == 0
        and all(type(op).__name__ == "Concatenate" and op.dim > 0 for op in rest)
    )


def _nth(sources: tuple[tuple[str, str], ...], index: int) -> tuple[tuple[str, str], ...]:
    """The ``index``-th weight of every pattern."""
    seen: dict[str, int] = {}
    found = []
    for pattern, name in sources:
        if seen.setdefault(pattern, 0) == index:
            found.append((pattern, name))
        seen[pattern] += 1
    return tuple(found)


def _convert(
    model: nn.Module,
    recipe: Converted,
    sources: tuple[tuple[str, str], ...],
    read: Callable[[str], torch.Tensor],
) -> dict[str, torch.Tensor]:
    converter = copy.deepcopy(recipe.converter)
    for pattern, name in sources:
        converter.add_tensor(recipe.first, name, pattern, lambda name=name: read(name))
    made = converter.convert(recipe.first, model=model, config=getattr(model, "config", None))
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def nbytes_of(parameter: torch.Tensor) -> int:
    """Bytes of a parameter once it is in memory, float32."""
    return parameter.numel() * ITEM_BYTES["float32"]
