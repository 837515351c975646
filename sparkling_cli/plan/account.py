"""The account: every tensor of every file of the source, and what becomes of it.

Weights and state have recipes. What is left (averages, masters, counters, random states, second copies) is
carried over only if nothing that grows is in it, is widened where it is a copy of a weight, and is refused
otherwise: a tensor that stays narrow beside a wide model is a wrong result that looks right.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

from sparkling_cli.errors import CheckpointError, SpecError
from sparkling_cli.formats.model import Further
from sparkling_cli.plan.model import CARRIED, Recipe, Row
from sparkling_cli.results.account import Account, AccountEntry, AccountLine, Fate, Kind
from sparkling_cli.storage.tensors import ITEM_BYTES, Extent

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sorted:
    """What becomes of the tensors that are neither weights nor state.

    Attributes:
        widened: copies of weights: the tensor, and the parameter that it is a copy of.
        carried: all others that go into the output.
        left_out: those that do not.
    """

    widened: tuple[tuple[Further, str], ...] = ()
    carried: tuple[Further, ...] = ()
    left_out: tuple[Further, ...] = ()


@dataclass(frozen=True)
class Growing:
    """The shapes of everything that grows, and what a tensor's shape has to do with them.

    Attributes:
        shapes: before widening.
    """

    shapes: frozenset[Shape]
    _known: dict[tuple[str, Shape], Shape | None] = field(default_factory=dict)

    @classmethod
    def of(cls, recipes: Iterable[Recipe]) -> Growing:
        """Of all recipes that change a shape."""
        grown = (r for r in recipes if r.before != r.shape and r.blocks is None)
        return cls(frozenset(_squeezed(recipe.before) for recipe in grown))

    def match(self, dtype: str, shape: Shape) -> Shape | None:
        """The growing shape that a tensor has: as it is, stacked, transposed, reshaped or concatenated.

        Bytes in a row are random states, not parameters, whatever their number.
        """
        mark = (dtype, shape)
        if mark not in self._known:
            bare = _squeezed(shape)
            skip = not bare or 0 in bare or (len(bare) == 1 and dtype in ("uint8", "bool"))
            self._known[mark] = None if skip else self._match(bare)
        return self._known[mark]

    def _match(self, shape: Shape) -> Shape | None:
        if shape in self.shapes:
            return shape
        for count in range(1, len(shape) + 1):  # the last dims, stacked in the others
            found = self._unordered.get(tuple(sorted(shape[-count:])))
            if found is not None:
                return found
            if prod(shape[-count:]) in self._flat:
                return self._flat[prod(shape[-count:])]
        return self._concatenated(shape)

    @cached_property
    def _unordered(self) -> dict[Shape, Shape]:
        return {tuple(sorted(shape)): shape for shape in sorted(self.shapes)}

    @cached_property
    def _flat(self) -> dict[int, Shape]:
        """Entries -> the shape of a matrix or stack that has so many: reshaped, it is still that."""
        return {prod(shape): shape for shape in sorted(self.shapes) if len(shape) > 1}

    @cached_property
    def _beside(self) -> dict[tuple[int, Shape], dict[int, Shape]]:
        """(dim, sizes of the other dims) -> size of that dim -> the shape."""
        found: dict[tuple[int, Shape], dict[int, Shape]] = defaultdict(dict)
        for shape in sorted(self.shapes):
            for dim, size in enumerate(shape):
                found[dim, shape[:dim] + shape[dim + 1 :]][size] = shape
        return found

    def _concatenated(self, shape: Shape) -> Shape | None:
        """Several tensors along one dim: equal ones, or up to four of different sizes."""
        for dim, size in enumerate(shape):
            sizes = self._beside.get((dim, shape[:dim] + shape[dim + 1 :]))
            if sizes is None:
                continue
            for part, whole in sizes.items():
                if size % part == 0 and (len(shape) > 1 or size // part <= _MOST_VECTORS):
                    return whole
            if len(sizes) > 1 and size in _sums(sizes, _MOST_PARTS):
                return next(iter(sizes.values()))
        return None


#: parts of different sizes that a fused tensor is made of: q, k, v and a gate
_MOST_PARTS = 4
#: vectors that are put together: in a long row of numbers any length would be a multiple
_MOST_VECTORS = 4


def _sums(sizes: Collection[int], most: int) -> set[int]:
    reached = {0}
    for _ in range(most):
        reached |= {total + size for total in reached for size in sizes}
    return reached


def _squeezed(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


@dataclass(frozen=True)
class Stray:
    """A tensor of an unknown name among the state of a parameter that grows.

    Attributes:
        item: the tensor.
        error: why it cannot be carried, where its shape has to do with the parameter's; else None.
    """

    item: Further
    error: CheckpointError | None

    def judged(self, growing: Growing, carry: Sequence[str]) -> Further:
        """The tensor, to be sorted like any other.

        Raises:
            CheckpointError: it has no shape that grows, but a size of its parameter.
        """
        stored = self.item.stored
        assert stored is not None
        given = any(fnmatchcase(self.item.name, pattern) for pattern in carry)
        if self.error is not None and not given and growing.match(stored.dtype, stored.shape) is None:
            raise self.error
        return self.item


def check_carry(carry: Sequence[str], further: Sequence[Further], grown: Iterable[str]) -> None:
    """Every pattern is of something that can be carried.

    Args:
        carry: the patterns.
        further: tensors that are neither weights nor state.
        grown: names of weights and of state.

    Raises:
        SpecError: one matches nothing, or nothing but what follows the layout.
    """
    there = {item.name: item for item in further if not item.left_out}
    larger = [name for name, item in there.items() if item.stored is None or prod(item.stored.shape) > 1]
    for pattern in carry:
        if any(fnmatchcase(name, pattern) for name in there):
            continue
        near = get_close_matches(pattern, larger, n=3)
        if any(fnmatchcase(name, pattern) for name in grown):
            hint = "weights follow the layout (--layout), and optimizer state goes by --state NAME=carry"
        elif near:
            hint = f"did you mean {' or '.join(map(repr, near))}?"
        else:
            hint = f"there is {', '.join(larger[:4]) or 'none'}" + (", ..." if larger[4:] else "")
        raise SpecError(
            f"--carry {pattern}: matches nothing; it is for tensors that are neither weights nor moments",
            hint=hint,
        )


def sort_further(
    further: Sequence[Further],
    growing: Growing,
    carry: Sequence[str],
    copied: Callable[[Further], str | None],
) -> Sorted:
    """What becomes of every tensor that is neither a weight nor state.

    Args:
        further: the tensors.
        growing: shapes that grow.
        carry: patterns of names that are carried over whatever their shape.
        copied: gives the parameter that a tensor is a copy of, or None.

    Raises:
        CheckpointError: one has a shape that grows and is no copy of a weight; names all of a file.
    """
    widened: list[tuple[Further, str]] = []
    carried: list[Further] = []
    refused: list[tuple[Further, Shape]] = []
    for item in further:
        if item.left_out:
            continue
        if item.stored is None:
            if not any(fnmatchcase(item.name, pattern) for pattern in carry):
                raise _unread(item)
            continue
        found = growing.match(item.stored.dtype, item.stored.shape) if prod(item.stored.shape) > 1 else None
        if found is None or any(fnmatchcase(item.name, pattern) for pattern in carry):
            carried.append(item)
            continue
        owner = copied(item) if item.key else None
        if owner is not None:
            widened.append((item, owner))
        else:
            refused.append((item, found))
    if refused:
        raise _refusal(refused)
    left_out = tuple(item for item in further if item.left_out and item.stored is not None)
    return Sorted(tuple(widened), tuple(carried), left_out)


def _unread(item: Further) -> CheckpointError:
    return CheckpointError(
        f"{item.name}: what is in this file is not known, so it cannot be carried over unseen",
        hint=f"move it out of the checkpoint, or carry it as it is: --carry '{item.file}*'",
    )


def _refusal(refused: Sequence[tuple[Further, Shape]]) -> CheckpointError:
    first, whole = refused[0]
    assert first.stored is not None
    more = f" and {len(refused) - 1} more tensor(s)" if len(refused) > 1 else ""
    names = f"'{first.name}'{more}"
    place = f"move {first.file} out of the checkpoint" if first.file and not first.key else "save without it"
    shape, pattern = " x ".join(map(str, whole)), _pattern([item.name for item, _ in refused])
    return CheckpointError(
        f"{names}: shape {first.stored.shape} is that of something that grows ({shape}), and what it "
        "is cannot be told: carried over as it is, it would not fit the wider model",
        hint=f"{place}; or, if it shall stay as it is: --carry '{pattern}'",
    )


def _pattern(names: Sequence[str]) -> str:
    """One pattern for all of them: what they begin with, brackets as such, and a star where they part."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:same].replace("[", "[[]") + ("" if first == last else "*")


def further_notes(found: Sorted) -> list[str]:
    """What was decided about tensors that are neither weights nor state, file by file."""
    notes = []
    copies = Counter(item.file or item.name.partition(":")[0] for item, _ in found.widened)
    for place, count in copies.items():
        notes.append(f"{place}: {count} tensor(s) are copies or averages of weights, and widened like them")
    for place, count in Counter(item.file for item in found.left_out).items():
        notes.append(f"{place}: {count} tensor(s) of the old size are left out")
    return notes


def account_of(rows: Iterable[Row], found: Sorted) -> Account:
    """The whole account of a plan.

    Args:
        rows: of the plan; those of carried and widened further tensors among them.
        found: what became of tensors that are neither weights nor state.
    """
    lines: dict[tuple[Kind, Fate], list[int]] = defaultdict(lambda: [0, 0, 0])

    def add(kind: Kind, fate: Fate, tensors: int, before: int, after: int) -> None:
        line = lines[kind, fate]
        line[0] += tensors
        line[1] += before
        line[2] += after

    alike = Counter((row.recipe, row.new) for row in rows if row.recipe.slot != CARRIED)
    for (recipe, new), count in alike.items():
        size = ITEM_BYTES[recipe.dtype] * count
        fate = Fate.WIDENED if new or recipe.changes else Fate.CARRIED
        before = 0 if new else prod(recipe.before) * size
        add(recipe.kind, fate, 0 if new else count, before, prod(recipe.shape) * size)
    seen: set[tuple[Extent, ...]] = set()
    entries = [_entry(item, Kind.COPY, Fate.WIDENED) for item, _ in found.widened]
    for items, fate in ((found.carried, Fate.CARRIED), (found.left_out, Fate.LEFT_OUT)):
        for item in items:
            stored = item.stored
            assert stored is not None
            kind = Kind.SCALAR if prod(stored.shape) == 1 else Kind.OTHER
            again = bool(stored.extents) and stored.extents in seen  # a counter of a new layer's parameter
            seen.add(stored.extents)
            before = 0 if again else stored.nbytes
            add(kind, fate, int(not again), before, stored.nbytes if fate is Fate.CARRIED else 0)
            if kind is Kind.OTHER:
                entries.append(_entry(item, kind, fate))
    kinds = list(Kind)
    ordered = sorted(lines.items(), key=lambda line: (kinds.index(line[0][0]), line[0][1].value))
    return Account(
        lines=tuple(
            AccountLine(kind=kind, fate=fate, tensors=n, bytes_before=before, bytes_after=after)
            for (kind, fate), (n, before, after) in ordered
        ),
        entries=tuple(entries),
    )


def _entry(item: Further, kind: Kind, fate: Fate) -> AccountEntry:
    assert item.stored is not None
    return AccountEntry(
        name=item.name, dtype=item.stored.dtype, shape=item.stored.shape, kind=kind, fate=fate
    )
