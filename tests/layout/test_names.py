"""Many names looked at together give what each gives alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.model import PatternTable, TensorPattern
from sparkling_cli.layout.names import skeleton, skeletons

PARTS = st.sampled_from(
    ["layers", "0", "17", "w1", "w2", "007", "", "*", "٣", "a\nb", "mlp", "1\n2", "\ud800"]
)
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=5).map(".".join), max_size=8)


@given(NAMES)
def test_skeletons_together_and_alone(names: list[str]) -> None:
    """Digits between dots, digits elsewhere, other scripts' digits, line breaks, lone surrogates."""
    assert skeletons(names) == [skeleton(name) for name in names]


TABLE = PatternTable(
    TensorPattern(name, "hidden")
    for name in ("a.{layers}.w1", "a.{layers=0,2}.w2", "a.{layers=1}.w2", "a.3.w3", "b.{layers}", "c")
)


@given(NAMES)
def test_patterns_together_and_alone(names: list[str]) -> None:
    """Also names that have a star where a pattern has a placeholder."""
    for name in ["a.7.w1", "a.1.w2", "a.2.w2", "a.3.w3", "b.0", "c", *names]:
        try:
            alone = TABLE.find(name)
        except LayoutError as error:
            with pytest.raises(LayoutError) as together:
                TABLE.find_all([name])
            assert together.value.message == error.message
        else:
            assert TABLE.find_all(["c", name]) == [TABLE.find("c"), alone]


@pytest.mark.parametrize("name", ["b.*", "a.*.w1", "a.3.w2", "a.4.w3", "b.x"])
def test_names_that_only_look_like_a_pattern(name: str) -> None:
    """A star is no number, and a number may be one that the pattern leaves out."""
    with pytest.raises(LayoutError, match="no pattern"):
        TABLE.find_all([name])
