"""A spec from a file, from options, or from both (options win)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sparkling_cli.errors import SpecError, UsageError
from sparkling_cli.spec.model import ExpansionSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_spec_file(path: Path, what: str = "spec") -> dict[str, Any]:
    """The content of a YAML, TOML or JSON file of a spec, or of part of one, not validated yet.

    Raises:
        SpecError: unreadable, of another kind, malformed, or no mapping.
    """
    if path.is_dir():
        raise SpecError(f"the {what} file {path} is a folder", hint="give a file: .yaml, .toml or .json")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"there is no {what} file {path}", hint="check its path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the {what} file {path}: {error}") from None
    if path.suffix.lower() not in _KINDS:
        raise SpecError(
            f"cannot tell the kind of the {what} file {path}",
            hint=f"name it {', '.join(_KINDS[:-1])} or .json",
        )
    example = _EXAMPLES[what]
    try:
        data = _parse(path.suffix.lower(), text)
    except (ValueError, RecursionError) as error:
        kind = path.suffix[1:].upper()
        raise SpecError(f"the {what} file {path} is not valid {kind}: {error}", hint=example) from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"{data!r:.60}"
        raise SpecError(f"the {what} file {path} must hold a mapping, found {found}", hint=example)
    return data


_KINDS = (".yaml", ".yml", ".toml", ".json")
#: what a file of each sort looks like
_EXAMPLES = {
    "spec": "in YAML, for example: axes: [{axis: ffn, factor: 2}]",
    "vocab_from": "in YAML, for example: 512: [17, 203]",
    "copies": 'in JSON, for example: {"all": [2, 1, 3, 2]}, or by layers\' numbers',
    "expert_load": 'in JSON, for example: {"all": [0.31, 0.12, 0.4, 0.17]}, or by layers\' numbers',
}


def _parse(suffix: str, text: str) -> Any:
    if suffix == ".json":
        return json.loads(text)
    if suffix == ".toml":
        return tomllib.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


#: ``ffn:2``, ``ffn*2``, ``ffn 2x``
_JOINED = re.compile(r"([a-z_]+)\s*[\s:*@x]\s*(\d+(?:\.\d+)?)x?", re.IGNORECASE)
#: ``ffn2``, ``hidden1.5x``
_RUN_ON = re.compile(r"([a-z_]+?)_?(\d+(?:\.\d+)?)x?", re.IGNORECASE)
#: a whole number from here on behind ``--axis NAME=`` is taken for a size that was meant
_NO_FACTOR = 64
#: and any number behind ``--factor``
_SIZE = 1000


def axes_from_options(
    axes: Sequence[str],
    factors: Sequence[str | float],
    sizes: Sequence[str | int],
    multiple_of: int | None = None,
) -> list[dict[str, Any]]:
    """Pair ``--axis`` with ``--factor`` or ``--to``; one value serves all axes that have none of their own.

    Args:
        axes: names, or ``NAME=FACTOR``.
        factors: values of ``--factor``.
        sizes: values of ``--to``.
        multiple_of: value of ``--multiple-of``: axes with neither are rounded up to it.

    Raises:
        UsageError: a value is no number.
        SpecError: it cannot be a factor, or the numbers of values do not pair up.
    """
    ratios = [_number(factor, f"--factor {factor}", float) for factor in factors]
    targets = [_number(size, f"--to {size}", int) for size in sizes]
    if not axes:
        if factors or sizes:
            raise SpecError("--factor and --to need an --axis", hint="e.g. --axis ffn --factor 2")
        return []
    joined = [axis for axis in axes if "," in axis]
    if joined:
        again = " ".join(f"--axis {name.strip()}" for name in joined[0].split(",") if name.strip())
        raise SpecError(f"--axis {joined[0]}: one axis at a time", hint=f"repeat --axis: {again}")
    found = [axis_with_factor(axis, "--axis") for axis in axes]
    bare = [item for item in found if "factor" not in item]
    for number, ratio in enumerate(ratios):
        if ratio >= _SIZE:
            raise SpecError(
                f"--factor {ratio:g}: that many times the size", hint=f"for a size: --to {ratio:.0f}"
            )
        if not ratio > 1:
            raise SpecError(
                f"--factor {ratio:g} (axes.{number}.factor): only widening; a factor is greater than 1",
                hint="give a factor above 1, e.g. 2",
            )
    if not bare and not ratios and not targets:
        return found
    names = ", ".join(str(item["axis"]) for item in bare)
    if not ratios and not targets:
        if multiple_of is not None:
            return found
        raise SpecError(
            f"each --axis needs --factor or --to, found neither for {names}",
            hint=f"write --axis {found_in[1]}={found_in[2]}"
            if (found_in := _RUN_ON.fullmatch(str(bare[0]["axis"])))
            else f"add --factor 2, or write --axis {bare[0]['axis']}=2",
        )
    if ratios and targets:
        raise SpecError(
            f"each --axis needs --factor or --to, and only one kind; "
            f"found {len(bare)} --axis, {len(ratios)} --factor, {len(targets)} --to",
            hint="write factors behind their axes (--axis ffn=2) and sizes by --to",
        )
    field, values = ("factor", ratios) if ratios else ("to", targets)
    if not bare:
        own = ", ".join(f"{item['axis']}={item['factor']:g}" for item in found)
        raise SpecError(
            f"--{field} {' '.join(f'{value:g}' for value in values)} is left over: every --axis has its "
            f"factor already ({own})",
            hint="leave it out",
        )
    given = len(values)
    if given == 1:
        values = values * len(bare)
    if len(values) != len(bare):
        raise SpecError(
            f"{len(bare)} --axis without a factor but {given} --{field}: give one for all, or one for "
            "each, in order",
            hint="for example " + " ".join(f"--axis {item['axis']}=2" for item in bare),
        )
    for item, value in zip(bare, values, strict=True):
        item[field] = value
    return found


def axis_with_factor(text: str, where: str) -> dict[str, Any]:
    """``ffn=2`` or ``ffn`` as a field of the spec's ``axes``.

    Raises:
        SpecError: the factor is no number, or one that is a size or no growth.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    joined = _JOINED.fullmatch(name)
    if joined and not equals:
        raise SpecError(
            f"{where} {text}: a factor stands behind =", hint=f"write {joined[1]}={joined[2]}, or --factor"
        )
    if not equals:
        return {"axis": name}
    try:
        factor = _number(value, f"{where} {text}", float)
    except UsageError as error:
        raise SpecError(error.message, hint=error.hint) from None
    if factor >= _NO_FACTOR and factor.is_integer():
        raise SpecError(
            f"{where} {text}: {value} times the size; behind = stands a factor",
            hint=f"for a size: --axis {name} --to {value}; such a factor goes by --factor",
        )
    if not factor > 1:
        raise SpecError(
            f"{where} {text}: only widening; a factor is greater than 1", hint=f"give one, e.g. {name}=2"
        )
    return {"axis": name, "factor": factor}


