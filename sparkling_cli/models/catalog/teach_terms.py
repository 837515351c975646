"""Which expression in config keys gives a number that was seen in several sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from sparkling_cli.models.catalog.terms import evaluate

Numbers = Mapping[str, int]


def find_term(samples: Sequence[tuple[Numbers, int]]) -> str | None:
    """The simplest expression that gives every number from the keys beside it; None if none does."""
    if not samples:
        return None
    first, value = samples[0]
    keys = [key for key in first if all(key in numbers for numbers, _ in samples)]
    for term in _terms(keys, first, value):
        if all(evaluate(term, numbers) == n for numbers, n in samples):
            return term
    return None


def _terms(keys: Sequence[str], numbers: Numbers, value: int) -> Iterator[str]:
    """Expressions that give the first number, the simple ones first."""
    yield from (key for key in keys if numbers[key] == value)
    yield str(value)
    for a in keys:
        own = numbers[a]
        if value % own == 0 and 2 <= value // own <= 8:
            yield f"{value // own} * {a}"
        if own % value == 0 and 2 <= own // value <= 8:
            yield f"{a} / {own // value}"
        if 1 <= value - own <= 4:
            yield f"{a} + {value - own}"
    for a, b in itertools.permutations(keys, 2):
        if numbers[a] == value * numbers[b]:
            yield f"{a} / {b}"
    for a, b in itertools.combinations(keys, 2):
        if numbers[a] * numbers[b] == value:
            yield f"{a} * {b}"
        if numbers[a] + numbers[b] == value:
            yield f"{a} + {b}"
        product = numbers[a] * numbers[b]
        if value % product == 0 and 2 <= value // product <= 4:
            yield f"{value // product} * {a} * {b}"
    for a, b in itertools.permutations(keys, 2):
        if 2 * numbers[a] == value * numbers[b]:
            yield f"2 * {a} / {b}"
    for a, b in itertools.combinations(keys, 2):
        for c in keys:
            if c not in (a, b) and numbers[a] * numbers[b] == value * numbers[c]:
                yield f"{a} * {b} / {c}"
