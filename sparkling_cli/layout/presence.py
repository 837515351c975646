"""Which part of a layout file is about a checkpoint: its tensors, their layers, its config numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import PACKINGS, axis_names
from sparkling_cli.layout.keys import lookup
from sparkling_cli.layout.model import PatternTable, TensorPattern
from sparkling_cli.layout.names import NameTemplate, compress
from sparkling_cli.layout.parse import parse_expr

Shapes = Mapping[str, tuple[int, ...]]


class NamesDifferError(LayoutError):
    """The checkpoint's names are not those of the file: another family, not a damaged checkpoint."""


def required(data: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The file without its requirements, which hold.

    Raises:
        NamesDifferError: one does not.
    """
    for name, value in data.get("requires", {}).items():
        key = name.removesuffix("!")
        found = lookup(config, key)
        possible = value if isinstance(value, list) else [value]
        if found is None and name != key:
            raise NamesDifferError(f"{where} is for {key} = {value!r}, the checkpoint has no {key}")
        if found is not None and (value == "none" or found not in possible):
            raise NamesDifferError(f"{where} is for {key} = {value!r}, the checkpoint has {found!r}")
    classes = data.get("classes", {})
    if classes and config.get("model_type") not in classes:
        raise NamesDifferError(
            f"{where} is for {', '.join(classes)}, the checkpoint is of type {config.get('model_type')!r}"
        )
    named = config.get("architectures") or ()
    if classes and named and classes[config["model_type"]] not in named:
        raise NamesDifferError(
            f"{where} is for {classes[config['model_type']]}, the checkpoint is of {named[0]}"
        )
    return {key: value for key, value in data.items() if key != "requires"}


def by_config(data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The file with what depends on the config's values: which axes grow, what makes a new layer silent."""

    def fits(key: str, values: str) -> bool:
        found = lookup(config, key)
        own = {str(one).lower() for one in (found if isinstance(found, list) and found else [found])}
        others = values.removeprefix("all but ")
        return own.isdisjoint(others.split(" or ")) if others != values else own <= {*values.split(" or ")}

    axes = {}
    for name, axis in data["axes"].items():
        wrong = [
            f"the config's {key} is {str(lookup(config, key)).lower():.60}: known for {values}"
            for key, values in axis.get("where", {}).items()
            if not fits(key, values)
        ]
        kept = {key: value for key, value in axis.items() if key != "where"}
        axes[name] = {**kept, "widenable": False, "reason": wrong[0]} if wrong else kept
    silent = dict(data.get("silent", {}))
    for key, cases in data.get("silent_if", {}).items():
        for values, names in cases.items():
            silent.update(names if fits(key, values) else {})
    return {k: v for k, v in data.items() if k != "silent_if"} | {"silent": silent, "axes": axes}


def check_sizes(data: Mapping[str, Any], sizes: Iterable[str], where: str) -> None:
    """A file of a class knows every config key that sizes something.

    Args:
        data: the file.
        sizes: config keys of the checkpoint whose numbers are widths or counts of heads.
        where: the file, for messages.

    Raises:
        NamesDifferError: it does not know one of them, so what it says about the class may be too little.
    """
    known = {key.rstrip("?+") for key in data.get("config", {})}
    unknown = sorted(set(sizes) - known)
    if data.get("classes") and unknown:
        raise NamesDifferError(f"{where} does not know the config's {unknown[0]!r}")


def assembled(data: Mapping[str, Any], disk: Mapping[str, str]) -> set[str]:
    """Names in the module of what is there on disk, under the same name or in parts."""
    parts = {**{name: [name] for name in disk}, **data.get("assembly", {})}
    return {name for name, own in parts.items() if all(part in disk for part in own)}


def present(
    table: Mapping[str, str],
    shapes: Shapes,
    where: str,
    *,
    complete: bool = True,
    known: AbstractSet[str] = frozenset(),
) -> tuple[dict[str, str], dict[str, TensorPattern]]:
    """The patterns that occur among the names, or are known to; and the one of every name.

    Raises:
        NamesDifferError: a name has no pattern, or a pattern that is not optional has no name.
    """
    patterns = {name.removesuffix("?"): text for name, text in table.items()}
    lookup = PatternTable(TensorPattern(*item) for item in patterns.items())
    try:
        found = dict(zip(shapes, lookup.find_all(list(shapes)), strict=True))
    except LayoutError as error:
        raise NamesDifferError(f"{where}: {error.message}", hint=error.hint) from None
    used = {pattern.name for pattern in found.values()}
    missing = [name for name in table if not name.endswith("?") and name not in used]
    if missing and complete:
        raise NamesDifferError(
            f"{where}: {len(missing)} pattern(s) match no tensor, the first: {missing[0]!r}"
        )
    return {n: t for n, t in patterns.items() if n in used or n in missing or n in known}, found


def _spread(name: str, config: Mapping[str, Any]) -> list[str]:
    """The keys that a key with ``*`` stands for."""
    before, star, after = name.partition(".*.")
    if not star:
        return [name]
    there = lookup(config, before)
    keys = there if isinstance(there, Mapping) else range(len(there)) if isinstance(there, list) else ()
    return [full for key in keys for full in _spread(f"{before}.{key}.{after}", config)]


def present_numbers(
    table: Mapping[str, str], config: Mapping[str, Any], axes: AbstractSet[str], where: str
) -> dict[str, str]:
    """The config's numbers that size something.

    Args:
        table: config key -> term, with its marks.
        config: the checkpoint's own numbers.
        axes: that its tensors have.
        where: the file, for messages.

    Raises:
        NamesDifferError: a key that is not optional is missing, or one holds no whole number.
    """
    found = {}
    for name, text in ((one, text) for key, text in table.items() for one in _spread(key, config)):
        if not set(axis_names(parse_expr(text))) <= {*axes, *PACKINGS}:
            continue  # the experts of a model without any
        key = name.rstrip("?+")
        value = lookup(config, key)
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if value is not None and not whole:
            raise NamesDifferError(f"{where}: {key} counts something, and the config has {value!r}")
        implied = name.endswith("+") and bool(config)
        if implied and "." in key:
            implied = lookup(config, key.rpartition(".")[0]) is not None
        if isinstance(lookup(config, key), int) or implied:
            found[key] = text
        elif key == name:
            raise NamesDifferError(f"{where}: the checkpoint's config has no number {key!r}")
    return found


def axes_in(tables: Iterable[Mapping[str, str]]) -> set[str]:
    """Every axis in the names and the layouts of tables of patterns; with experts, how many are chosen."""
    found = {
        axis
        for table in tables
        for name, text in table.items()
        for axis in (*TensorPattern(name, text).dims.axes(), *TensorPattern(name, text).template.axes)
    }
    return found | {"experts_per_token"} if "experts" in found else found


#: pattern -> axis in its name -> indices that it occurs at
Indices = Mapping[str, Mapping[str, AbstractSet[int]]]


def indices_of(patterns: Mapping[str, TensorPattern]) -> Indices:
    """Where patterns occur, from the one of every name."""
    found: dict[str, list[str]] = {}
    for name, pattern in patterns.items():
        found.setdefault(pattern.name, []).append(name)
    return {pattern: NameTemplate(pattern).occurring(names) for pattern, names in found.items()}


def narrowed(name: str, indices: Indices, parts: Sequence[str], sizes: Mapping[str, int]) -> str:
    """A pattern's name with the indices that it occurs at, where these are not all.

    Args:
        name: of the pattern.
        indices: where patterns occur.
        parts: patterns on disk that it is made of, for one that does not occur itself.
        sizes: of the axes in names.
    """
    known = next((indices[one] for one in (name, *parts) if one in indices), {})
    for axis, found in known.items():
        if len(found) < sizes[axis]:
            name = name.replace(f"{{{axis}}}", f"{{{axis}={compress(found)}}}")
    return name
