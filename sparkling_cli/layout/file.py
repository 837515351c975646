"""The TOML form of a layout: printed by ``sparkling layout``, read by ``--layout``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.model import AxisInfo, Compensation, ModelLayout, TensorPattern

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1


#: fields that a layout and its file have alike, in the file's order
_AS_THEY_ARE = ("notes", "ordered", "numbered", "buffers", "divisible", "ignored", "tied")
#: JSON and TOML have lists only
_Names = Annotated[tuple[str, ...], Field(strict=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Axis(_Strict):
    size: int = Field(ge=1)
    widenable: bool = True
    reason: str = "declared by the layout file"
    joint: tuple[str, ...] = Field(default=(), strict=False)
    multiple_of: int = Field(default=1, ge=1)


class _Compensation(_Strict):
    axis: str
    tensor: str = ""
    config: str = ""
    fan_in: bool = False
    power: float = 0.0
    offset: float = 0.0


class _File(_Strict):
    format: int
    name: str
    axes: dict[str, _Axis]
    tensors: dict[str, str]
    disk: dict[str, str] | None = None
    config: dict[str, str] = {}
    compensate: tuple[_Compensation, ...] = Field(default=(), strict=False)
    tied: tuple[_Names, ...] = Field(default=(), strict=False)
    assembly: dict[str, _Names] = {}
    aliases: dict[str, str] = {}
    notes: tuple[str, ...] = Field(default=(), strict=False)
    ordered: bool = False
    numbered: bool = False
    buffers: _Names = ()
    divisible: tuple[Annotated[tuple[str, str], Field(strict=False)], ...] = Field(default=(), strict=False)
    ignored: _Names = ()
    silent: dict[str, Annotated[float, Field(strict=False)]] = {}


def from_dict(data: Mapping[str, Any], where: str) -> ModelLayout:
    """A layout from the parsed TOML (or the manifest's JSON).

    Raises:
        LayoutError: a field is unknown or malformed, a term does not parse, an axis is not declared.
    """
    try:
        file = _File.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        raise LayoutError(f"{where}: {path}: {first['msg']} (found {first['input']!r:.80})") from None
    if file.format != FORMAT:
        raise LayoutError(f"{where}: format {file.format} is not known; this version reads {FORMAT}")
    layout = ModelLayout(
        name=file.name,
        axes={name: AxisInfo(**axis.model_dump()) for name, axis in file.axes.items()},
        tensors=tuple(TensorPattern(*item) for item in file.tensors.items()),
        disk=None if file.disk is None else tuple(TensorPattern(*i) for i in file.disk.items()),
        compensations=tuple(Compensation(**c.model_dump()) for c in file.compensate),
        config=file.config,
        assembly=file.assembly,
        aliases=file.aliases,
        silent=file.silent,
        **{name: getattr(file, name) for name in _AS_THEY_ARE},
    )
    layout.check_axes()
    return layout


def to_dict(layout: ModelLayout) -> dict[str, Any]:
    """The layout as plain data; ``from_dict`` gives it back. Defaults are left out."""
    data: dict[str, Any] = {"format": FORMAT, "name": layout.name}
    for name in _AS_THEY_ARE:
        if value := getattr(layout, name):
            data[name] = value if value is True else [v if isinstance(v, str) else list(v) for v in value]
    data["axes"] = {name: _axis_dict(info) for name, info in layout.axes.items()}
    if layout.aliases:
        data["aliases"] = dict(layout.aliases)
    data["config"] = dict(layout.config)
    data["tensors"] = {p.name: p.layout for p in layout.tensors}
    if layout.disk is not None:
        data["disk"] = {p.name: p.layout for p in layout.disk}
    if layout.assembly:
        data["assembly"] = {name: list(parts) for name, parts in layout.assembly.items()}
    if layout.silent:
        data["silent"] = dict(layout.silent)
    if layout.compensations:
        data["compensate"] = [
            {k: v for k, v in vars(c).items() if v not in ("", False, 0.0)} for c in layout.compensations
        ]
    return data


def _axis_dict(info: AxisInfo) -> dict[str, Any]:
    data: dict[str, Any] = {"size": info.size, "widenable": info.widenable, "reason": info.reason}
    if info.joint:
        data["joint"] = list(info.joint)
    if info.multiple_of != 1:
        data["multiple_of"] = info.multiple_of
    return data


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
