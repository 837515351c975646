"""Spec against layout: sizes, and refusals that say what works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sparkling_cli.errors import SpecError
from sparkling_cli.layout.model import AxisInfo, ModelLayout, TensorPattern
from sparkling_cli.plan.advice import small_share
from sparkling_cli.plan.resolve import resolve_growth, whole_heads
from sparkling_cli.plan.symmetry import locked_within
from sparkling_cli.spec.sources import make_spec
from sparkling_cli.widening.geometry import Growth


def layout(**changes: Any) -> ModelLayout:
    """A grouped-query model."""
    axes = {
        "hidden": AxisInfo(96, True),
        "ffn": AxisInfo(171, True, multiple_of=1),
        "kv_heads": AxisInfo(2, True),
        "q_per_kv": AxisInfo(3, True),
        "head_dim": AxisInfo(16, False, "rotary frequencies would move"),
        **changes,
    }
    return ModelLayout("Toy", axes, (), aliases={"expert_ffn": "ffn"})


def grow(*axes: dict[str, Any], on: ModelLayout | None = None, **fields: Any) -> dict[str, Growth]:
    """Resolve a spec made of these axes."""
    return resolve_growth(make_spec({"axes": list(axes), **fields}), on or layout())


def test_factor_size_alias_and_multiple() -> None:
    """Factors, sizes, aliases and rounding up give the sizes one would expect."""
    assert grow({"axis": "ffn", "factor": 2}) == {"ffn": Growth(171, 342)}
    assert grow({"axis": "expert_ffn", "to": 200}) == {"ffn": Growth(171, 200)}
    assert grow({"axis": "ffn", "factor": 1.5}, multiple_of=64) == {"ffn": Growth(171, 320)}
    assert grow({"axis": "hidden", "factor": 1.25}) == {"hidden": Growth(96, 120)}


@pytest.mark.parametrize("axis", ["ffn", "hidden", "kv_heads", "heads"])
def test_a_factor_that_widens_nothing(axis: str) -> None:
    """It rounds to the size that there is; the size that the hint names works."""
    with pytest.raises(SpecError, match=r"1\.0000000001 does not widen") as caught:
        grow({"axis": axis, "factor": 1.0000000001})
    _, _, size = str(caught.value.hint).rpartition("--to ")
    (grown,) = grow({"axis": axis, "to": int(size)}).values()
    assert grown.target == 2 * grown.source


def test_the_configs_name_of_an_axis_is_known() -> None:
    """Who writes the config's key is told the axis, also where the key is a product of two."""
    known = replace(
        layout(),
        config={"intermediate_size": "ffn", "num_attention_heads": "(kv_heads q_per_kv)", "odd": "head_dim"},
    )
    for key, axis in (("intermediate_size", "ffn"), ("num_attention_heads", "heads"), ("odd", None)):
        with pytest.raises(SpecError, match="no such axis") as caught:
            grow({"axis": key, "factor": 2}, on=known)
        said = f"that is the config's name for the axis {axis!r}: --axis {axis}"
        if axis is None:
            said = "that is the config's name for 'head_dim', which cannot be widened: "
            said += "rotary frequencies would move"
        assert caught.value.hint == said


def test_query_heads_as_a_whole() -> None:
    """Groups times queries, before and after; only where heads grow at all, and are no axis."""
    assert whole_heads(grow({"axis": "heads", "factor": 2}), layout()) == Growth(6, 12)
    assert whole_heads(grow({"axis": "kv_heads", "factor": 2}), layout()) == Growth(6, 12)
    assert whole_heads(grow({"axis": "ffn", "factor": 2}), layout()) is None
    assert whole_heads({"heads": Growth(6, 12)}, layout(heads=AxisInfo(6, True))) is None


def test_heads_under_grouped_queries() -> None:
    """Heads alone grow in their groups; kv_heads alone add groups; both set both counts."""
    assert grow({"axis": "heads", "factor": 2}) == {"q_per_kv": Growth(3, 6)}
    assert grow({"axis": "kv_heads", "factor": 2}) == {"kv_heads": Growth(2, 4)}
    assert grow({"axis": "heads", "factor": 2}, {"axis": "kv_heads", "factor": 2}) == {
        "kv_heads": Growth(2, 4)
    }
    assert grow({"axis": "heads", "to": 24}, {"axis": "kv_heads", "factor": 2}) == {
        "kv_heads": Growth(2, 4),
        "q_per_kv": Growth(3, 6),
    }


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ([{"axis": "ffn", "factor": 1.5}], ["axes.ffn.factor", "256.5", "--to 256", "--to 257"]),
        ([{"axis": "ffn", "to": 171}], ["axes.ffn.to", "171", "above"]),
        ([{"axis": "heads", "to": 9}], ["axes.heads", "9", "--to 8"]),
        ([{"axis": "head_dim", "factor": 2}], ["head_dim", "rotary", "ffn"]),
        ([{"axis": "fnn", "factor": 2}], ["axes.fnn", "did you mean 'ffn'"]),
        ([{"axis": "ffn", "factor": 2}, {"axis": "expert_ffn", "factor": 2}], ["the same axis"]),
    ],
)
def test_refusals_name_field_value_and_remedy(axes: list[dict[str, Any]], said: list[str]) -> None:
    """Each refusal names the field, what was found, and the nearest thing that works."""
    with pytest.raises(SpecError) as caught:
        grow(*axes)
    for part in said:
        assert part in str(caught.value)


