"""Regions against masks made index by index."""

from __future__ import annotations

import itertools
from math import prod

import pytest

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.parse import parse_layout
from sparkling_cli.layout.regions import Region, region_of
from sparkling_cli.widening.geometry import Growth, Treatment, view_of
from tests.widening.whole import new_entries

BEFORE = {"ffn": 4, "hidden": 3, "kv_heads": 2, "q_per_kv": 2, "head_dim": 2, "heads": 3, "experts": 2}
GROWTH = {"ffn": Growth(4, 7), "hidden": Growth(3, 5), "q_per_kv": Growth(2, 3), "kv_heads": Growth(2, 3)}

LAYOUTS = [
    ("ffn <- hidden", ["ffn"]),
    ("ffn <- hidden", ["ffn", "hidden"]),
    ("hidden -> ffn", ["ffn", "hidden"]),
    ("(gate_up ffn) <- hidden", ["ffn", "hidden"]),
    ("(ffn gate_up) <- hidden", ["ffn"]),
    ("experts | (gate_up ffn) <- hidden", ["ffn", "hidden"]),
    ("(kv_heads q_per_kv head_dim) <- hidden", ["q_per_kv"]),
    ("hidden <- (kv_heads q_per_kv head_dim)", ["q_per_kv", "kv_heads", "hidden"]),
    ("((q:heads + k:kv_heads + v:kv_heads) head_dim) <- hidden", ["kv_heads", "hidden"]),
    ("bias ffn", ["ffn"]),
    ("scale hidden", ["hidden"]),
    ("scale hidden", ["ffn"]),
]


def stage_map(region: Region) -> dict[tuple[int, ...], int]:
    """Stage of every index of the view, as the boxes say; every index lies in exactly one box."""
    found: dict[tuple[int, ...], int] = {}
    for stage in region.stages:
        for box in region.boxes(stage):
            for index in itertools.product(*(range(a, b) for a, b in box)):
                assert index not in found, "boxes overlap"
                found[index] = stage
    assert len(found) == prod(region.view), "boxes leave a gap"
    return found


def births_of(axes: list[str]) -> dict[str, list[list[int]]]:
    """One expansion of some axes."""
    return {a: [[0, GROWTH[a].source, 0], [GROWTH[a].source, GROWTH[a].target, 1]] for a in axes}


@pytest.mark.parametrize(("text", "axes"), LAYOUTS)
def test_new_entries_are_those_that_widening_made(text: str, axes: list[str]) -> None:
    """The boxes of stage 1 are exactly the entries that the widening's own view calls new."""
    layout = parse_layout(text)
    growth = {a: GROWTH[a] for a in axes}
    after = {**BEFORE, **{a: g.target for a, g in growth.items()}}
    region = region_of(layout, after, births_of(axes))
    mask = new_entries(view_of(layout, BEFORE, growth, Treatment())).flatten()
    stages = stage_map(region)
    flat = [stages[i] for i in itertools.product(*map(range, region.view))]
    assert flat == mask.int().tolist()
    assert region.count(1) == int(mask.sum())


def test_two_expansions_make_frames() -> None:
    """An entry is as old as its youngest index, over several expansions of different axes."""
    births = {"ffn": [[0, 4, 0], [4, 8, 1], [8, 12, 3]], "hidden": [[0, 3, 0], [3, 5, 2]]}
    sizes = {"ffn": 12, "hidden": 5}
    region = region_of(parse_layout("ffn <- hidden"), sizes, births)
    ages_ffn = [0] * 4 + [1] * 4 + [3] * 4
    ages_hidden = [0] * 3 + [2] * 2
    for (i, j), stage in stage_map(region).items():
        assert stage == max(ages_ffn[i], ages_hidden[j])
    assert region.stages == (0, 1, 2, 3)


@pytest.mark.parametrize(("text", "axes"), LAYOUTS)
def test_a_part_has_the_stages_of_its_indices(text: str, axes: list[str]) -> None:
    """Any choice of indices per storage dim, cut across factors too, keeps every entry's stage."""
    layout = parse_layout(text)
    after = {**BEFORE, **{a: GROWTH[a].target for a in axes}}
    region = region_of(layout, after, births_of(axes))
    whole = stage_map(region)
    by_flat = [whole[i] for i in itertools.product(*map(range, region.view))]
    chosen = [list(range(size))[1::2] if size > 2 else None for size in region.shape]
    part = stage_map(region.take(chosen))
    got = [part[i] for i in sorted(part)]
    kept = [range(s) if c is None else c for s, c in zip(region.shape, chosen, strict=True)]
    strides = [prod(region.shape[d + 1 :]) for d in range(len(region.shape))]
    wanted = [
        by_flat[sum(i * s for i, s in zip(index, strides, strict=True))] for index in itertools.product(*kept)
    ]
    assert got == wanted


def test_an_empty_part_has_no_entries() -> None:
    """A process that holds no rows holds no new ones."""
    region = region_of(parse_layout("ffn <- hidden"), {"ffn": 7, "hidden": 3}, births_of(["ffn"]))
    assert region.take([[], None]).count(1) == 0


@pytest.mark.parametrize("births", [[[0, 4, 0]], [[0, 4, 0], [5, 7, 1]], [[0, 4, 0], [4, 8, 1]]])
def test_births_that_do_not_tile_are_refused(births: list[list[int]]) -> None:
    """A history that does not fit the axis's size is an error that names the axis."""
    with pytest.raises(LayoutError, match="ffn"):
        region_of(parse_layout("bias ffn"), {"ffn": 7}, {"ffn": births})
