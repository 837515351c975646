"""What inference would look at in a completed config, as a key that is equal only if that is equal.

The verdicts on a model's axes follow from the tiny model that its config shrinks to, so the first part of
the key is what inference itself would try as tiny models. The rest says what real sizes could change: which
kinds of layers there are in which order, and what doubling a number of heads would do to a class that wants
the hidden size to be a multiple of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparkling_cli.models.roles import role_of
from sparkling_cli.models.tiny_config import VARIANTS, candidate, kept_layers, layer_count

Config = Mapping[str, Any]
#: Keys of which a layer's kind is known to depend on the layer's own number.
_PREFIX = re.compile(r"first_k_dense|num_dense_layers")
_STEP = re.compile(r"^(decoder_sparse_step|moe_layer_freq|moe_layer_interval|interleave_moe_layer_step)$")
_INDICES = re.compile(r"idx|indices|_layers$|layer_ids")
#: Roles whose numbers are sizes; all others are structure, whatever their value.
_SIZES = frozenset(
    {"layers", "vocab", "positions", "hidden", "ffn", "expert_ffn", "shared_ffn", "heads", "kv_heads"}
    | {"head_dim", "experts", "q_lora", "kv_lora", "qk_nope", "qk_rope", "v_dim", "top_k", "window"}
)
_EVEN = frozenset({"head_dim", "qk_rope", "rotary"})


def tried(config: Config, trials: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """The tiny configs that inference tries: by variant, and layers more than the fewest possible."""
    fewest = max(2, len(kept_layers(config)))
    return [candidate(dict(config), VARIANTS[variant], fewest + more) for variant, more in trials]


def difference(base: Config, tiny: Config) -> dict[str, Any]:
    """What a tiny config has otherwise than the class's usual one; absent keys under ``-``."""
    changed = {k: v for k, v in sorted(tiny.items()) if k not in base or text_of(v) != text_of(base[k])}
    absent = sorted(set(base) - set(tiny))
    return {**changed, "-": absent} if absent else changed


def text_of(value: Any) -> str:
    """One text for equal values; ``true``, 1 and 1.0 are not equal."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def features(config: Config) -> list[str]:
    """For every layer, all that the config says about this one layer."""
    layers = layer_count(config)
    said: list[list[Any]] = [[] for _ in range(layers)]
    for key, value in sorted(config.items()):
        number = isinstance(value, int) and not isinstance(value, bool)
        for i, row in enumerate(said):
            if isinstance(value, list) and _INDICES.search(key) and all(type(v) is int for v in value):
                row.append(i in value)
            elif isinstance(value, list) and len(value) == layers:
                row.append(value[i])
            elif number and _PREFIX.search(key):
                row.append(i < value)
            elif number and value > 0 and _STEP.search(key):
                row.append([i % value == 0, (i + 1) % value == 0])
    return [text_of(row) for row in said]


def head_rule(config: Config) -> int:
    """2 if the hidden size is a multiple of twice the heads, 1 if of the heads, else 0."""
    hidden, heads = _first(config, "hidden"), _first(config, "heads")
    if hidden is None or heads is None:
        return 2
    return 2 if hidden % (2 * heads) == 0 else 1 if hidden % heads == 0 else 0


def plausible(config: Config) -> bool:
    """Whether the sizes are such as the variants that were proved: whole, positive, even where halved."""
    for key, value in config.items():
        role = role_of(key)
        if role in _SIZES and value is not None and not isinstance(value, (bool, str, list)):
            if type(value) is not int:  # what is not positive is part of the tiny models as it is
                return False
            if role in _EVEN and value % 2 and key != "qk_head_dim":  # only a part of it is rotated
                return False
    counted = [_first(config, role) for role in ("hidden", "heads", "kv_heads", "experts", "layers")]
    if any(count is not None and count < 1 for count in counted):
        return False
    heads, groups = _first(config, "heads"), _first(config, "kv_heads")
    experts, chosen = _first(config, "experts"), _first(config, "top_k")
    if heads and groups and heads % groups:
        return False
    if experts and chosen and chosen > experts:
        return False
    parts, own = config.get("n_group"), config.get("topk_group")
    if parts and experts and (experts % parts or (own and own > parts)):
        return False
    hidden = _first(config, "hidden")
    split = hidden is not None and heads is not None and _first(config, "head_dim") is None
    if split and hidden is not None and heads is not None and (hidden % heads or hidden // heads % 2):
        return False
    return layer_count(config) >= 2


def _first(config: Config, role: str) -> int | None:
    """The number of the first key of a role."""
    return next((v for k, v in config.items() if role_of(k) == role and type(v) is int), None)