_Number = TypeVar("_Number", int, float)


def _number(value: str | float, where: str, kind: type[_Number]) -> _Number:
    """A number as it was typed."""
    try:
        return kind(value)
    except (ValueError, OverflowError):
        what = "a number, such as 2 or 1.5" if kind is float else "a whole number, such as 4096"
        raise UsageError(f"{where}: expected {what}", hint=_plain_number(str(value), kind)) from None


def _plain_number(text: str, kind: type) -> str | None:
    """The number that a text has in it: ``2x``, ``1,5``, ``4,096``."""
    if kind is int and re.fullmatch(r"\d{1,3}(,\d{3})+", text.strip()):
        return f"write {text.strip().replace(',', '')}"
    if re.fullmatch(r"[2-9],[2-9]", text.strip()):
        first, second = text.strip().split(",")
        return f"write {first}.{second}; or for two axes --axis ffn={first} --axis hidden={second}"
    share = re.fullmatch(r"(\d+)\s*%", text.strip())
    if share:
        return f"write {int(share[1]) / 100:g}"
    match = re.fullmatch(r"x?(\d+(?:[.,]\d+)?)\s*[x*]?", text.strip().lower())
    return f"write {match[1].replace(',', '.')}" if match else None


def state_from_options(items: Sequence[str]) -> dict[str, str]:
    """``--state NAME=KIND``, repeated, as the spec's ``state``.

    Raises:
        SpecError: one is not of that form.
    """
    found = {}
    for item in items:
        name, equals, kind = item.partition("=")
        if not (name and equals and kind):
            raise SpecError(
                f"--state {item}: expected NAME=KIND, KIND being weight, moment or carry",
                hint="for example --state slow_buffer=weight",
            )
        found[name] = kind
    return found


def lists_from_options(items: Sequence[str], what: str) -> dict[str, Any]:
    """``--vocab-from NEW=OLD,OLD``, or a file of such a mapping, repeated, as a field of the spec.

    Args:
        items: as they were given.
        what: they say, as in ``_EXAMPLES``.

    Raises:
        SpecError: one is not of that form.
    """
    found: dict[str, Any] = {}
    for item in items:
        key, equals, values = item.partition("=")
        if equals and (key.strip().isdigit() or key.strip() == "all"):
            found[key.strip()] = [part.strip() for part in values.split(",")]
        else:
            found |= {str(key): value for key, value in read_spec_file(Path(item), what).items()}
    return found


def make_spec(data: Mapping[str, Any], where: str = "spec") -> ExpansionSpec:
    """Validate.

    Raises:
        SpecError: names the field, what was found and what is allowed.
    """
    try:
        return ExpansionSpec.model_validate(data)
    except ValidationError as error:
        from sparkling_cli.spec import refused

        raise SpecError(refused.explain(error, where), hint=refused.hint(error, where)) from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``; nested mappings merge, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
