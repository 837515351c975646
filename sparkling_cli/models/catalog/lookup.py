"""The entry of a config's class, and what it says; None whenever anything is not as it was proved."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.models.catalog.filled import filled
from sparkling_cli.models.catalog.structure import difference, head_rule, plausible, text_of, tried
from sparkling_cli.models.catalog.template import Parameters, kinds_of, layout_of, parameters_of

#: Where the entries are, in the package.
FOLDER = ("layouts", "transformers")
_NAME = re.compile(r"\w+")


@dataclass(frozen=True)
class Known:
    """What the catalog says about a config.

    Attributes:
        layout: equal to what inference would find, but for measured numbers in reasons.
        parameters: as the model's ``named_parameters()`` would give them, and those that are decayed.
    """

    layout: ModelLayout
    parameters: Parameters


def known(config: Mapping[str, Any]) -> Known | None:
    """What was proved about exactly such a config, without torch or transformers; None if nothing was.

    Args:
        config: the content of ``config.json``.
    """
    names = config.get("architectures")
    model_type = config.get("model_type")
    if "auto_map" in config or not isinstance(names, list) or len(names) != 1:
        return None
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in (model_type, names[0])):
        return None
    entry = _entry(f"{model_type}-{names[0]}")
    if entry is None or not is_current(entry["transformers"], config):
        return None
    return answer(entry, config)


def is_current(made_with: str, config: Mapping[str, Any]) -> bool:
    """Whether an entry is of the transformers version that counts: the installed one, else the config's."""
    try:
        return importlib.metadata.version("transformers") == made_with
    except importlib.metadata.PackageNotFoundError:
        return config.get("transformers_version") == made_with


def answer(entry: Mapping[str, Any], raw: Mapping[str, Any]) -> Known | None:
    """What one entry says about a config of its class, whatever version is installed."""
    config = filled(entry, raw)
    if config is None or not plausible(config):
        return None
    rule = head_rule(config)
    for structure in _matching(entry, config):
        if rule not in structure["heads"] or any(raw.get(key) is None for key in structure["needs"]):
            continue
        template = entry["templates"][structure["template"]]
        kinds = kinds_of(template, config)
        if kinds is None or list(dict.fromkeys(kinds)) != structure["kinds"]:
            continue
        layout = layout_of(template, config, kinds)
        return None if layout is None else Known(layout, parameters_of(template, layout, kinds))
    return None


def _matching(entry: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The structures of an entry that shrink to the same tiny models."""
    own: dict[str, str] = {}
    for structure in entry["structures"]:
        trials = text_of(structure["tried"])
        if trials not in own:
            tiny = tried(config, structure["tried"])
            own[trials] = text_of([difference(entry["base"], one) for one in tiny])
        if own[trials] == text_of(structure["differs"]):
            yield structure


@functools.lru_cache(maxsize=4)
def _entry(name: str) -> dict[str, Any] | None:
    try:
        return read_entry(name)
    except OSError:
        return None


def entry_names() -> tuple[str, ...]:
    """All entries: ``model_type-Class``."""
    found = (p.name for p in files("sparkling_cli").joinpath(*FOLDER).iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in found if name.endswith(".json")))


def read_entry(name: str) -> dict[str, Any]:
    """One entry, by a name of :func:`entry_names`; templates put together from their parts."""
    text = files("sparkling_cli").joinpath(*FOLDER, f"{name}.json").read_text(encoding="utf-8")
    entry: dict[str, Any] = json.loads(text)
    parts = entry.pop("parts")
    entry["templates"] = [{k: parts[i] for k, i in t.items()} for t in entry["templates"]]
    return entry
