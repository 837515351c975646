"""The package as it is used from Python: its names, what its objects look like, its errors; the notebook."""

from __future__ import annotations

import ast
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import typer

import sparkling_cli
from sparkling_cli import SparklingError
from sparkling_cli.cli.app import app
from sparkling_cli.spec.options import OPTIONS, from_keywords, keyword_of, python_words
from sparkling_cli.spec.sources import make_spec
from tests.docs.blocks import ROOT


def test_dir_is_the_public_names() -> None:
    """And no module of the package's inside."""
    assert dir(sparkling_cli) == sorted(sparkling_cli.__all__)
    assert callable(sparkling_cli.expand) and sparkling_cli.expand.__doc__
    assert sparkling_cli.expand is sparkling_cli.expand


@pytest.mark.parametrize(
    ("given", "axes"),
    [
        ({"axis": "ffn", "factor": 2}, [("ffn", 2.0, None)]),
        ({"axis": ["ffn", "hidden"], "factor": 2}, [("ffn", 2.0, None), ("hidden", 2.0, None)]),
        ({"axis": ["ffn", "hidden"], "to": [8, 9]}, [("ffn", None, 8), ("hidden", None, 9)]),
        ({"axes": {"ffn": 2, "hidden": 1.5}}, [("ffn", 2.0, None), ("hidden", 1.5, None)]),
        ({"axes": [{"axis": "ffn", "to": 8}]}, [("ffn", None, 8)]),
    ],
)
def test_axes_are_written_as_is_natural(given: dict[str, Any], axes: list[tuple[Any, ...]]) -> None:
    """A name and a factor, a dictionary of factors, or the spec's own list."""
    spec = make_spec(from_keywords(given))
    assert [(a.axis, a.factor, a.to) for a in spec.axes] == axes


def test_every_option_of_the_spec_is_a_keyword() -> None:
    """By its own name, wherever the spec keeps it."""
    known = {flag for param in typer.main.get_command(app).commands["expand"].params for flag in param.opts}
    for options in OPTIONS.values():
        assert set(options.values()) <= known
    spec = make_spec(
        from_keywords(
            {"axes": {"ffn": 2}, "rewarmup_steps": 10, "rho": 1.2, "schedule": "wsd", "peak_lr": 1e-3}
        )
    )
    assert (spec.rewarmup.steps, spec.rewarmup.rho) == (10, 1.2)
    assert (spec.baseline.type, spec.baseline.peak) == ("wsd", 1e-3)
    assert keyword_of("--bias-correction") == "bias_correction"


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("add --factor 2", "add factor=2"),
        ("the nearest that works is --axis heads --to 8", 'the nearest that works is axis="heads", to=8'),
        ("use --optimizer asymmetric (the default)", 'use optimizer="asymmetric" (the default)'),
        ("add --allow-locked for an experiment", "add allow_locked=True for an experiment"),
        ("--memory: 1 is 1 bytes", "memory: 1 is 1 bytes"),
        ("pass --data with your own tokens", "pass data with your own tokens"),
        ("give a layout file (--layout FILE)", "give a layout file (layout=FILE)"),
        ("run `sparkling schedule wide --write`", "run `sparkling schedule wide --write`"),
    ],
)
def test_messages_in_the_words_of_a_call(text: str, python: str) -> None:
    """Options become keywords; whole command lines stay."""
    assert python_words(text) == python


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ['axis="ffn", factor=2']),
        ({"axis": "ffn"}, ["neither given"]),
        ({"factor": 2}, ['axis="ffn", factor=2']),
        ({"axis": "ffn", "axes": {"ffn": 2}}, ["give one of them"]),
        ({"axis": ["ffn"], "factor": [2, 3]}, ["1 axes but 2 values"]),
        ({"axis": "ffn", "factor": 2, "optimizer": "drop"}, ['init="zero-copy"', "allow_locked=True"]),
        ({"axis": "ffn", "factor": 2, "data": "nope.txt"}, ["nope.txt"]),
        ({"axis": "ffn", "factor": 2, "memory": "1"}, ["memory"]),
    ],
)
def test_errors_speak_python(
    dense_checkpoint: Path, tmp_path: Path, options: dict[str, Any], parts: list[str]
) -> None:
    """What to write instead is a keyword; no option of the command line is named."""
    with pytest.raises(SparklingError) as caught:
        sparkling_cli.expand(str(dense_checkpoint), str(tmp_path / "w"), **options)
    text = str(caught.value)
    for part in parts:
        assert part in text
    assert not re.search(r"(?<!\w)--\w", text) and "Tuple" not in text


