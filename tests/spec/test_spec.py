"""Specs from options and files: what is taken and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparkling_cli.errors import SpecError
from sparkling_cli.spec.quantities import parse_bytes
from sparkling_cli.spec.sources import axes_from_options, make_spec, merge, read_spec_file


def test_defaults_are_the_papers() -> None:
    """copy-copy, RMS scaling, asymmetric reset, rho 1.3, 250 steps."""
    spec = make_spec({"axes": [{"axis": "ffn", "factor": 2}]})
    assert (spec.init, spec.scaling, spec.optimizer) == ("copy-copy", "rms", "asymmetric")
    assert (spec.rewarmup.rho, spec.rewarmup.steps) == (1.3, 250)


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".yaml", "axes:\n  - {axis: ffn, factor: 1.5}\nrewarmup:\n  rho: 1.2\n"),
        (".toml", 'axes = [{axis = "ffn", factor = 1.5}]\n[rewarmup]\nrho = 1.2\n'),
        (".json", '{"axes": [{"axis": "ffn", "factor": 1.5}], "rewarmup": {"rho": 1.2}}'),
    ],
)
def test_the_same_spec_from_three_kinds_of_file(tmp_path: Path, suffix: str, text: str) -> None:
    """YAML, TOML and JSON say the same."""
    path = tmp_path / f"spec{suffix}"
    path.write_text(text)
    spec = make_spec(read_spec_file(path))
    assert spec.axes[0].factor == 1.5
    assert spec.rewarmup.rho == 1.2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"axes": [{"axis": "ffn", "factor": 1}]}, ["axes.0.factor", "greater than 1", "found 1"]),
        ({"axes": [{"axis": "ffn", "factor": 0.5}]}, ["axes.0.factor"]),
        ({"axes": [{"axis": "ffn"}]}, ["either a factor or a size"]),
        ({"axes": [{"axis": "ffn", "factor": 2, "to": 8}]}, ["both given"]),
        ({"axes": []}, ["axes"]),
        ({"axes": [{"axis": "ffn", "factor": 2}], "scalng": "rms"}, ["scalng", "no such field", "scaling"]),
        ({"axes": [{"axis": "ffn", "factor": 2, "size": 8}]}, ["size", "no such field", "to"]),
        (
            {"model_type": "llama", "a": 1, "b": 2, "c": 3},
            ["model_type and 3 more: no such fields"],
        ),
        ({"axes": [{"axis": "ffn", "factor": 2}], "rewarmup": {"r": 1}}, ["rewarmup.r", "rho"]),
        ({"axes": [{"axis": "ffn", "factor": 2}], "init": "copy"}, ["init", "copy-copy", "'copy'"]),
        ({"axes": [{"axis": "ffn", "factor": float("nan")}]}, ["axes.0.factor"]),
        ({"axes": [{"axis": "ffn", "factor": 2}], "init": "zero-copy", "scaling": "function"}, ["copy-copy"]),
        ({"axes": [{"axis": "a", "factor": 2}, {"axis": "a", "factor": 2}]}, ["more than once"]),
    ],
)
def test_refusals(data: dict[str, Any], said: list[str]) -> None:
    """Unknown fields, factors <= 1 and contradictions name the field and what is allowed."""
    with pytest.raises(SpecError) as caught:
        make_spec(data)
    for part in said:
        assert part in str(caught.value)


def test_options_pair_up() -> None:
    """One --factor serves all axes; otherwise one each; sizes likewise."""
    assert axes_from_options(["a", "b"], [2.0], []) == [
        {"axis": "a", "factor": 2.0},
        {"axis": "b", "factor": 2.0},
    ]
    assert axes_from_options(["a", "b"], [], [8, 9]) == [{"axis": "a", "to": 8}, {"axis": "b", "to": 9}]
    for wrong in ([["a"], [], []], [["a"], [2.0], [4]], [[], [2.0], []], [["a", "b", "c"], [2.0, 3.0], []]):
        with pytest.raises(SpecError):
            axes_from_options(*wrong)  # type: ignore[arg-type]


def test_options_override_the_file() -> None:
    """Nested fields merge; everything else replaces."""
    base = {"axes": [{"axis": "ffn", "factor": 2}], "rewarmup": {"rho": 1.2, "steps": 10}}
    assert merge(base, {"rewarmup": {"rho": 1.5}})["rewarmup"] == {"rho": 1.5, "steps": 10}


@pytest.mark.parametrize(
    ("name", "text"), [("a.ini", "x"), ("a.yaml", "a: ["), ("a.json", "[1]"), ("a.toml", "=")]
)
def test_bad_files(tmp_path: Path, name: str, text: str) -> None:
    """Unknown kinds, malformed text and non-mappings are refused with the path."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SpecError, match=name):
        make_spec(read_spec_file(path))


def test_sizes() -> None:
    """Memory budgets as people write them."""
    assert [parse_bytes(t, "x") for t in ("512M", "1G", "1.5 GiB", "4096")] == [
        512 << 20,
        1 << 30,
        3 << 29,
        4096,
    ]
    for bad in ("", "0", "-1G", "1X", "G"):
        with pytest.raises(SpecError, match="--memory"):
            parse_bytes(bad, "--memory")
    for few, said in (("1", "found 1, which is 1 byte"), ("2k", "found 2k, which is 2,048 bytes")):
        with pytest.raises(SpecError, match=rf"{said}\b"):
            parse_bytes(few, "--memory", least=16 << 20)
