"""A layout and a list of parameters in real sizes, from an entry's template.

Three things are open in a template: sizes of axes and anonymous numbers (expressions in config keys, the
latter in brackets), the layers that a name is restricted to (``{layers=@1}``: those of kind 1), and how
often the names of each kind of layer occur.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparkling_cli.layout.file import FORMAT, from_dict
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.layout.names import compress
from sparkling_cli.models.catalog.structure import features
from sparkling_cli.models.catalog.terms import evaluate, numbers_of
from sparkling_cli.models.tiny_config import layer_count

#: parameters of a model in order, and which of them the Trainer decays
Parameters = tuple[list[tuple[str, tuple[int, ...]]], set[str]]
Template = Mapping[str, Any]

_OPEN = re.compile(r"\[([^\]]+)\]")
_KINDS = re.compile(r"=@([\d,]+)\}")


def kinds_of(template: Template, config: Mapping[str, Any]) -> list[int] | None:
    """The kind of every layer; None if the entry has not seen one of them."""
    table = template["kinds"]
    if table is None:
        return [0] * layer_count(config)
    found = [table.get(said) for said in features(config)]
    return None if None in found else found


def layout_of(template: Template, config: Mapping[str, Any], kinds: Sequence[int]) -> ModelLayout | None:
    """The layout of the model of a completed config; None if a size is no whole number."""
    numbers = numbers_of(config)

    def closed(text: str) -> str:
        text = _OPEN.sub(lambda m: str(evaluate(m.group(1), numbers)), text)
        return _KINDS.sub(lambda m: "=" + _layers(m.group(1), kinds) + "}", text)

    def table(patterns: Mapping[str, str]) -> dict[str, str]:
        return {closed(name): closed(text) for name, text in patterns.items()}

    data = {"format": FORMAT, **{k: v for k, v in template.items() if k in _PLAIN}}
    data["tensors"] = table(template["tensors"])
    if "disk" in template:
        data["disk"] = table(template["disk"])
    if "assembly" in template:
        data["assembly"] = {
            closed(n): [closed(p) for p in parts] for n, parts in template["assembly"].items()
        }
    data["axes"] = {}
    for name, axis in template["axes"].items():
        size = evaluate(axis["size"], numbers)
        if size is None or size < 1:
            return None
        data["axes"][name] = {**axis, "size": size}
    return from_dict(data, "layout of the package's catalog")


#: Parts of a template that are the same for all sizes.
_PLAIN = ("name", "notes", "tied", "aliases", "config", "compensate")


def _layers(kinds: str, of_layer: Sequence[int]) -> str:
    wanted = set(map(int, kinds.split(",")))
    return compress(i for i, kind in enumerate(of_layer) if kind in wanted)


def parameters_of(template: Template, layout: ModelLayout, kinds: Sequence[int]) -> Parameters:
    """Names and shapes in the order of ``named_parameters()``, and the decayed ones."""
    spelled = template["parameters"]
    parameters: list[tuple[str, tuple[int, ...]]] = []
    decayed: set[str] = set(spelled["beside"])  # other names of shared parameters are among them

    def shape(name: str) -> tuple[int, ...]:
        return layout.shape_of(layout.module_table.find(layout.canonical(name)))

    def add(rows: Sequence[tuple[str, tuple[int, ...], bool]], prefix: str = "") -> None:
        parameters.extend((prefix + name, size) for name, size, _ in rows)
        decayed.update(prefix + name for name, _, decays in rows if decays)

    add([(name, shape(name), decays) for name, decays in spelled["before"]])
    known: dict[int, list[tuple[str, tuple[int, ...], bool]]] = {}
    for i, kind in enumerate(kinds):
        prefix = f"{spelled['prefix']}{i}."
        if kind not in known:
            known[kind] = [(name, shape(prefix + name), decays) for name, decays in spelled["layers"][kind]]
        add(known[kind], prefix)
    add([(name, shape(name), decays) for name, decays in spelled["after"]])
    return parameters, decayed
