"""Configs to learn a class from: random sizes for every structure that people's checkpoints have."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparkling_cli.models.catalog.irrelevant import SWITCHES
from sparkling_cli.models.roles import role_of
from sparkling_cli.models.tiny_config import kept_layers, layer_count

Config = dict[str, Any]

#: How many heads read how many keys and values: each its own, groups, all the same.
RELATIONS = ("mha", "gqa", "mqa")
#: Switches whose other value is a structure of its own.
_SWITCH = re.compile(r"bias|norm|qkv|parallel|residual|multi_query|decoder_arch|alibi|sliding")
_PREFIX = re.compile(r"first_k_dense|num_dense_layers")
#: Switches that are varied otherwise.
_OWN = SWITCHES | {"tie_word_embeddings"}


@dataclass(frozen=True)
class Structure:
    """One structure of a class: its heads, and what it has otherwise than the class's defaults.

    A list of numbers stands for layers by number; ``{"kinds": [...]}`` for a list of those, in this order.
    """

    relation: str
    changes: Mapping[str, Any]


def structures(defaults: Config, extra: tuple[str, ...]) -> Iterator[Structure]:
    """The structures of a class: heads and ties in all combinations, everything else one by one."""
    roles = {role_of(key) for key in defaults}
    # latent attention has no key/value heads, although its config counts them
    relations = RELATIONS if "kv_heads" in roles and "kv_lora" not in roles else RELATIONS[:1]
    ties = [{}, {"tie_word_embeddings": not defaults.get("tie_word_embeddings", True)}]
    single = list(_single_changes(defaults))
    for own in [{}, *({key: "size"} for key in extra)]:
        for relation in relations:
            for tie in ties:
                yield Structure(relation, {**tie, **own})
        for change in single:
            both = "sliding_window" in change and not own
            for relation in relations[:2] if both else relations[:2][-1:]:
                yield Structure(relation, {**change, **own})


def _single_changes(defaults: Config) -> Iterator[Config]:
    for key, value in defaults.items():
        if isinstance(value, bool) and _SWITCH.search(key) and key not in _OWN:
            yield {key: not value}
        elif _PREFIX.search(key) and isinstance(value, int):
            yield {key: 0}
        elif role_of(key) == "q_lora" and value is not None:
            yield {key: None}
            if "n_group" in defaults:
                yield {key: None, "n_group": 1, "topk_group": 1}
        elif key == "n_group" and type(value) is int and value > 1:
            yield {key: 1, "topk_group": 1}
        elif key == "sliding_window" and "use_sliding_window" not in defaults:
            yield {key: 64 if value is None else None}
        elif key == "mlp_only_layers":
            yield {key: [0]}
            yield {key: [1]}
        elif key == "decoder_sparse_step":
            yield {key: 2}
        elif key in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            for kind in kinds:
                yield {key: {"kinds": [kind]}}
            if len(kinds) > 1:
                yield {key: {"kinds": kinds[::-1]}}
    if "use_sliding_window" in defaults and isinstance(defaults.get("layer_types"), list):
        both = ["sliding_attention", "full_attention"]
        for kinds in (both, both[::-1], both[:1]):
            yield {"use_sliding_window": True, "sliding_window": 64, "layer_types": {"kinds": kinds}}
    rope = defaults.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("partial_rotary_factor"):
        for part in (0.25, 0.5, 0.75, 1.0):
            if part != rope["partial_rotary_factor"]:
                yield {"rope_parameters": {**rope, "partial_rotary_factor": part}}


def sample(
    defaults: Config,
    structure: Structure,
    heads_rule: int,
    explicit: bool,
    seed: str,
    *,
    turn: int = 0,
    layers: int = 0,
) -> Config:
    """A config of a structure in random sizes, small, so that its model is built in no time.

    Args:
        defaults: the class's completed default config.
        structure: what to make.
        heads_rule: see ``structure.head_rule``; other than 2 only where ``explicit``.
        explicit: the size of a head has a key of its own.
        seed: equal seeds give equal configs.
        turn: small numbers, which chance would repeat, differ from turn to turn, each in its own way.
        layers: how many; 0 for a few.
    """
    rng = random.Random(seed)
    few = {role: numbers[turn % len(numbers)] for role, numbers in _FEW.items()}
    heads = few[structure.relation]
    groups = {"mha": heads, "gqa": few["kv"], "mqa": 1}[structure.relation]
    width = 2 * rng.randrange(4, 17)
    hidden = heads * width
    if explicit:
        factor = {2: 2 * rng.randrange(6, 20), 1: 2 * rng.randrange(6, 20) + 1, 0: 0}[heads_rule]
        hidden = heads * factor if factor else heads * rng.randrange(12, 40) + rng.randrange(1, heads)
    kept = len(kept_layers(defaults))
    layers = layers or max(3, kept + 1) + few["layers"]
    shared: dict[tuple[str, Any], int] = {}
    config: Config = {}
    for key, value in defaults.items():
        role = str(role_of(key))
        if role == "kv_heads":
            config[key] = groups
        elif role == "token" and isinstance(value, list):
            config[key] = [1, 2]  # fewer than layers
        elif type(value) is not int or value < 1:
            continue
        elif role == "heads":
            config[key] = heads
        elif role == "hidden":
            config[key] = hidden
        elif role == "layers":
            config[key] = layers
        elif role == "token":
            config[key] = min(value, 3)
        elif role == "head_dim" and explicit:
            config[key] = width
        elif _PREFIX.search(key):
            config[key] = rng.randrange(1, layers)
        elif role in few:
            config[key] = few[role]
        elif role in _RANGES:
            low, high, step = _RANGES[role]
            config[key] = shared.setdefault((role, value), rng.randrange(low, high, step))
    config |= _grouped_experts(defaults, few["parts"], rng)
    config |= _listed(defaults, layers, rng)
    for key, value in structure.changes.items():
        config[key] = _changed(key, value, layers, width, rng)
    return config


#: what is small -> its value from turn to turn; no two rows are equal, or multiples of each other
_FEW: Mapping[str, tuple[int, ...]] = {
    "mha": (3, 5, 4, 7),
    "gqa": (6, 8, 12, 4),
    "mqa": (4, 2, 6, 3),
    "kv": (2, 4, 3, 2),
    "parts": (2, 3, 4, 2),
    "layers": (1, 0, 2, 3),
    "top_k": (3, 4, 2, 2),
    "shared_experts": (2, 1, 3, 1),
    "rotary": (4, 8, 6, 4),
}
#: role -> lowest size, highest size, step.
_RANGES: Mapping[str, tuple[int, int, int]] = {
    "vocab": (130, 900, 1),
    "positions": (128, 600, 1),
    "ffn": (30, 300, 1),
    "expert_ffn": (14, 120, 1),
    "shared_ffn": (14, 200, 1),
    "experts": (5, 24, 1),
    "window": (16, 90, 1),
    "q_lora": (10, 60, 1),
    "kv_lora": (10, 60, 1),
    "qk_nope": (6, 40, 1),
    "qk_rope": (4, 20, 2),
    "v_dim": (6, 50, 1),
}


def _grouped_experts(defaults: Config, count: int, rng: random.Random) -> Config:
    """Experts that divide into their groups."""
    parts = next((k for k in ("n_group",) if type(defaults.get(k)) is int), None)
    if parts is None or defaults[parts] < 2:
        return {}
    experts = {k: count * rng.randrange(3, 7) for k in defaults if role_of(k) == "experts"}
    own = {"topk_group": rng.randrange(1, count + 1)} if "topk_group" in defaults else {}
    return {parts: count, **own, **experts}


def _listed(defaults: Config, layers: int, rng: random.Random) -> Config:
    """Lists with one entry per layer, of as many layers, with every combination that the defaults have."""
    total = layer_count(defaults)
    kept = kept_layers(defaults)
    others = [i for i in range(total) if i not in kept]
    more = [rng.choice(others) for _ in range(layers - len(kept))] if others else []
    # what appears first stays first: the kept layers are the first of their kind
    chosen = sorted([*kept, *more])[:layers]
    chosen += [chosen[-1]] * (layers - len(chosen)) if chosen else []
    lists = {k: v for k, v in defaults.items() if isinstance(v, list) and len(v) == total and total > 3}
    return {k: [v[i] for i in chosen] for k, v in lists.items()} if chosen else {}


def _changed(key: str, value: Any, layers: int, width: int, rng: random.Random) -> Any:
    if value == "size":
        return width
    if isinstance(value, dict) and "kinds" in value:
        kinds = value["kinds"]
        return [*kinds, *(rng.choice(kinds) for _ in range(layers - len(kinds)))]
    if key == "mlp_only_layers":
        later = [i for i in range(2, layers) if rng.random() < 0.4]
        return [*value, *later]
    return value
