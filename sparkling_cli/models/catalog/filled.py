"""A config.json completed as its class does: defaults, sizes that follow from others, rotary parameters.

What the class does was measured when the entry was made (``teach``): what it makes of a key that is not
there, of one that is null, of one that it computes itself. A key that the entry does not know, or knows no
rule for, ends the matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparkling_cli.models.catalog.irrelevant import UNSEEN, is_irrelevant, plain_rope, rope_text, within
from sparkling_cli.models.catalog.terms import apply
from sparkling_cli.models.tiny_config import layer_count

Entry = Mapping[str, Any]
#: Keys of classifiers: not written for language models.
_LABELS = frozenset({"id2label", "label2id"})
#: More layers than this are nobody's model, and would be counted for hours.
_MOST_LAYERS = 4096
#: Where rotary parameters have been written over the years.
ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})


def filled(entry: Entry, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The completed config, without what no layout depends on; None if something of it is unknown."""
    own = {key: value for key, value in raw.items() if key not in UNSEEN or key in _LABELS}
    given = {entry["aliases"].get(key, key): value for key, value in own.items()}
    if len(given) != len(own) or not isinstance(raw.get("use_cache", True), bool):
        return None  # a key under two names, or a value that the class refuses
    config = dict(given)
    if layer_count(config) > _MOST_LAYERS:
        return None
    if "rope_parameters" in entry["keys"] and not _rope(entry, config):
        return None
    if any(key not in entry["keys"] and key not in entry["extra"] for key in config):
        return None
    for key, gate in entry["nulled"].items():
        if config.get(gate, entry["keys"][gate]) is False:
            config[key] = None
    if not _completed(entry, config):
        return None
    if not _within(entry, config):
        return None
    return ordered(entry, config)


def ordered(entry: Entry, config: Mapping[str, Any]) -> dict[str, Any]:
    """A completed config in the class's own order of keys, without those that are free."""
    keys = [key for key in (*entry["keys"], *entry["extra"]) if key in config]
    return {key: config[key] for key in keys if key not in entry["free"]}


def _within(entry: Entry, config: Mapping[str, Any]) -> bool:
    """Whether free keys are in their ranges, and lists with an entry per layer as long as they must be."""
    vocab, layers = config.get("vocab_size"), layer_count(config)
    usual = layer_count(entry["keys"])
    for key, default in entry["keys"].items():
        value = config[key]
        if key in entry["free"]:
            if type(vocab) is not int or not within(key, value, default, vocab):
                return False
            if isinstance(value, list) and len(value) == layers:
                return False  # it could be taken for one
        per_layer = isinstance(default, list) and bool(default) and len(default) == usual
        if per_layer and not (isinstance(value, list) and len(value) == layers):
            return False
    return True


def free_keys(keys: Mapping[str, Any]) -> list[str]:
    """Keys of a class that no layout depends on."""
    return [key for key, default in keys.items() if is_irrelevant(key, default)]


def _completed(entry: Entry, config: dict[str, Any]) -> bool:
    """Fill in what is absent, null, or computed by the class; False if a rule is missing."""
    layers = layer_count({**entry["keys"], **config})
    following: dict[str, Mapping[str, Any]] = {}
    for key in entry["keys"]:
        if config.get(key) is None:
            rule = entry["null" if key in config else "absent"].get(key)
            if rule is None:
                return False
            if "term" in rule:
                following[key] = rule  # of keys that may be absent themselves
            else:
                config[key] = apply(rule, config, layers)[1]
    for key, rule in following.items():
        known, config[key] = apply(rule, config, layers)
        if not known:
            return False
    for key, rule in entry["computed"].items():
        known, value = apply(rule, config, layers)
        if not known or config[key] != value:
            return False
    return all(key in config for key in entry["keys"])


def _rope(entry: Entry, config: dict[str, Any]) -> bool:
    """Put rotary parameters where the class puts them, reduced to what could matter; False if unknown."""
    scaling = config.pop("rope_scaling", None)
    there = config.pop("rope_parameters", None)
    usual = entry["keys"]["rope_parameters"]
    own_factor = "partial_rotary_factor" in entry["keys"]
    factor = config.get("partial_rotary_factor") if own_factor else config.pop("partial_rotary_factor", None)
    theta = config.pop("rope_theta", None)
    if scaling is not None and there is not None:
        return False
    if theta is not None and not (isinstance(theta, (int, float)) and theta > 0):
        return False
    base = scaling if scaling is not None else there
    if isinstance(usual, dict):  # by kind of layer
        found = usual if base is None and factor is None and theta is None else plain_rope(base)
        config["rope_parameters"] = found
        return bool(found == usual)
    flat = plain_rope(base if base is not None else {})
    if not isinstance(flat, tuple) or flat[0] not in entry["rope"]:
        return False
    older = scaling is not None or theta is not None or (factor is not None and not own_factor)
    partly = there is not None and flat[1] is None and entry["rotated"] is not None
    if (older or partly) and not entry["spelled"]:
        return False
    if None not in (flat[1], factor) and factor != flat[1]:
        return False
    part = next((p for p in (flat[1], factor) if p is not None), entry["rotated"])
    config["rope_parameters"] = rope_text("any", part)
    return True
