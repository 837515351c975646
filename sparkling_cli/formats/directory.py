"""What all checkpoint directories share: which files there are, JSON files and their careful rewriting."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import OutputFile
from sparkling_cli.layout.keys import get_path, path_of, set_path
from sparkling_cli.storage.sidecar import FOLDER, sidecar_root


def list_files(root: Path) -> tuple[str, ...]:
    """Every file below ``root``, relative, sorted; an earlier ``sparkling/`` folder is left out.

    Raises:
        CheckpointError: a link that leads out of the checkpoint, or something that is no file.
    """
    found = []
    for folder, names, files in os.walk(root, onerror=_unreadable):
        base = Path(folder)
        if base == root and FOLDER in names:
            names.remove(FOLDER)
        for name in names:
            if (base / name).is_symlink():
                raise CheckpointError(
                    f"{(base / name).relative_to(root)}: a link to a folder; it cannot be carried over",
                    hint="replace it by a copy of the folder",
                )
        for name in files:
            relative = (base / name).relative_to(root).as_posix()
            found.append(relative)
            inside(root, relative, "the directory")
    return tuple(sorted(found))


def _unreadable(error: OSError) -> None:
    raise CheckpointError(
        f"cannot list {error.filename}: {error.strerror}",
        hint="check its permissions, or move it out of the checkpoint",
    ) from error


def inside(root: Path, relative: str, named_by: str) -> Path:
    """The path of a file that must be a regular file inside the checkpoint.

    Links may lead to other files of the checkpoint, or to the blobs of the Hugging Face cache that the
    checkpoint lies in.

    Args:
        root: the checkpoint.
        relative: the file as it was named.
        named_by: who named it, for the message.

    Raises:
        CheckpointError: absolute, with ``..``, a link leading out, missing, or no regular file.
    """
    parts = relative.replace("\\", "/").split("/")
    if relative.startswith(("/", "\\")) or ".." in parts or "" in parts or ":" in parts[0]:
        raise CheckpointError(f"{named_by} names {relative!r}, which is no path inside the checkpoint")
    path, inner = root / relative, Path(relative)
    if any((root / place).is_symlink() for place in (inner, *inner.parents) if place != Path()):
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{relative}: a link that leads nowhere", hint="remove it, or replace it by the file"
            ) from error
        allowed = [root.resolve()]
        places = root.resolve().parents  # a snapshot, or a folder in one
        allowed += [place.parent / "blobs" for place in places if place.name == "snapshots"]
        if not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{relative}: a link that leads out of the checkpoint, to {target}",
                hint="replace it by a copy of the file",
            )
    if not path.exists():
        raise CheckpointError(
            f"{named_by} names {relative!r}, which is missing",
            hint="the copy or download was not finished: fetch that file too",
        )
    if not path.is_file():
        raise CheckpointError(
            f"{relative}: expected a regular file, found {kind_of(path)}",
            hint="move it out of the checkpoint, or put the file in its place",
        )
    return path


def kind_of(path: Path) -> str:
    """In words, what lies there and is no regular file."""
    mode = path.stat().st_mode
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_json(root: Path, relative: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: unreadable, no JSON, a key twice, or no object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise CheckpointError(f"{relative}: the same key twice in one object: {[k for k, _ in pairs]}")
        return found

    try:
        value = json.loads((root / relative).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{relative}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{relative}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_sidecar(
    path: Path, name: str, what: str, *, version: int, hint: str, earlier: tuple[int, ...] = ()
) -> dict[str, Any]:
    """A JSON document of an output's ``sparkling/`` folder, of the version that this program reads.

    Args:
        path: an output, or the file itself.
        name: of the file in an output.
        what: it is, for messages ("manifest").
        version: the ``format_version`` that is expected.
        hint: why there may be none.
        earlier: versions that are read too.

    Raises:
        CheckpointError: there is none, it is damaged, or of another version.
    """
    given = path
    if path.suffix != ".json" or path.is_dir():
        path = sidecar_root(path) / name
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        among = _several(given) if given.is_dir() else None
        if among is not None:
            raise among from None
        gone = given if not given.exists() else path
        raise CheckpointError(
            f"no {what}: cannot read {gone}: {error.strerror or error}",
            hint="check its path" if gone == given != path else hint,
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the {what} {path} is damaged: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"the {what} {path} is damaged: an object is expected")
    if data.get("format_version") not in (version, *earlier):
        raise CheckpointError(
            f"the {what} {path} has format_version {data.get('format_version')!r}; "
            f"this version reads {version}"
        )
    return data


def _several(folder: Path) -> CheckpointError | None:
    from sparkling_cli.formats.detect import folder_of_checkpoints

    return folder_of_checkpoints(folder, outputs=True)


def rewritten_json(text: str, changes: Mapping[str, Any], where: str) -> str:
    """JSON text with other values under some keys.

    Key order, indentation, unknown keys and the spelling of other numbers stay. New keys go to their
    alphabetical place if the keys are sorted, else to the end.

    Args:
        text: the source's text.
        changes: dotted key -> value.
        where: the file, for messages.

    Raises:
        CheckpointError: a key leads through something that is no object.
    """
    if not changes:
        return text
    # Numbers keep their spelling: they travel through the dump as text with a mark that occurs nowhere.
    mark = "@"
    plainly = json.dumps(json.loads(text), ensure_ascii=False)
    while mark in plainly:
        mark += "@"

    def marked(number: str) -> str:
        return mark + number

    value = json.loads(text, parse_float=marked, parse_constant=marked)
    for dotted, new in changes.items():
        *path, last = path_of(dotted)
        ways = [tuple(path[:at]) for at in range(len(path) + 1)]
        holder = get_path(value, ways[-1])
        if holder is None:
            missing = next(way[-1] for way in ways if get_path(value, way) is None)
            raise CheckpointError(
                f"{where}: there is no {missing!r} on the way to {dotted!r}, which has to change",
                hint="write the config in the names of the installed transformers: load it and "
                "save_pretrained it",
            )
        if type(holder) not in (dict, list):
            raise CheckpointError(f"{where}: {dotted!r} lies in a {type(holder).__name__}")
        in_order = type(holder) is dict and list(holder) == sorted(holder)
        set_path(holder, (last,), new)
        for key in sorted(holder) if in_order else ():
            holder[key] = holder.pop(key)
    indent = re.search(r"\n([ \t]+)\S", text)
    dumped = json.dumps(
        value,
        indent=indent.group(1) if indent else None,
        ensure_ascii=text.isascii(),
        separators=None if indent or ", " in text or '": ' in text else (",", ":"),
    )
    dumped = re.sub(f'"{mark}([^"@]+)"', r"\1", dumped)
    return dumped + text[len(text.rstrip()) :]


def read_yaml(root: Path, relative: str) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        CheckpointError: unreadable, no YAML, or no mapping.
    """
    import yaml

    try:
        found = yaml.safe_load((root / relative).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{root / relative}: cannot be read as YAML: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{root / relative}: expected a mapping, found a {type(found).__name__}")
    return found


def rewritten_yaml(text: str, changes: Mapping[str, Any], where: str) -> str:
    """YAML text in block style with other numbers under some keys; all other lines stay.

    Args:
        text: the source's text.
        changes: dotted key -> number.
        where: the file, for messages.

    Raises:
        CheckpointError: a key is there more than once, or the mapping that it is in is not.
    """
    for dotted, value in changes.items():
        *path, last = path_of(dotted)
        start, stop, indent = 0, len(text), ""
        for step in path:
            opened = re.compile(rf"^{indent}{re.escape(step)}:[ \t]*\n(?P<indent>[ \t]+)\S", re.MULTILINE)
            found = opened.search(text, start, stop)
            if found is None:
                raise CheckpointError(f"{where}: there is no block {step!r}, where {dotted!r} must change")
            start, indent = found.start("indent"), found["indent"]
            end = re.compile(rf"^(?!{indent}|[ \t]*(#.*)?$)", re.MULTILINE).search(text, start, stop)
            stop = end.start() if end else stop
        line = re.compile(rf"^{indent}{re.escape(last)}:.*$", re.MULTILINE)
        block, count = line.subn(f"{indent}{last}: {value}", text[start:stop])
        if count > 1:
            raise CheckpointError(f"{where}: the key {dotted!r} is there {count} times")
        if not count:
            block = block.rstrip("\n") + f"\n{indent}{last}: {value}\n"
        text = text[:start] + block + text[stop:]
    return text


def rewritten_file(root: Path, relative: str, changes: Mapping[str, Any]) -> OutputFile:
    """A JSON or YAML file of the checkpoint with other values under some dotted keys.

    Raises:
        CheckpointError: a key cannot be written.
    """
    text = (root / relative).read_text(encoding="utf-8")
    rewritten = rewritten_yaml if relative.endswith(".yaml") else rewritten_json
    return literal_file(relative, rewritten(text, changes, relative).encode())


def literal_file(path: str, data: bytes, *, last: bool = False) -> OutputFile:
    """An output file without tensors."""
    return OutputFile(path, len(data), ((0, data),) if data else (), last=last)
