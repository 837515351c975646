"""The layout language: what parses to what, and where errors point."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import Axis, Role, Sum
from sparkling_cli.layout.parse import parse_layout

SIZES = {"ffn": 6, "hidden": 4, "heads": 4, "kv_heads": 2, "q_per_kv": 2, "head_dim": 3, "experts": 5}


@pytest.mark.parametrize(
    ("text", "shape", "roles"),
    [
        ("ffn <- hidden", (6, 4), "out in"),
        ("hidden -> ffn", (4, 6), "in out"),
        ("scale hidden", (4,), "scale"),
        ("bias ffn", (6,), "bias"),
        ("(kv_heads q_per_kv head_dim) <- hidden", (12, 4), "out in"),
        ("hidden <- (kv_heads q_per_kv head_dim)", (4, 12), "out in"),
        ("hidden -> (qkv heads head_dim)", (4, 36), "in out"),
        ("((q:heads + k:kv_heads + v:kv_heads) head_dim) <- hidden", (24, 4), "out in"),
        ("experts | (gate_up ffn) <- hidden", (5, 12, 4), "stack out in"),
        ("experts | hidden -> (ffn gate_up)", (5, 4, 12), "stack in out"),
        ("hidden <- 1 4", (4, 1, 4), "out in in"),
        ("<- (kv_heads hidden)", (8,), "in"),
        ("", (), ""),
    ],
)
def test_shapes_and_roles(text: str, shape: tuple[int, ...], roles: str) -> None:
    """Every form of the design's table has the storage shape and the roles it should."""
    layout = parse_layout(text)
    assert layout.shape(SIZES) == shape
    assert " ".join(dim.role.value for dim in layout.dims) == roles


def test_labels_and_sums() -> None:
    """``label:term`` names a part."""
    dim = parse_layout("(gate:ffn + up:ffn) <- hidden").dims[0]
    assert dim.role is Role.OUT
    assert dim.expr == Sum((Axis("ffn", "gate"), Axis("ffn", "up")))


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("ffn <- ", 6),
        ("ffn <- (a + b c)", 14),
        ("ffn $ hidden", 4),
        ("(a", 2),
        ("0 <- a", 0),
        ("a <- b c)", 8),
        ("a <- b <- c", 7),
        ("x:y:z <- a", 0),
    ],
)
def test_the_caret_stands_under_the_fault(text: str, at: int) -> None:
    """The last two lines of the message are the text and a caret at the fault."""
    with pytest.raises(LayoutError) as caught:
        parse_layout(text)
    shown, caret = str(caught.value).split("\n")[-2:]
    assert shown.strip() == text.strip()
    assert caret.index("^") - 4 == at


@given(st.text(alphabet="abq:()+|<->0123 \t\n", max_size=40))
def test_anything_parses_or_is_a_layout_error(text: str) -> None:
    """No input crashes the parser; what parses prints as something that parses to the same."""
    try:
        layout = parse_layout(text)
    except LayoutError:
        return
    assert parse_layout(layout.text).dims == layout.dims


def test_deep_nesting_is_refused() -> None:
    """A thousand parentheses are an error, not a recursion failure."""
    with pytest.raises(LayoutError, match="nested"):
        parse_layout("(" * 1000 + "a" + ")" * 1000)
