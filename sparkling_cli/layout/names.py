"""Tensor-name templates: ``model.layers.{layers}.mlp.up_proj.weight``.

A placeholder stands for one run of digits between dots. ``{layers=0,4-7}`` restricts it to some
indices, for models whose layers differ.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.parse import fault

_PLACEHOLDER = re.compile(r"\{(?P<axis>[A-Za-z_]\w*)(?:=(?P<only>[\d,\-]+))?\}")
_FREE = re.compile(r"\{[A-Za-z_]\w*\}")
#: a number in a name, which counts layers or experts
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_NO_DIGITS = bytes.maketrans(b"123456789", b"000000000")


def skeleton(name: str) -> str:
    """The name with every run of digits between dots replaced by ``*``; equal for all layers."""
    return NUMBER.sub("*", name)


def skeletons(names: Iterable[str]) -> list[str]:
    """The skeleton of every name; of 40,000 names that differ in numbers only, one is looked at."""
    return _skeletons(tuple(names))


@lru_cache(maxsize=2)  # the names of a checkpoint are asked for by several tables
def _skeletons(names: tuple[str, ...]) -> list[str]:
    text = "\n".join(names).encode("utf-8", "surrogatepass").translate(_NO_DIGITS)
    alike = text.decode("utf-8", "surrogatepass").split("\n")
    if len(alike) != len(names):  # a name with a line break in it
        return [skeleton(name) for name in names]
    known: dict[str, str] = {}
    found = []
    for name, zeros in zip(names, alike, strict=True):
        stars = known.get(zeros)
        if stars is None:
            stars = known[zeros] = skeleton(zeros)
        # digits elsewhere than between dots (``w1``, ``fc2``) stay what they are
        found.append(skeleton(name) if "0" in stars else stars)
    return found


@dataclass(frozen=True)
class NameTemplate:
    """A parsed template."""

    text: str

    @cached_property
    def _parts(self) -> tuple[re.Pattern[str], tuple[frozenset[int] | None, ...]]:
        pattern = []
        limits = []
        at = 0
        for match in _PLACEHOLDER.finditer(self.text):
            pattern.append(re.escape(self.text[at : match.start()]))
            pattern.append(r"(\d+)")
            limits.append(_indices(self.text, match) if match.group("only") else None)
            at = match.end()
        rest = self.text[at:]
        if "{" in rest or "}" in rest:
            where = at + min(i for i in (rest.find("{"), rest.find("}")) if i >= 0)
            raise fault(self.text, where, "a placeholder is written {axis} or {axis=0,2-5}")
        pattern.append(re.escape(rest))
        return re.compile("".join(pattern)), tuple(limits)

    @cached_property
    def key(self) -> str:
        """The skeleton that every matching name has."""
        return skeleton(_PLACEHOLDER.sub("0", self.text))

    @cached_property
    def free(self) -> bool:
        """Whether it stands for every name of its skeleton (that has no ``*`` of its own)."""
        return "*" not in self.text and all(
            _FREE.fullmatch(part) or not (part.isdigit() or "{" in part or "}" in part)
            for part in self.text.split(".")
        )

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes that are stored in the name."""
        return tuple(m.group("axis") for m in _PLACEHOLDER.finditer(self.text))

    @cached_property
    def _between(self) -> list[str]:
        """What stands before, between and behind the placeholders."""
        return _PLACEHOLDER.split(self.text)[:: _PLACEHOLDER.groups + 1]

    def fill(self, indices: Mapping[str, int]) -> str:
        """The name with these indices.

        Raises:
            LayoutError: an axis has no index.
        """
        try:
            own = [*(str(indices[axis]) for axis in self.axes), ""]
            return "".join([text + index for text, index in zip(self._between, own, strict=True)])
        except KeyError as error:
            raise LayoutError(f"no index for {{{error.args[0]}}} of {self.text!r}") from None

    def partly(self, indices: Mapping[str, int]) -> str:
        """The template with these indices, and placeholders for all others."""
        return _PLACEHOLDER.sub(lambda match: str(indices.get(match["axis"], match[0])), self.text)

    @property
    def placeholders(self) -> tuple[tuple[str, frozenset[int] | None], ...]:
        """Every axis in the name, with the indices that it is restricted to (None: all)."""
        return tuple(zip(self.axes, self._parts[1], strict=True))

    def names(self, sizes: Mapping[str, int]) -> Iterator[str]:
        """Every name that the template stands for.

        Args:
            sizes: entries of the axes in the name.

        Raises:
            LayoutError: an axis of the name has no size.
        """
        lost = next((axis for axis, only in self.placeholders if only is None and axis not in sizes), None)
        if lost is not None:
            raise LayoutError(f"{{{lost}}} of {self.text!r} is no axis of the layout")
        allowed = [range(sizes[axis]) if only is None else sorted(only) for axis, only in self.placeholders]
        for indices in itertools.product(*allowed):
            yield self.fill(dict(zip(self.axes, indices, strict=True)))

    def matches(self, name: str) -> bool:
        """Whether the template stands for this name."""
        return self.indices(name) is not None

    def indices(self, name: str) -> tuple[int, ...] | None:
        """The name's index on every axis in ``axes``; None if the template does not stand for it."""
        pattern, limits = self._parts
        match = pattern.fullmatch(name)
        if match is None:
            return None
        found = tuple(map(int, match.groups()))
        for index, only in zip(found, limits, strict=True):
            if only is not None and index not in only:
                return None
        return found

    def at(self, name: str) -> dict[str, int] | None:
        """Axis -> the name's index on it; None if the template does not stand for the name."""
        indices = self.indices(name)
        return None if indices is None else dict(zip(self.axes, indices, strict=True))

    def occurring(self, names: Iterable[str]) -> dict[str, frozenset[int]]:
        """Axis -> its indices in names that the template stands for."""
        if not self.axes:
            return {}
        lines = re.findall(f"^{self._parts[0].pattern}$", "\n".join(names), re.MULTILINE)
        columns = (lines,) if len(self.axes) == 1 else zip(*lines, strict=True)
        return {axis: frozenset(map(int, set(one))) for axis, one in zip(self.axes, columns, strict=True)}


