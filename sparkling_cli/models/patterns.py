"""Real tensors grouped by skeleton and layout, and the name templates that stand for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparkling_cli.layout.expr import TensorLayout
from sparkling_cli.layout.names import compress, skeleton

_DIGITS = re.compile(r"(?<![^.])\d+(?![^.])")
#: a name as its skeleton and its indices
Split = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pattern:
    """Real tensors of one skeleton and one layout."""

    key: str
    layout: TensorLayout
    indices: tuple[tuple[int, ...], ...]
    restricted: int | None
    """the index that tells it from other tensors of the same skeleton and another layout"""


def split(name: str) -> Split:
    """A name's skeleton and the numbers in it."""
    return skeleton(name), tuple(int(m.group()) for m in _DIGITS.finditer(name))


def placeholder(position: int) -> str:
    """What the index at a position of a name is called."""
    return "layers" if position == 0 else f"index_{position + 1}"


def template(pattern: Pattern) -> str:
    """The name template of a pattern, in the module."""
    return fill(pattern.key, [placeholder(i) for i in range(pattern.key.count("*"))], pattern)


def fill(key: str, placeholders: Sequence[str], pattern: Pattern) -> str:
    """A skeleton with named placeholders, the first index restricted where layers differ."""
    result = key
    for place in placeholders:
        only = ""
        if pattern.restricted is not None and place == placeholder(pattern.restricted):
            only = "=" + compress(i[pattern.restricted] for i in pattern.indices)
        result = result.replace("*", "{" + place + only + "}", 1)
    return result