def test_the_same_is_asked_for_in_several_ways(dense_checkpoint: Path, tmp_path: Path) -> None:
    """Keywords, a pair in a text, fields, a file of them; ``make_plan`` has the order of ``expand``."""
    (tmp_path / "spec.yaml").write_text("axes: {ffn: 2}\ncarry: rng_state.pth*\n")
    fields = {"axis": "ffn", "factor": 2, "carry": "rng_state.pth*"}
    wanted = sparkling_cli.make_plan(dense_checkpoint, tmp_path / "w", **fields)  # type: ignore[arg-type]
    assert wanted.destination == tmp_path / "w" and wanted.plan.spec.carry == ("rng_state.pth*",)
    for asked in (fields, {"axis": "ffn=2", "carry": ["rng_state.pth*"]}, tmp_path / "spec.yaml"):
        assert sparkling_cli.make_plan(dense_checkpoint, tmp_path / "w", asked).plan.spec == wanted.plan.spec


def test_a_run_is_planned_as_by_the_command(dense_checkpoint: Path) -> None:
    """Numbers or texts; by hand: twice the ffn for the second half, C = 6 N D."""
    plan = sparkling_cli.plan_run(str(dense_checkpoint), 2e11, axis="ffn", factor=2, expand_at="50%")
    assert plan == sparkling_cli.plan_run(dense_checkpoint, "200B", axes={"ffn": 2}, expand_at=1e11)
    small, wide = (phase.parameters for phase in plan.phases)
    assert wide - small == 3 * 3 * 96 * 168
    assert plan.saved == pytest.approx((wide - small) / wide / 2)
    for given, said in (({"axis": "ffn", "factor": 2}, "expand_at"), ({"seed": 1}, "seed")):
        with pytest.raises(SparklingError, match=said):
            sparkling_cli.plan_run(dense_checkpoint, "200B", **given)  # type: ignore[arg-type]


def test_a_commands_name_leads_to_the_function() -> None:
    """Where it has another name here; as it is asked for in a fresh interpreter."""
    for name, function in (("plan", "make_plan"), ("layout", "layout_of"), ("widen", "expand")):
        with pytest.raises(AttributeError, match=function):
            sparkling_cli.__getattr__(name)


def test_objects_are_a_line(dense_checkpoint: Path, tmp_path: Path) -> None:
    """A plan, a result, a report, a layout, statistics: short for any model; paths may be text."""
    plan = sparkling_cli.make_plan(str(dense_checkpoint), axis="ffn", factor=2)
    result = sparkling_cli.expand(str(dense_checkpoint), str(tmp_path / "w"), axis="ffn", factor=2)
    found = sparkling_cli.inspect(str(dense_checkpoint), activations=False)
    layout = sparkling_cli.layout_of(str(dense_checkpoint))
    for thing in (plan, plan.plan, plan.plan.source, layout, result, result.report, found, found.weights):
        for text in (repr(thing), str(thing)):
            assert len(text) < 250, text
    assert "ffn 168 to 336" in repr(plan)
    assert result.report is not None and result.report.verdict.headline in repr(result)
    page = result._repr_html_()
    assert page is not None and page.startswith("<iframe srcdoc=") and "Ready to train on" in page
    assert page.count('"') == 4  # what the page holds does not end the attribute


def test_statistics_are_plain_data(dense_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``to_dict`` is JSON's data; ``to_pandas`` gives pandas a row per entry, or says what is missing."""
    weights = sparkling_cli.inspect(dense_checkpoint, activations=False).weights
    assert json.loads(json.dumps(weights.to_dict()))["tensors"][0]["role"]
    stand_in = types.ModuleType("pandas")
    stand_in.DataFrame = list  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", stand_in)
    rows = weights.to_pandas()
    assert len(rows) == len(weights.tensors) and rows[0]["entries"] == weights.tensors[0].entries
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SparklingError, match="pip install pandas"):
        weights.to_pandas()


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell as in Jupyter: the last expression of a cell is what it shows."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs" / "examples" / "widen.ipynb").read_text())
    names: dict[str, Any] = {}
    shown: list[Any] = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    html = [thing._repr_html_() for thing in shown if hasattr(thing, "_repr_html_")]
    assert len(html) == 1 and "Ready to train on" in html[0]
    assert any(type(thing).__name__ == "Symmetry" and thing.locked == 1.0 for thing in shown)
    assert (tmp_path / "runs" / "notebook" / "wide" / "sparkling" / "report.html").exists()
