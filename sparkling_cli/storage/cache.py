"""Small JSON results kept between runs: proved layouts, parameter orders, what a class expects.

A key says everything that the result depends on (config, versions), so nothing ever goes stale; a
file that is damaged or from another writer is as good as absent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

#: Raise when a change of the inference could change its results.
SCHEME = 1


def directory() -> Path:
    """``$SPARKLING_CACHE_DIR``, else ``sparkling`` in the user's cache directory (XDG)."""
    chosen = os.environ.get("SPARKLING_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparkling"


@functools.lru_cache(maxsize=1)
def versions() -> tuple[str, ...]:
    """Versions that a result depends on, found without importing the packages."""
    found = [f"scheme {SCHEME}"]
    for package in ("transformers", "torch", "sparkling-cli"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} -")
    return (*found, f"code {_code()}")


def _code() -> str:
    """A digest of the sources that make a layout: while they are worked on, no old result is believed."""
    package = Path(__file__).parent.parent
    digest = hashlib.blake2b(digest_size=8)
    for room in ("models", "layout", "widening", "plan"):
        for path in sorted((package / room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(*parts: object) -> str:
    """A digest of JSON-able parts and of the versions."""
    text = json.dumps([*parts, versions()], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load(kind: str, key: str) -> Any | None:
    """The stored result, or None."""
    try:
        return json.loads((directory() / kind / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def store(kind: str, key: str, value: Any) -> None:
    """Keep a result; a cache that cannot be written is no error."""
    folder = directory() / kind
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file)
        Path(name).replace(folder / f"{key}.json")
