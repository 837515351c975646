"""A spec from a file, from options, or from both (options win)."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

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
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"there is no {what} file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the {what} file {path}: {error}") from None
    try:
        data = _parse(path.suffix.lower(), text, path)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"the {what} file {path} is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(data, dict):
        raise SpecError(f"the {what} file {path} must hold a mapping, found {type(data).__name__}")
    return data


def _parse(suffix: str, text: str, path: Path) -> Any:
    if suffix == ".json":
        return json.loads(text)
    if suffix == ".toml":
        return tomllib.loads(text)
    if suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
    raise SpecError(f"cannot tell the kind of the spec file {path}: expected .yaml, .yml, .toml or .json")


#: a whole number from here on behind ``--axis NAME=`` is taken for a size that was meant
_NO_FACTOR = 64


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
            raise SpecError("--factor and --to need an --axis, e.g. --axis ffn --factor 2")
        return []
    joined = [axis for axis in axes if "," in axis]
    if joined:
        again = " ".join(f"--axis {name.strip()}" for name in joined[0].split(",") if name.strip())
        raise SpecError(f"--axis {joined[0]}: one axis at a time", hint=f"repeat --axis: {again}")
    found = [axis_with_factor(axis, "--axis") for axis in axes]
    bare = [item for item in found if "factor" not in item]
    for number, ratio in enumerate(ratios):
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
            hint=f"add --factor 2, or write --axis {bare[0]['axis']}=2",
        )
    if ratios and targets:
        raise SpecError(
            f"each --axis needs --factor or --to, and only one kind; "
            f"found {len(bare)} --axis, {len(ratios)} --factor, {len(targets)} --to",
            hint="write factors behind their axes (--axis ffn=2) and sizes by --to",
        )
    field, values = ("factor", ratios) if ratios else ("to", targets)
    given = len(values)
    if given == 1:
        values = values * len(bare)
    if len(values) != len(bare) or not bare:
        raise SpecError(
            f"{len(bare)} --axis without a factor but {given} --{field}: give one for all, or one for "
            "each, in order"
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
        raise UsageError(f"{where}: expected {what}", hint=_plain_number(str(value))) from None


def _plain_number(text: str) -> str | None:
    """The number that a text has in it: ``2x``, ``1,5``, ``4k``."""
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


def means_from_options(items: Sequence[str]) -> dict[str, Any]:
    """``--vocab-from NEW=OLD,OLD`` or a file of such a mapping, repeated, as the spec's ``vocab_from``.

    Raises:
        SpecError: one is not of that form.
    """
    found: dict[str, Any] = {}
    for item in items:
        new, equals, old = item.partition("=")
        if equals and new.strip().isdigit():
            found[new.strip()] = [part.strip() for part in old.split(",")]
        else:
            found |= {str(key): value for key, value in read_spec_file(Path(item), "mapping").items()}
    return found


def make_spec(data: Mapping[str, Any], where: str = "spec") -> ExpansionSpec:
    """Validate.

    Raises:
        SpecError: names the field, what was found and what is allowed.
    """
    try:
        return ExpansionSpec.model_validate(data)
    except ValidationError as error:
        raise SpecError(_explain(error, where), hint=_hint(error, where)) from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``; nested mappings merge, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    found_in = {str(item["loc"][0]) for item in error.errors() if len(item["loc"]) > 1}
    for item in error.errors():
        if item["type"] == "too_short" and str(item["loc"][0]) in found_in:
            continue  # what it should hold is wrong, which is said
        path = ".".join(map(str, item["loc"])) or "spec"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = f"no such field; fields here: {', '.join(_fields(item['loc']))}"
        found = (
            ""
            if item["type"] in ("extra_forbidden", "missing", "value_error")
            else f" (found {item['input']!r})"
        )
        lines.append(f"{where}: {path}: {message}{found}")
    return "\n".join(lines)


def _hint(error: ValidationError, where: str) -> str | None:
    """What was probably meant, where that can be said."""
    for item in error.errors():
        if item["loc"] == ("axes",) and item["type"] in ("missing", "too_short"):
            ask = "--axis ffn --factor 2" if where == "options" else "axes: [{axis: ffn, factor: 2}]"
            return f"name what to widen: {ask}"
        if item["type"] == "literal_error":
            field = ExpansionSpec.model_fields.get(str(item["loc"][-1])) if len(item["loc"]) == 1 else None
            allowed = [str(choice) for choice in get_args(field.annotation)] if field is not None else []
            given = str(item["input"])
            near = [choice for choice in allowed if choice.startswith(f"{given}-")]
            near = near or difflib.get_close_matches(given, allowed, n=1)
            if near:
                return f"did you mean {near[0]!r}?"
    return None


def _fields(location: tuple[int | str, ...]) -> list[str]:
    """Fields of the model that holds the unknown field at ``location``."""
    from sparkling_cli.spec.model import AxisSpec, BaselineSpec, RewarmupSpec

    nested: dict[str, type[BaseModel]] = {
        "axes": AxisSpec,
        "rewarmup": RewarmupSpec,
        "baseline": BaselineSpec,
    }
    model: type[BaseModel] = (
        nested.get(str(location[0]), ExpansionSpec) if len(location) > 1 else ExpansionSpec
    )
    return sorted(model.model_fields)
