"""Kinds of layers that a class makes of their numbers, where its config has no list of them.

A class may derive such a list from a pattern (every sixth layer attends to everything). In a deeper model the
old layers have other numbers, so the list that the class would derive then need not be the old one's: it is
asked for both, and what differs is written out.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from sparkling_cli.errors import LayoutError, SparklingError
from sparkling_cli.layout.depth import LAYERS, Order, appended, deeper_config, layer_lists, lists_layers
from sparkling_cli.layout.keys import lookup, path_of, set_path
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.storage import cache

#: Classes of the packaged layouts that derive nothing layer by layer: to ask them would take seconds.
PLAIN = frozenset(
    {
        *("gemma", "gpt2", "gpt_neox", "granite", "helium", "llama", "mamba2", "mistral", "mixtral", "olmo2"),
        *("olmoe", "phi3", "qwen3_moe", "xlstm"),
    }
)
#: The same as long as a switch of theirs is off.
SWITCHED = {"qwen2": "use_sliding_window", "qwen3": "use_sliding_window"}
#: Properties that are kinds of layers; others (which layers share keys and values) follow from these.
_KINDS = re.compile(r"types?$")
_MISSING = (
    "transformers is not installed, so nobody could be asked which kinds of layers the class of model_type "
    "{kind!r} makes of their numbers: compare the logits of source and output before you train on"
)


def derives_kinds(config: Mapping[str, Any] | None) -> bool:
    """Whether the class of a config may make layers of different kinds by their numbers."""
    kind = (config or {}).get("model_type")
    if config is None or not isinstance(kind, str) or kind in PLAIN:
        return False
    return kind not in SWITCHED or bool(config.get(SWITCHED[kind], False))


@dataclass(frozen=True)
class Completed:
    """A config as its class completes it.

    Attributes:
        config: JSON values, with the lists that the class gives as properties.
        derived: dotted names of those properties.
    """

    config: dict[str, Any]
    derived: frozenset[str]


def completed(config: Mapping[str, Any]) -> Completed | None:
    """A config as its class completes it.

    Args:
        config: of a model of transformers; nothing is built of it but the config.

    Returns:
        None where the class cannot be asked.
    """
    key = cache.key_of("completed config", config)
    known = cache.load("completed-configs", key)
    if isinstance(known, dict):
        return Completed(known["config"], frozenset(known["derived"]))
    from sparkling_cli.models.skeleton import config_object, quiet

    try:
        built = config_object(config)
        with quiet():
            found: dict[str, Any] = json.loads(json.dumps(built.to_dict(), default=str))
    except (SparklingError, ImportError, TypeError, ValueError):
        return None
    derived = _add_properties(built, found, "")
    cache.store("completed-configs", key, {"config": found, "derived": derived})
    return Completed(found, frozenset(derived))


def _add_properties(built: Any, found: dict[str, Any], table: str) -> list[str]:
    """Put the lists among a config object's properties into its table, and return their dotted names."""
    names = []
    for name in dir(type(built)):
        own = getattr(type(built), name)
        if name in found or not _KINDS.search(name) or not isinstance(own, property):
            continue
        try:
            value = getattr(built, name)
        except Exception:  # the class's own code may raise anything
            continue
        if isinstance(value, (list, tuple)):
            found[name] = json.loads(json.dumps(value, default=str))
            names.append(f"{table}{name}")
    for name in getattr(built, "sub_configs", {}):
        if isinstance(found.get(name), dict):
            names += _add_properties(getattr(built, name), found[name], f"{table}{name}.")
    return names


def unasked_class(config: Mapping[str, Any] | None) -> str | None:
    """A warning where the class would have to be asked and transformers is not there."""
    if not derives_kinds(config) or find_spec("transformers") is not None:
        return None
    return _MISSING.format(kind=(config or {})["model_type"])


def written_kinds(
    config: Mapping[str, Any] | None, layout: ModelLayout, order: Order
) -> dict[str, list[Any]]:
    """Lists of kinds that a deeper model's config must have, as its class would derive others.

    Args:
        config: of the shallower model.
        layout: of the shallower model.
        order: of the deeper model.

    Returns:
        Dotted key -> list; none where the class derives what the layers' sources are.

    Raises:
        LayoutError: the class makes other kinds of layers, and takes no list of them.
    """
    if config is None or not derives_kinds(config):
        return {}
    counts = {key for key, term in layout.config.items() if term == LAYERS}
    before = completed(config)
    if before is None or not counts:
        return {}
    lists, fault = _lists_for(config, before, counts, order)
    if not fault:
        return lists
    behind = appended(len(set(order)), len(order))
    works = behind != order and not _lists_for(config, before, counts, behind)[1]
    raise LayoutError(
        f"axes.layers: {fault}",
        hint="put new layers behind the old ones, which keep their numbers then: --at end"
        if works
        else "add as many layers as the pattern of kinds repeats after, behind the old ones: --at end",
    )


def _lists_for(
    config: Mapping[str, Any], before: Completed, counts: set[str], order: Order
) -> tuple[dict[str, list[Any]], str]:
    """Lists to be written for an order, and what is still wrong with them."""
    deeper = copy.deepcopy(dict(config))
    for key in counts:
        if not (table := key.rpartition(".")[0]) or lookup(config, table):
            set_path(deeper, path_of(key), len(order))
    for key, value in deeper_config(config, counts, order).items():
        set_path(deeper, path_of(key), value)
    after = completed(deeper)
    if after is None:  # the output's class is asked anyway, and says what it does not take
        return {}, ""
    wanted = _other_kinds(before.config, after.config, counts, order)
    lists = {key: value for key, value in wanted.items() if key not in before.derived}
    if not wanted:
        return {}, ""
    for key, value in lists.items():
        set_path(deeper, path_of(key), value)
    after = completed(deeper) if lists else after
    if after is None:
        return {}, f"the model's own class takes no list {', '.join(lists)}"
    left = _other_kinds(before.config, after.config, counts, order)
    return lists, _fault(left, after.config, order) if left else ""


def _other_kinds(
    before: Mapping[str, Any], after: Mapping[str, Any], counts: set[str], order: Order
) -> dict[str, list[Any]]:
    """Lists that the class completes otherwise than the layers' sources have it: dotted key -> theirs."""
    found = {}
    for key, old in layer_lists(before, counts):
        new = lookup(after, key)
        if isinstance(new, list) and (wanted := _of_sources(key, old, new, order)) not in (None, new):
            found[key] = wanted
    return {key: value for key, value in found.items() if value is not None}


def _of_sources(key: str, old: Sequence[Any], new: Sequence[Any], order: Order) -> list[Any] | None:
    """A list for the layers' sources; None where it has nothing to do with layers."""
    if lists_layers(key.rpartition(".")[2], old, len(set(order))):
        return [target for target, source in enumerate(order) if source in old]
    whole = len(old) == len(set(order)) and len(new) == len(order)
    return [old[source] for source in order] if whole else None


def _fault(left: Mapping[str, list[Any]], after: Mapping[str, Any], order: Order) -> str:
    key, wanted = next(iter(left.items()))
    found = lookup(after, key)
    pairs = zip(wanted, found, strict=False)
    layer = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
    if layer is None or len(wanted) != len(order):
        return f"the model's own class would make {key} = {found!r}, the layers' sources give {wanted!r}"
    return (
        f"the model's own class makes kinds of layers by their numbers ({key}): layer {layer} would be "
        f"{found[layer]!r}, and its source, layer {order[layer]}, is {wanted[layer]!r}"
    )
