"""Index runs and factors against closed formulas and brute force."""

from __future__ import annotations

from math import isclose, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparkling_cli.layout.parse import parse_layout
from sparkling_cli.widening.geometry import Fill, Growth, Treatment, ViewDim, view_of
from tests.widening.whole import combined_fills, new_entries, widen_tensor

SIZES = {"ffn": 6, "hidden": 4, "kv_heads": 2, "q_per_kv": 3, "head_dim": 5, "experts": 2}


@pytest.mark.parametrize(("d", "wide"), [(4, 5), (4, 6), (8, 16), (64, 96), (100, 125)])
def test_alpha_is_equation_16_up_to_twice(d: int, wide: int) -> None:
    """``1/sqrt(1+3c)`` for 0 < c <= 1."""
    c = (wide - d) / d
    assert isclose(Growth(d, wide).alpha, 1 / sqrt(1 + 3 * c), rel_tol=1e-12)


@pytest.mark.parametrize("times", [2, 3, 4, 7])
def test_alpha_is_the_reciprocal_of_whole_factors(times: int) -> None:
    """``1/(1+c)`` at every integer factor (Eq. 17)."""
    assert isclose(Growth(12, 12 * times).alpha, 1 / times, rel_tol=1e-12)


def test_alpha_beyond_twice_at_a_fraction() -> None:
    """At 2.5x half of the sources occur three times, half twice: sum of squares 6.5 per source."""
    assert isclose(Growth(10, 25).alpha, sqrt(1 / 6.5), rel_tol=1e-12)


def test_alpha_otherwise_is_equation_14() -> None:
    """``sqrt(d/d')`` for random, zero, or one side copied."""
    assert isclose(Growth(4, 10, copied=False).alpha, sqrt(0.4), rel_tol=1e-12)


def index_of(dim: ViewDim) -> list[int]:
    """Target index -> source index, entry by entry."""
    return [run.source + i for run in dim.runs for i in range(run.length)]


@given(st.integers(1, 40), st.integers(1, 120))
def test_new_entries_copy_the_old_in_order(d: int, more: int) -> None:
    """Entry t copies t mod d, and the runs tile the target."""
    view = view_of(parse_layout("scale a"), {"a": d}, {"a": Growth(d, d + more)}, Treatment())
    assert index_of(view[0]) == [t % d for t in range(d + more)]
    assert [r.target for r in view[0].runs] == sorted({r.target for r in view[0].runs})


@given(st.integers(1, 20), st.integers(1, 70))
def test_function_scaling_sums_to_one_per_source(d: int, more: int) -> None:
    """Per-column 1/multiplicity: the columns that copy one source add up to it (Net2Net)."""
    treatment = Treatment(scaling="function")
    view = view_of(parse_layout("1 <- a"), {"a": d}, {"a": Growth(d, d + more)}, treatment)
    total = [0.0] * d
    for run in view[1].runs:
        for i in range(run.length):
            total[run.source + i] += run.scale
    assert all(isclose(t, 1.0, rel_tol=1e-12) for t in total)


def test_query_heads_grow_inside_their_groups() -> None:
    """(kv_heads q_per_kv head_dim): each group keeps its heads and gets copies of its own."""
    layout = parse_layout("(kv_heads q_per_kv head_dim) <- hidden")
    view = view_of(layout, SIZES, {"q_per_kv": Growth(3, 6)}, Treatment())
    source = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).reshape(30, 4)
    wide = widen_tensor(source, view).reshape(2, 6, 5, 4)
    old = source.reshape(2, 3, 5, 4)
    assert torch.equal(wide[:, :3], old)
    assert torch.equal(wide[:, 3:], old)
    assert len(view[1].runs) == 2


@pytest.mark.parametrize(
    "text", ["(gate_up ffn) <- hidden", "(ffn gate_up) <- hidden", "(gate:ffn + up:ffn) <- hidden"]
)
def test_zero_fill_spares_the_gate(text: str) -> None:
    """Zero rows on both sides of a product would be dead for ever: the gate's new rows are copies."""
    treatment = Treatment(Fill.ZERO, Fill.COPY)
    view = view_of(parse_layout(text), SIZES, {"ffn": Growth(6, 9)}, treatment)
    source = torch.rand(12, 4) + 1
    wide = widen_tensor(source, view)
    zero = (wide == 0).all(dim=1)
    assert zero.sum() == 3
    fills = combined_fills(view).reshape(18, 4)[:, 0]
    assert torch.equal(zero, fills == Fill.ZERO)
    parts = wide.reshape(9, 2, 4).transpose(0, 1) if text.startswith("(ffn") else wide.reshape(2, 9, 4)
    assert (parts[0] != 0).all() and (parts[1][6:] == 0).all()


def test_joint_growth_multiplies_and_marks_an_l_shape() -> None:
    """Rows by the fan-out rule, columns by the fan-in rule; new on any dim is new."""
    growth = {"ffn": Growth(6, 9), "hidden": Growth(4, 8)}
    view = view_of(parse_layout("ffn <- hidden"), SIZES, growth, Treatment())
    source = torch.rand(6, 4, dtype=torch.float64)
    wide = widen_tensor(source, view)
    assert torch.allclose(wide[:6, :4], source / 2, rtol=1e-12)
    assert torch.allclose(wide[6:, 4:], source[:3] / 2, rtol=1e-12)
    mask = new_entries(view)
    expected = torch.ones(9, 8, dtype=torch.bool)
    expected[:6, :4] = False
    assert torch.equal(mask, expected)


def test_two_layer_network_keeps_its_function_at_twice() -> None:
    """down(act(up(x))) with ffn 2x is the same function (Sec. 3.2.3)."""
    torch.manual_seed(0)
    up, down = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    growth = {"ffn": Growth(6, 12)}
    wide_up = widen_tensor(up, view_of(parse_layout("ffn <- hidden"), SIZES, growth, Treatment()))
    wide_down = widen_tensor(down, view_of(parse_layout("hidden <- ffn"), SIZES, growth, Treatment()))
    x = torch.randn(7, 4, dtype=torch.float64)
    before = torch.tanh(x @ up.T) @ down.T
    after = torch.tanh(x @ wide_up.T) @ wide_down.T
    assert torch.allclose(before, after, rtol=1e-12, atol=1e-12)
