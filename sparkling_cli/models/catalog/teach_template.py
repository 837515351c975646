"""Several layouts of one structure, in different sizes, as one template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparkling_cli.layout.file import to_dict
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.layout.names import compress
from sparkling_cli.models.catalog.structure import features
from sparkling_cli.models.catalog.teach_terms import find_term
from sparkling_cli.models.catalog.template import Parameters
from sparkling_cli.models.catalog.terms import evaluate, numbers_of

_NUMBER = re.compile(r"(?<!\w)\d+(?!\w)")
_ONLY = re.compile(r"\{layers=([\d,\-]+)\}")
_MEASURED = re.compile(r" \((?:best )?(?:relative )?error [^)]*\)")
_LAYER = re.compile(r"^(.*?)(?<![^.])(\d+)\.(.*)$")

#: names below one layer, with whether each is decayed
Kind = tuple[tuple[str, bool], ...]


class Unclean(Exception):
    """Instances that no one template explains."""


@dataclass(frozen=True)
class Instance:
    """What inference found for one config."""

    config: Mapping[str, Any]
    layout: ModelLayout
    parameters: Parameters


def plain(layout: ModelLayout) -> dict[str, Any]:
    """A layout as data, without the numbers that were measured on the way."""
    data = to_dict(layout)
    for axis in data["axes"].values():
        axis["reason"] = _MEASURED.sub("", axis["reason"])
    if "notes" in data:
        data["notes"] = [_MEASURED.sub("", note) for note in data["notes"]]
    return data


def template_of(instances: Sequence[Instance], usual: Mapping[str, str]) -> tuple[dict[str, Any], list[int]]:
    """The template that gives all instances back, and the kinds of layers in the order of their appearance.

    Args:
        instances: in different sizes.
        usual: axis -> the expression that gives its size in other structures of the class.

    Raises:
        Unclean: no template does.
    """
    spelled, table, kinds = _spelled(instances)
    data = [plain(instance.layout) for instance in instances]
    first = data[0]
    template: dict[str, Any] = {k: v for k, v in first.items() if k not in _OPEN}
    if any({k: v for k, v in d.items() if k not in _OPEN} != template for d in data):
        raise Unclean("layouts differ in more than sizes")
    template["axes"] = _axes(instances, [d["axes"] for d in data], usual)
    for part in ("tensors", "disk"):
        if part in first:
            template[part] = _patterns(instances, [d[part] for d in data], kinds)
    if "assembly" in first:
        names = [[(n, *parts) for n, parts in d["assembly"].items()] for d in data]
        closed = [_names(instances, row, kinds) for row in zip(*(sum(n, ()) for n in names), strict=True)]
        at = 0
        template["assembly"] = {}
        for group in names[0]:
            template["assembly"][closed[at]] = closed[at + 1 : at + len(group)]
            at += len(group)
    template["parameters"] = spelled
    template["kinds"] = table
    order = list(dict.fromkeys(kinds[0]))
    if any(list(dict.fromkeys(one)) != order for one in kinds):
        raise Unclean("kinds of layers come in different orders")
    return template, order


_OPEN = ("format", "axes", "tensors", "disk", "assembly")


def _axes(
    instances: Sequence[Instance], axes: Sequence[Mapping[str, Any]], usual: Mapping[str, str]
) -> dict[str, Any]:
    found = {}
    for name, axis in axes[0].items():
        if any(list(one) != list(axes[0]) for one in axes):
            raise Unclean("layouts have different axes")
        rest = {k: v for k, v in axis.items() if k != "size"}
        if any({k: v for k, v in one[name].items() if k != "size"} != rest for one in axes):
            raise Unclean(f"axis {name} is told differently: {axis['reason']}")
        sizes = [one[name]["size"] for one in axes]
        found[name] = {"size": _term(instances, sizes, name, usual.get(name)), **rest}
    return found


def _term(instances: Sequence[Instance], values: Sequence[int], what: str, usual: str | None = None) -> str:
    """An expression that gives the values: the usual one if it does."""
    samples = [(numbers_of(i.config), v) for i, v in zip(instances, values, strict=True)]
    if usual is not None and all(evaluate(usual, numbers) == v for numbers, v in samples):
        return usual
    term = find_term(samples)
    if term is None:
        raise Unclean(f"no expression gives {what}: {list(values)}")
    return term


def _patterns(
    instances: Sequence[Instance], tables: Sequence[Mapping[str, str]], kinds: Sequence[Sequence[int]]
) -> dict[str, str]:
    if len({len(table) for table in tables}) > 1:
        raise Unclean("layouts have different numbers of patterns")
    found = {}
    for row in zip(*(table.items() for table in tables), strict=True):
        name = _names(instances, [name for name, _ in row], kinds)
        found[name] = _text(instances, [text for _, text in row])
    return found


def _text(instances: Sequence[Instance], texts: Sequence[str]) -> str:
    """A layout whose anonymous numbers are expressions where they vary."""
    if len(set(texts)) == 1:
        return texts[0]
    if len({_NUMBER.sub("#", text) for text in texts}) > 1:
        raise Unclean(f"layouts of one tensor differ: {', '.join(sorted(set(texts)))}")
    numbers = [[int(n) for n in _NUMBER.findall(text)] for text in texts]
    slots = iter(
        str(row[0]) if len(set(row)) == 1 else f"[{_term(instances, row, texts[0])}]"
        for row in zip(*numbers, strict=True)
    )
    return _NUMBER.sub(lambda match: next(slots), texts[0])


def _names(instances: Sequence[Instance], names: Sequence[str], kinds: Sequence[Sequence[int]]) -> str:
    """A name template, the layers that it is restricted to said by kind."""
    if not any(_ONLY.search(name) for name in names):
        if len(set(names)) > 1:
            raise Unclean(f"names differ: {', '.join(sorted(set(names)))}")
        return names[0]
    found = set()
    for name, of_layer in zip(names, kinds, strict=True):
        match = _ONLY.search(name)
        if match is None:
            raise Unclean(f"{name} is not restricted to layers everywhere")
        wanted = next((w for w in _subsets(of_layer) if _only(of_layer, w) == match.group(1)), None)
        if wanted is None:
            raise Unclean(f"the layers of {name} are not those of a kind")
        text = ",".join(map(str, wanted))
        found.add(_ONLY.sub("{layers=@" + text + "}", name))
    if len(found) > 1:
        raise Unclean(f"layers differ: {', '.join(sorted(found))}")
    return found.pop()


def _subsets(of_layer: Sequence[int]) -> list[tuple[int, ...]]:
    kinds = sorted(set(of_layer))
    chosen = [tuple(k for k in kinds if mask >> kinds.index(k) & 1) for mask in range(1, 2 ** len(kinds))]
    return sorted(chosen, key=len)


def _only(of_layer: Sequence[int], wanted: Sequence[int]) -> str:
    return compress(i for i, kind in enumerate(of_layer) if kind in wanted)


def _spelled(
    instances: Sequence[Instance],
) -> tuple[dict[str, Any], dict[str, int] | None, list[list[int]]]:
    """Parameters as names before, in and behind the layers; which feature means which kind of layer."""
    kinds: dict[Kind, int] = {}
    table: dict[str, int] = {}
    frames = set()
    said = (instance.parameters for instance in instances)
    beside = {tuple(sorted(decayed - {name for name, _ in rows})) for rows, decayed in said}
    of_layers = []
    for instance in instances:
        before, prefix, layers, after = _split(instance.parameters)
        frames.add((before, prefix, after))
        of_layer = [kinds.setdefault(layer, len(kinds)) for layer in layers]
        told = features(instance.config)
        if len(told) != len(of_layer):
            raise Unclean(f"{len(of_layer)} layers in names, {len(told)} in the config")
        for feature, kind in zip(told, of_layer, strict=True):
            if table.setdefault(feature, kind) != kind:
                raise Unclean("layers of which the config says the same have different parameters")
        of_layers.append(of_layer)
    if len(frames) > 1 or len(beside) > 1:
        raise Unclean("parameters outside of layers differ")
    before, prefix, after = frames.pop()
    spelled = {
        "before": [list(row) for row in before],
        "prefix": prefix,
        "layers": [[list(row) for row in kind] for kind in kinds],
        "after": [list(row) for row in after],
        "beside": list(beside.pop()),
    }
    return spelled, (table if len(kinds) > 1 else None), of_layers


def _split(parameters: Parameters) -> tuple[Kind, str, list[Kind], Kind]:
    rows, decayed = parameters
    prefix = None
    before: list[tuple[str, bool]] = []
    after: list[tuple[str, bool]] = []
    layers: list[list[tuple[str, bool]]] = []
    for name, _ in rows:
        match = _LAYER.match(name)
        if match is None:
            (after if layers else before).append((name, name in decayed))
            continue
        number = int(match.group(2))
        if prefix not in (None, match.group(1)) or after or number not in (len(layers) - 1, len(layers)):
            raise Unclean(f"{name} is not where layers are expected")
        prefix = match.group(1)
        if number == len(layers):
            layers.append([])
        layers[-1].append((match.group(3), name in decayed))
    if prefix is None:
        raise Unclean("no parameter is in a numbered layer")
    return tuple(before), prefix, [tuple(layer) for layer in layers], tuple(after)
