"""The way to a value in a config: by names through tables, by numbers through lists.

A key is the way as text, with a dot between its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Steps from the top of a config.
Path = tuple[str, ...]


def path_of(key: str) -> Path:
    """The steps of a key; none of an empty one."""
    return tuple(key.split(".")) if key else ()


def get_path(config: Any, path: Path) -> Any:
    """The value at a path, or None where there is none."""
    for step in path:
        if isinstance(config, Mapping) and step in config:
            config = config[step]
        elif isinstance(config, (list, tuple)) and step.isdigit() and int(step) < len(config):
            config = config[int(step)]
        else:
            return None
    return config


def lookup(config: Any, key: str) -> Any:
    """The value of a key, or None where there is none."""
    return get_path(config, path_of(key))


def set_path(config: Any, path: Path, value: Any) -> None:
    """Set the value at a path in place, making inner tables where they are missing."""
    for step in path[:-1]:
        config = config[int(step)] if isinstance(config, list) else config.setdefault(step, {})
    config[int(path[-1]) if isinstance(config, list) else path[-1]] = value