def test_coupled_axes_must_grow_together() -> None:
    """Hidden alone is refused where the class couples it to the heads; together it works."""
    coupled = layout(hidden=AxisInfo(96, True, joint=("heads",)))
    with pytest.raises(SpecError, match="--axis hidden --axis heads --factor 2"):
        grow({"axis": "hidden", "factor": 2}, on=coupled)
    both = grow({"axis": "hidden", "factor": 2}, {"axis": "heads", "factor": 2}, on=coupled)
    assert both == {"hidden": Growth(96, 192), "q_per_kv": Growth(3, 6)}


def test_architecture_multiples() -> None:
    """A size that the architecture cannot have is refused with the next that it can."""
    strict = layout(ffn=AxisInfo(128, True, multiple_of=32))
    with pytest.raises(SpecError, match="--to 160"):
        grow({"axis": "ffn", "to": 150}, on=strict)


def test_rounding_does_not_multiply_what_was_asked_for() -> None:
    """A narrow axis is no place for ``--multiple-of 64``; the way out that is named gives what was asked."""
    narrow = layout(mamba_expand=AxisInfo(2, widenable=True))
    with pytest.raises(SpecError, match="more than twice") as caught:
        grow({"axis": "mamba_expand", "factor": 1.5}, on=narrow, multiple_of=64)
    assert (caught.value.hint or "").endswith("--axis mamba_expand --to 3")
    assert grow({"axis": "mamba_expand", "to": 3}, on=narrow, multiple_of=64) == {
        "mamba_expand": Growth(2, 3)
    }


def test_an_inner_width_of_few_layers_is_said() -> None:
    """``ffn`` of three dense layers of sixty is not what is meant by widening the MLPs."""
    deep = replace(
        layout(
            ffn=AxisInfo(18, widenable=True),
            expert_ffn=AxisInfo(2, widenable=True),
            experts=AxisInfo(256),
            layers=AxisInfo(61),
        ),
        tensors=(
            TensorPattern("h.{layers=0-2}.up", "ffn <- hidden"),
            TensorPattern("h.{layers=3-60}.up", "experts | expert_ffn <- hidden"),
        ),
    )
    assert "--axis expert_ffn is probably meant" in (small_share(deep, {"ffn": Growth(18, 36)}) or "")
    assert small_share(deep, {"expert_ffn": Growth(2, 4)}) is None
    assert small_share(deep, {"ffn": Growth(18, 36), "expert_ffn": Growth(2, 4)}) is None
    assert small_share(deep, {"hidden": Growth(7, 14)}) is None


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("layers", "ffn"), {"layers": ("ffn",)}),
        (("layers", "ffn", "hidden"), {"layers": ("ffn",)}),
        (("experts", "expert_ffn"), {"experts": ("expert_ffn",)}),
        (("experts", "ffn"), {}),
        (("layers", "hidden"), {}),
        (("layers", "experts"), {}),
        (("ffn", "expert_ffn"), {}),
        (("layers",), {}),
    ],
)
def test_copies_inside_what_is_new(axes: tuple[str, ...], expected: dict[str, tuple[str, ...]]) -> None:
    """A new layer or expert has no state: its own axes' copies stay locked, those of the stream do not."""
    tensors = (
        TensorPattern("wte", "vocab | hidden"),
        TensorPattern("h.{layers}.mlp.up", "ffn <- hidden"),
        TensorPattern("h.{layers}.mlp.down", "hidden <- ffn"),
        TensorPattern("h.{layers}.moe.{experts}.up", "expert_ffn <- hidden"),
        TensorPattern("h.{layers}.moe.router", "experts <- hidden"),
    )
    infos = {a: AxisInfo(4, True) for a in ("hidden", "ffn", "expert_ffn", "experts", "layers", "vocab")}
    growth = {axis: Growth(4, 8) for axis in axes}
    assert locked_within(growth, ModelLayout("Toy", infos, tensors)) == expected
    drawn = {axis: Growth(4, 8, copied=axis in ("layers", "experts")) for axis in axes}
    assert "expert_ffn" not in str(locked_within(drawn, ModelLayout("Toy", infos, tensors)))
