"""The TOML form of a layout: printed by ``sparkling layout``, read by ``--layout``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.model import ModelLayout

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1


#: fields in the file's order
_ORDER = (
    *("name", "notes", "ordered", "numbered", "buffers", "divisible", "ignored", "tied", "axes"),
    *("aliases", "config", "tensors", "disk", "assembly", "silent", "compensate"),
)
#: a model's layout, from its file's JSON and to it
_LAYOUT = TypeAdapter(ModelLayout)
#: of an axis of which the file says nothing else
_DECLARED = {"widenable": True, "reason": "declared by the layout file"}


def from_dict(data: Mapping[str, Any], where: str) -> ModelLayout:
    """A layout from the parsed TOML (or the manifest's JSON).

    Raises:
        LayoutError: a field is unknown or malformed, a term does not parse, an axis is not declared.
    """
    version, fields = data.get("format"), {key: value for key, value in data.items() if key != "format"}
    if version != FORMAT:
        raise LayoutError(f"{where}: format {version!r} is not known; this version reads {FORMAT}")
    if isinstance(axes := data.get("axes"), Mapping):
        fields["axes"] = {
            name: {**_DECLARED, **axis} if isinstance(axis, Mapping) else axis for name, axis in axes.items()
        }
    try:  # as JSON, which has no tuples: strict otherwise
        layout = _LAYOUT.validate_json(json.dumps(fields, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        raise LayoutError(f"{where}: {path}: {first['msg']} (found {first['input']!r:.80})") from None
    layout.check_axes()
    return layout


def to_dict(layout: ModelLayout) -> dict[str, Any]:
    """The layout as plain data; ``from_dict`` gives it back. Defaults are left out."""
    data = _LAYOUT.dump_python(layout, mode="json", by_alias=True, exclude_defaults=True)
    data["config"] = dict(layout.config)
    for name, info in layout.axes.items():  # of these the file has defaults of its own
        said = {"size": info.size, "widenable": info.widenable, "reason": info.reason}
        data["axes"][name] = {**said, **data["axes"][name]}
    return {"format": FORMAT, **{key: data[key] for key in _ORDER if key in data}}


_MADE_BY = "`sparkling layout CKPT > mine.toml` makes one to begin with"


def read_toml(path: Path) -> dict[str, Any]:
    """A parsed TOML file.

    Raises:
        LayoutError: it cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise LayoutError(f"cannot read the layout file {path}: {why}", hint=_MADE_BY) from None
    except tomllib.TOMLDecodeError as error:
        raise LayoutError(f"{path} is not valid TOML: {error}", hint=_MADE_BY) from None


def read_layout(path: Path) -> ModelLayout:
    """A layout file.

    Raises:
        LayoutError: it cannot be read, is no TOML, or is malformed.
    """
    return from_dict(read_toml(path), str(path))


def to_toml(layout: ModelLayout) -> str:
    """The layout as TOML text for a person to read and edit."""
    data = to_dict(layout)
    lines = [f"{key} = {_value(value)}" for key, value in data.items() if not _table(value)]
    for key, value in data.items():
        if not _table(value):
            continue
        if isinstance(value, list):
            for entry in value:
                lines += ["", f"[[{key}]]"] + [f"{k} = {_value(v)}" for k, v in entry.items()]
        elif value and all(isinstance(v, dict) for v in value.values()):
            for name, table in value.items():
                lines += ["", f"[{key}.{name}]"] + [f"{k} = {_value(v)}" for k, v in table.items()]
        else:
            lines += ["", f"[{key}]"] + [f"{json.dumps(k)} = {_value(v)}" for k, v in value.items()]
    return "\n".join(lines) + "\n"


def _table(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _value(value: object) -> str:
    # JSON's strings, numbers, booleans and arrays are TOML's too
    return json.dumps(value, ensure_ascii=False)
