"""JSON files are rewritten with only the asked changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.directory import rewritten_json

SOURCE = """{
  "zeta": 1e-05,
  "hidden_size": 64,
  "big": 1E6,
  "text": {"b": [1, 2.50], "a": null},
  "odd": NaN,
  "name": "né\\"\\n"
}
"""


def test_only_the_value_changes() -> None:
    """Order, unknown keys, other numbers' spelling and the last newline stay."""
    source = json.dumps(json.loads(SOURCE.replace("1E6", "6")), indent=2, ensure_ascii=False) + "\n"
    found = rewritten_json(source, {"hidden_size": 128}, "config.json")
    assert found == source.replace('"hidden_size": 64', '"hidden_size": 128')
    assert '"zeta": 1e-05' in found and "NaN" in found


def test_numbers_keep_their_spelling() -> None:
    """Even where Python would write another one."""
    found = rewritten_json(SOURCE, {"text.a": 5}, "config.json")
    assert '"big": 1E6' in found and "2.50" in found and '"zeta": 1e-05' in found
    assert json.loads(found)["text"] == {"b": [1, 2.5], "a": 5}
    assert list(json.loads(found)) == list(json.loads(SOURCE))


def test_nothing_to_change_changes_nothing() -> None:
    """Without changes the text is the source's, whatever its style."""
    assert rewritten_json(SOURCE, {}, "config.json") == SOURCE


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_indentation_stays(indent: Any, end: str) -> None:
    """The style of Python's own writer is kept for every indentation."""
    value = {"a": {"b": [1, 2], "c": {}}, "d": 3}
    source = json.dumps(value, indent=indent) + end
    expected = json.dumps({**value, "d": 4}, indent=indent) + end
    assert rewritten_json(source, {"d": 4}, "x") == expected


def test_compact_style_stays() -> None:
    """Also without any blanks."""
    assert rewritten_json('{"a":1,"b":[2,3]}', {"a": 2}, "x") == '{"a":2,"b":[2,3]}'


def test_new_keys() -> None:
    """A new key goes to its place among sorted keys, else to the end; list entries are numbered."""
    assert rewritten_json('{"a": 1, "c": 2}', {"b": 3}, "x") == '{"a": 1, "b": 3, "c": 2}'
    assert rewritten_json('{"c": 1, "a": 2}', {"b": 3}, "x") == '{"c": 1, "a": 2, "b": 3}'
    assert rewritten_json('{"a": [1, {"b": 2}]}', {"a.1.b": 3, "a.0": 4}, "x") == '{"a": [4, {"b": 3}]}'


@pytest.mark.parametrize("dotted", ["b.c", "a.c", "a.b.c"])
def test_paths_that_lead_nowhere(dotted: str) -> None:
    """Keys below something that is no object, or is not there."""
    with pytest.raises(CheckpointError, match="x: "):
        rewritten_json('{"a": {"b": 1}, "d": 2}' if dotted != "a.c" else '{"a": 1}', {dotted: 1}, "x")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), _VALUES, max_size=4))
def test_other_values_survive(value: dict[str, Any]) -> None:
    """Whatever else a file holds, parsing the result gives it back."""
    source = json.dumps(value, indent=2)
    found = json.loads(rewritten_json(source, {"changed": 7}, "x"))
    assert found == {**value, "changed": 7}
