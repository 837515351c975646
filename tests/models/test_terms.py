"""Candidate terms from how a dim answers to doubled axes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkling_cli.layout.expr import size_of
from sparkling_cli.layout.parse import parse_expr, parse_layout
from sparkling_cli.models.terms import candidates
from sparkling_cli.widening.geometry import Growth, Treatment, view_of
from tests.widening.whole import widen_tensor

ROLES: dict[str, Any] = {"kv_heads": "kv_heads", "q_per_kv": "q_per_kv", "head_dim": "head_dim", "ffn": "ffn"}


def moves_of(text: str, sizes: dict[str, int]) -> dict[str, int]:
    """What doubling each axis adds to a dim that is ``text``."""
    n = size_of(parse_expr(text), sizes)
    grown = {a: size_of(parse_expr(text), {**sizes, a: 2 * s}) - n for a, s in sizes.items()}
    return {a: d for a, d in grown.items() if d}


def effects_of(text: str, sizes: dict[str, int]) -> list[list[float]]:
    """Which source entry every target entry copies, for each axis doubled."""
    layout = parse_layout(f"scale {text}")
    source = torch.arange(layout.shape(sizes)[0], dtype=torch.float64)
    views = [view_of(layout, sizes, {a: Growth(n, 2 * n)}, Treatment()) for a, n in sizes.items()]
    return [widen_tensor(source, view).tolist() for view in views]


@settings(max_examples=40)
@given(
    text=st.sampled_from(
        [
            "ffn",
            "(2 ffn)",
            "(ffn 2)",
            "(kv_heads q_per_kv head_dim)",
            "(kv_heads head_dim)",
            "(((kv_heads q_per_kv) + kv_heads + kv_heads) head_dim)",
            "(kv_heads (q_per_kv + 1 + 1) head_dim)",
            "(ffn + 7)",
        ]
    ),
    kv=st.integers(2, 5),
    q=st.integers(2, 5),
    hd=st.integers(2, 9),
    ffn=st.integers(2, 40),
)
def test_the_truth_is_among_the_candidates(text: str, kv: int, q: int, hd: int, ffn: int) -> None:
    """Whatever the sizes, some candidate copies the same entries as the true term, for every axis."""
    sizes = {"kv_heads": kv, "q_per_kv": q, "head_dim": hd, "ffn": ffn}
    n = size_of(parse_expr(text), sizes)
    found = candidates(n, moves_of(text, sizes), sizes, ROLES)
    assert effects_of(text, sizes) in [effects_of(t, sizes) for t in found], found


def test_a_dim_that_nothing_moves_is_anonymous() -> None:
    """A kernel width is a plain number."""
    assert candidates(4, {}, {"ffn": 8}, ROLES) == ["4"]


def test_sizes_that_follow_no_sum_of_products_have_no_candidates() -> None:
    """A dim that grows by half a unit is not explained, so that its axis is refused."""
    assert candidates(10, {"ffn": 4}, {"ffn": 8}, ROLES) == []
