"""What a class makes of a config.json: measured on its config class, key by key."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparkling_cli.models.catalog.filled import ROPE_KEYS, free_keys, ordered
from sparkling_cli.models.catalog.irrelevant import ROPE, UNSEEN, plain_rope, rope_text
from sparkling_cli.models.catalog.teach_terms import find_term
from sparkling_cli.models.catalog.terms import numbers_of
from sparkling_cli.models.skeleton import text_config
from sparkling_cli.models.tiny_config import layer_count

Config = dict[str, Any]
Entry = dict[str, Any]
Rule = dict[str, Any]


def completed(config: Mapping[str, Any]) -> Config | None:
    """The config as its class completes it, without what a class does not see; None if it refuses it."""
    try:
        real = text_config(config)
    except Exception:  # a config class may raise anything on what it does not accept
        return None
    return {key: value for key, value in real.items() if key not in UNSEEN}


def reduced(entry: Mapping[str, Any], real: Mapping[str, Any]) -> Config:
    """A completed config without what no layout depends on, as ``filled`` gives it."""
    config = ordered(entry, real)
    if "rope_parameters" in config:
        plain = plain_rope(config["rope_parameters"])
        if isinstance(plain, tuple):
            kind = "any" if plain[0] in entry["rope"] else plain[0]
            config["rope_parameters"] = rope_text(kind, plain[1])
        else:
            config["rope_parameters"] = plain
    return config


def rules(model_type: str, architecture: str, defaults: Config, samples: Sequence[Config]) -> Entry:
    """The part of an entry that says what the class makes of a config.

    Args:
        model_type: of the class.
        architecture: name of the class.
        defaults: its default config, completed.
        samples: completed configs in several sizes, with all keys.
    """
    keys = copy.deepcopy(defaults)
    entry: Entry = {"keys": keys, "extra": [], "aliases": _aliases(model_type, keys)}
    entry["rope"] = sorted(ROPE)
    entry["spelled"] = True
    entry["free"] = free_keys(keys)
    head = {"model_type": model_type, "architectures": [architecture]}

    def ask(config: Config) -> Config | None:
        return completed({**head, **config})

    entry["nulled"] = _nulled(samples[0], ask)
    for name, without in (("absent", True), ("null", False)):
        found = {key: _rule(entry, key, samples, ask, without) for key in keys if key not in ROPE_KEYS}
        entry[name] = {key: rule for key, rule in found.items() if rule is not None}
    entry["computed"] = _computed(entry, samples, ask)
    if "rope_parameters" in keys:
        plain = plain_rope(keys["rope_parameters"])
        entry["rotated"] = plain[1] if isinstance(plain, tuple) else None
        keys["rope_parameters"] = rope_text("any", plain[1]) if isinstance(plain, tuple) else plain
        entry["absent"]["rope_parameters"] = {"value": keys["rope_parameters"]}
    return entry


def _aliases(model_type: str, keys: Mapping[str, Any]) -> dict[str, str]:
    """Other names of keys that the config class knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    table = dict(getattr(CONFIG_MAPPING[model_type], "attribute_map", {}) or {})
    return {alias: key for alias, key in sorted(table.items()) if key in keys and alias not in keys}


def _nulled(sample: Config, ask: Callable[[Config], Config | None]) -> dict[str, str]:
    """Keys that the class sets to null where a switch is off."""
    if not {"sliding_window", "use_sliding_window"} <= set(sample):
        return {}
    real = ask({**sample, "sliding_window": 64, "use_sliding_window": False})
    off = real is not None and real["sliding_window"] is None
    return {"sliding_window": "use_sliding_window"} if off else {}


def _rule(
    entry: Entry, key: str, samples: Sequence[Config], ask: Callable[[Config], Config | None], without: bool
) -> Rule | None:
    """What the class puts in the place of a key that is absent, or null."""
    seen: list[tuple[Config, Any]] = []
    for sample in samples:
        changed = {k: v for k, v in sample.items() if k != key} if without else {**sample, key: None}
        real = ask(changed)
        if real is None or key not in real:
            return None
        rest = [{k: v for k, v in reduced(entry, c).items() if k != key} for c in (sample, real)]
        if rest[0] != rest[1]:
            return None
        seen.append((sample, real[key]))
    return _found(key, seen)


def _found(key: str, seen: Sequence[tuple[Config, Any]]) -> Rule | None:
    values = [value for _, value in seen]
    if all(value == values[0] and type(value) is type(values[0]) for value in values):
        per_layer = isinstance(values[0], list) and len(values[0]) == layer_count(seen[0][0])
        if not per_layer or not values[0]:
            return {"value": values[0]}
    if all(type(value) is int for value in values):
        others = [({k: n for k, n in numbers_of(c).items() if k != key}, value) for c, value in seen]
        term = find_term(others)
        return None if term is None else {"term": term}
    if all(isinstance(value, list) for value in values):
        longest = max(values, key=len)
        for period in range(1, len(longest) // 2 + 1):
            each = longest[:period]
            if all(v == [each[i % period] for i in range(layer_count(c))] for c, v in seen):
                return {"each": each}
    return None


def _computed(
    entry: Entry, samples: Sequence[Config], ask: Callable[[Config], Config | None]
) -> dict[str, Rule]:
    """Whole numbers that the class computes, whatever a config says."""
    found = {}
    for key, value in samples[0].items():
        if type(value) is not int or key in entry["free"]:
            continue
        real = ask({**samples[0], key: value + 2})
        if real is not None and real.get(key) == value and key in entry["absent"]:
            found[key] = entry["absent"][key]
    return found
