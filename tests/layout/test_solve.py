"""Layout files that leave sizes open are closed by the checkpoint's shapes and numbers, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout import packaged
from sparkling_cli.layout.names import NameTemplate
from sparkling_cli.layout.packaged import packaged_data, packaged_names
from sparkling_cli.layout.parse import parse_expr
from sparkling_cli.layout.presence import NamesDifferError
from sparkling_cli.layout.solve import Equation, solve_layout, solve_sizes

FILE: dict[str, Any] = {
    "format": 1,
    "name": "example",
    "axes": {
        "hidden": {"joint": ["ffn", "unused"]},
        "ffn": {},
        "kv_heads": {},
        "q_per_kv": {},
        "head_dim": {},
        "layers": {"widenable": False},
        "unused": {},
    },
    "config": {"n_kv": "kv_heads", "width?": "hidden"},
    "tensors": {
        "h.{layers}.qkv": "(kv_heads (q:q_per_kv + k:1 + v:1) head_dim) <- hidden",
        "h.{layers}.q_norm": "scale head_dim",
        "h.{layers}.up": "ffn <- hidden",
        "h.{layers}.up_bias?": "bias ffn",
        "extra?": "scale unused",
    },
}
SHAPES = {
    f"h.{i}.{name}": shape
    for i in range(3)
    for name, shape in {"qkv": (3 * 6 * 5, 14), "q_norm": (5,), "up": (22, 14)}.items()
}


def test_sizes_follow_from_shapes_and_numbers() -> None:
    """Products and sums are solved for their one unknown; unused axes and patterns fall away."""
    layout = solve_layout(FILE, SHAPES, {}, {"n_kv": 3, "other": "x"}, "file")
    assert layout.sizes == {
        "hidden": 14, "ffn": 22, "kv_heads": 3, "q_per_kv": 4, "head_dim": 5, "layers": 3,
    }  # fmt: skip
    assert [p.name for p in layout.tensors] == ["h.{layers}.qkv", "h.{layers}.q_norm", "h.{layers}.up"]
    assert layout.config == {"n_kv": "kv_heads"}
    assert layout.axes["hidden"].joint == ("ffn",)


@pytest.mark.parametrize(
    ("change", "numbers", "message"),
    [
        ({"h.1.up": (23, 14)}, {"n_kv": 3}, "ffn"),
        ({"h.1.up": (22, 14, 1)}, {"n_kv": 3}, "2 dims"),
        ({}, {"n_kv": 4}, "kv_heads = 4"),
        ({}, {"n_kv": 3, "width": 15}, "hidden"),
        ({"h.0.qkv": (91, 14), "h.1.qkv": (91, 14), "h.2.qkv": (91, 14)}, {"n_kv": 3}, "does not fit"),
    ],
)
def test_contradictions_are_refused(
    change: dict[str, tuple[int, ...]], numbers: dict[str, int], message: str
) -> None:
    """One wrong shape or number is an error that names the term."""
    with pytest.raises(LayoutError, match=message) as caught:
        solve_layout(FILE, {**SHAPES, **change}, {}, numbers, "file")
    assert not isinstance(caught.value, NamesDifferError)


@pytest.mark.parametrize(
    ("shapes", "numbers"),
    [
        ({**SHAPES, "h.0.down": (14, 22)}, {"n_kv": 3}),
        ({k: v for k, v in SHAPES.items() if "q_norm" not in k}, {"n_kv": 3}),
        (SHAPES, {}),
    ],
)
def test_other_names_are_another_family(shapes: dict[str, tuple[int, ...]], numbers: dict[str, int]) -> None:
    """A tensor too many, a tensor too few, a number too few: not this family."""
    with pytest.raises(NamesDifferError):
        solve_layout(FILE, shapes, {}, numbers, "file")


def test_an_open_size_is_asked_for() -> None:
    """What the shapes do not say is not guessed; a size in the file settles it."""
    data = {**FILE, "config": {}}
    shapes = {k: v for k, v in SHAPES.items() if "q_norm" not in k}
    data["tensors"] = {k: v for k, v in FILE["tensors"].items() if "q_norm" not in k}
    with pytest.raises(LayoutError, match="do not say how large kv_heads, q_per_kv, head_dim is"):
        solve_layout(data, shapes, {}, {}, "file")
    data["axes"] = {**FILE["axes"], "head_dim": {"size": 5}, "kv_heads": {"size": 3}}
    assert solve_layout(data, shapes, {}, {}, "file").sizes["q_per_kv"] == 4


def test_solving_needs_no_order() -> None:
    """An equation that cannot be solved yet waits for the others."""
    equations = [
        Equation(parse_expr("(a b c)"), 30, "x"),
        Equation(parse_expr("(a b)"), 6, "y"),
        Equation(parse_expr("(a + 4)"), 6, "z"),
    ]
    assert solve_sizes(equations, {}) == {"a": 2, "b": 3, "c": 5}


@pytest.mark.parametrize("name", packaged_names())
def test_packaged_files_are_well_formed(name: str) -> None:
    """Every file in the package parses, and says of every axis whether and why it can be widened."""
    data = packaged_data(name)
    assert data["name"] == name
    with pytest.raises(NamesDifferError):
        solve_layout(data, {"nothing": (1,)}, {}, {}, name)
    for axis, info in data["axes"].items():
        assert "widenable" in info, axis
        assert "size" not in info, axis


def test_products_are_divided() -> None:
    """Three products of three unknowns, none of which can be solved alone."""
    equations = [
        Equation(parse_expr("(g q hd)"), 48, "wq"),
        Equation(parse_expr("(g hd)"), 16, "wk"),
        Equation(parse_expr("(g q)"), 6, "n_heads"),
    ]
    assert solve_sizes(equations, {}) == {"q": 3, "g": 2, "hd": 8}


def test_implied_numbers_and_requirements() -> None:
    """A key with ``+`` stays when it is missing; a contradicted requirement is another family."""
    data = {**FILE, "config": {"n_kv": "kv_heads", "hd+": "head_dim"}, "requires": {"tied": False}}
    layout = solve_layout(data, SHAPES, {}, {"n_kv": 3, "tied": False}, "file")
    assert layout.config == {"n_kv": "kv_heads", "hd": "head_dim"}
    assert solve_layout(data, SHAPES, {}, {"n_kv": 3}, "file") == layout
    with pytest.raises(NamesDifferError, match="tied"):
        solve_layout(data, SHAPES, {}, {"n_kv": 3, "tied": True}, "file")


@pytest.mark.parametrize("name", packaged_names())
def test_a_glance_at_a_packaged_file(name: str) -> None:
    """It says no where the first tensor that the file needs is missing, and only there."""
    data, text = packaged_data(name), packaged._text(name)
    first, *others = [one for one in data.get("disk", data["tensors"]) if not one.endswith("?")]
    needed = {NameTemplate(first).key}
    types = tuple(data.get("classes", {}))
    for model_type in types or (None, "other"):
        assert packaged._may_fit(text, needed, model_type)
        assert not packaged._may_fit(text, {NameTemplate(one).key for one in others} - needed, model_type)
    assert packaged._may_fit(text, needed, "other") is not bool(types)


def test_a_number_that_sizes_nothing_stays() -> None:
    """Experts of a model without any: neither their count nor their width is an axis of it."""
    file: dict[str, Any] = {
        "format": 1,
        "name": "hybrid",
        "axes": {"ffn": {}, "hidden": {}, "experts": {}, "layers": {}},
        "config": {"n_expert": "experts", "d_ff": "ffn"},
        "tensors": {
            "h.{layers}.up?": "ffn <- hidden",
            "h.{layers}.experts?": "experts | ffn <- hidden",
            "norm": "scale hidden",
        },
    }
    shapes = {"h.0.up": (6, 4), "h.2.up": (6, 4), "norm": (4,)}
    found = solve_layout(file, shapes, {}, {"n_expert": 0, "d_ff": 6}, "a file")
    assert set(found.axes) == {"ffn", "hidden", "layers"}
    assert dict(found.config) == {"d_ff": "ffn"}
    assert [pattern.name for pattern in found.tensors] == ["h.{layers=0,2}.up", "norm"]