def _indices(text: str, match: re.Match[str]) -> frozenset[int]:
    found: set[int] = set()
    for part in match.group("only").split(","):
        low, _, high = part.partition("-")
        if not low or (_ and not high) or (high and int(high) < int(low)) or len(low + high) > 12:
            raise fault(text, match.start("only"), f"not a list of indices: {match.group('only')!r}")
        found.update(range(int(low), int(high or low) + 1))
    return frozenset(found)


def renumbered(text: str, axis: str, change: Callable[[Collection[int]], Iterable[int]]) -> str:
    """A template whose placeholder of ``axis`` is restricted to other indices; to none: not restricted."""

    def changed(match: re.Match[str]) -> str:
        if match["axis"] != axis or match["only"] is None:
            return match[0]
        found = set(change(_indices(text, match)))
        return f"{{{axis}={compress(found)}}}" if found else f"{{{axis}}}"

    return _PLACEHOLDER.sub(changed, text)


def block_of(name: str) -> str:
    """The block that a tensor works in: its module's parent, or the module of a raw parameter."""
    owner, _, leaf = name.rpartition(".")
    return owner.rpartition(".")[0] if leaf in ("weight", "bias") else owner


def compress(indices: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``: the inside of a restricted placeholder."""
    spans: list[tuple[int, int]] = []
    for i in sorted(set(indices)):
        if spans and spans[-1][1] == i - 1:
            spans[-1] = (spans[-1][0], i)
        else:
            spans.append((i, i))
    if not spans:
        raise LayoutError("a placeholder needs at least one index")
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
