"""Candidate terms for one dim: from how its size answers to each axis, what it may mean.

Doubling axis A adds ``D_A`` entries to a dim of size n. ``D_A == n`` makes A a factor of the whole dim,
``D_A < n`` a factor of one part. The order of factors and parts is not visible in sizes: every order
that occurs in practice becomes a candidate, and logits decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import prod

#: Canonical order of factors: groups outside, channels inside.
_ORDER = ("experts", "shared_experts", "kv_heads", "q_per_kv", "heads")
_INNER = ("head_dim", "v_dim", "qk_nope", "qk_rope")
_MAX_PARTS = 4

Sizes = Mapping[str, int]


def candidates(
    n: int, moves: Mapping[str, int], sizes: Sizes, kinds: Mapping[str, str | None], blocks: str = "1"
) -> list[str]:
    """Terms of the layout language that a dim of size ``n`` may have, the likeliest first.

    Args:
        n: entries in the tiny model.
        moves: axis -> entries that doubling it adds (axes that add none are absent).
        sizes: axis sizes in the tiny model.
        kinds: axis -> hinted kind.
        blocks: how many blocks heads lie in: a number, or an axis.

    Returns:
        Candidates as text; empty where the sizes follow no sum of products.
    """
    if not moves:
        return [str(n)]
    whole = sorted((a for a, d in moves.items() if d == n), key=lambda a: _rank(a, kinds))
    partial = sorted((a for a, d in moves.items() if d != n), key=lambda a: _rank(a, kinds))
    common = prod(sizes[a] for a in whole)
    if common <= 0 or n % common:
        return []
    quotient = n // common
    if not partial:
        return (
            _products(whole, quotient, kinds) if blocks == "1" else _in_blocks(whole, quotient, sizes, blocks)
        )
    return _sums(whole, quotient, {a: moves[a] / common for a in partial}, sizes)


def grouped_candidates(n: int, sizes: Sizes) -> list[str]:
    """Terms of a dim of key/value heads where ``head_dim`` is hidden over heads."""
    if {"kv_heads", "hidden", "head_dim"} <= set(sizes) and "q_per_kv" not in sizes:
        apart = n == sizes["hidden"] + 2 * sizes["kv_heads"] * sizes["head_dim"]
        return ["(hidden + (kv_heads head_dim) + (kv_heads head_dim))"] if apart else []
    if not {"kv_heads", "q_per_kv", "head_dim"} <= set(sizes):
        return []
    times, odd = divmod(n, sizes["kv_heads"] * sizes["head_dim"])
    if odd:
        return []
    if times == 1:
        return ["(kv_heads head_dim)"]
    if times == 2:
        return ["(2 kv_heads head_dim)", "(kv_heads 2 head_dim)"]
    if times == sizes["q_per_kv"] + 2:
        return [
            "(((kv_heads q_per_kv) + kv_heads + kv_heads) head_dim)",
            "(kv_heads (q_per_kv + 1 + 1) head_dim)",
        ]
    return []


def _rank(axis: str, kinds: Mapping[str, str | None]) -> tuple[int, str]:
    kind = kinds.get(axis) or ""
    if kind in _ORDER:
        return _ORDER.index(kind), axis
    return (100 + _INNER.index(kind), axis) if kind in _INNER else (50, axis)


def _text(factors: Sequence[str]) -> str:
    return factors[0] if len(factors) == 1 else "(" + " ".join(factors) + ")"


def _products(whole: Sequence[str], count: int, kinds: Mapping[str, str | None]) -> list[str]:
    """``count`` times a product: as outermost blocks, after the heads, or interleaved."""
    if count == 1:
        found = [_text(whole)]
        if len(whole) > 1:
            found.append(_text(list(reversed(whole))))
        return found
    # Names that hint at nothing do not say either which factor lies outside.
    unknown = len(whole) > 1 and any(kinds.get(axis) is None for axis in whole)
    wholes = [list(whole), list(reversed(whole))] if unknown else [list(whole)]
    return [_text([*w[:i], str(count), *w[i:]]) for w in wholes for i in range(len(w) + 1)]


def _in_blocks(whole: Sequence[str], count: int, sizes: Sizes, blocks: str) -> list[str]:
    """A product with blocks of heads: around the heads, or around the channels of each."""
    number = sizes.get(blocks) or int(blocks)
    times, odd = divmod(count, number)
    if odd or not any(axis.endswith("heads") for axis in whole):
        return _products(whole, count, {})
    outer = [blocks] if times == 1 else [blocks, str(times)]
    return [_text([*outer, *whole]), _text([whole[0], *outer, *whole[1:]])]


def _sums(whole: Sequence[str], quotient: int, steps: Mapping[str, float], sizes: Sizes) -> list[str]:
    """Concatenated parts: each partial axis in a part of its own, the rest fixed."""
    parts: list[str] = []
    rest = float(quotient)
    for axis, step in steps.items():
        times = step / sizes[axis]
        if times != int(times) or times < 1 or times > _MAX_PARTS:
            return []
        parts += [axis] * int(times)
        rest -= step
    if rest < 0 or rest != int(rest):
        return []
    # k and v as one each, or one block
    fixed = [["1", "1"], ["2"]] if rest == 2 else [[str(int(rest))]] if rest else [[]]
    found: dict[str, None] = {}
    for split in range(len(whole) + 1):
        outer, inner = list(whole[:split]), list(whole[split:])
        for tail in fixed:
            everything = [*parts, *tail]
            if len(everything) > 6:
                continue
            for order in dict.fromkeys(itertools.permutations(everything)):
                terms = [_part(p, inner) for p in order]
                found[_text([*outer, "(" + " + ".join(terms) + ")"])] = None
    return list(found)


def _part(part: str, inner: Sequence[str]) -> str:
    """A part's own axis among common inner factors: after kv_heads, before channels."""
    at = sum(1 for a in inner if a.endswith("kv_heads") or a == "heads")
    return _text([f for f in (*inner[:at], part, *inner[at:]) if f != "1"] or ["1"])
