"""``--json`` of every command validates against its published schema."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sparkling_cli.cli.app import app
from sparkling_cli.layout.file import to_toml
from tests.compute.paper import PAPER_LAYOUT

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "docs" / "reference" / "schemas"


def validate(document: Any, name: str) -> None:
    """Against the schema as published; unknown fields are errors."""
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(document)


def run(*arguments: str | Path) -> Any:
    """The JSON that a command prints; stdout holds nothing else."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def widened(tmp_path_factory: pytest.TempPathFactory, dense_checkpoint: Path) -> tuple[Path, Any]:
    """An output and what ``expand --json`` said."""
    target = tmp_path_factory.mktemp("json") / "wide"
    return target, run("expand", dense_checkpoint, target, "--axis", "ffn", "--to", 252)


def test_expand(widened: tuple[Path, Any]) -> None:
    """The document of the command, and the files that it wrote."""
    target, document = widened
    validate(document, "expand")
    for name in ("manifest", "report", "rewarmup"):
        validate(json.loads((target / "sparkling" / f"{name}.json").read_text()), f"{name}-file")


def test_expand_says_what_its_report_says(widened: tuple[Path, Any]) -> None:
    """Apart from the three fields of every command, they are the same facts."""
    target, document = widened
    report = json.loads((target / "sparkling" / "report.json").read_text())
    assert {k: v for k, v in document.items() if k not in ("schema", "schema_version", "dry_run")} == report


def arrays(value: Any) -> Iterator[Any]:
    """All tensors and arrays in nested containers."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from arrays(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from arrays(item)


def test_the_account_is_the_sources(widened: tuple[Path, Any], dense_checkpoint: Path) -> None:
    """Dry run, report and manifest have one account; its sum is what the files' own libraries find."""
    target, document = widened
    dry = run("expand", dense_checkpoint, target.parent / "no", "--axis", "ffn", "--to", 252, "--dry-run")
    manifest = json.loads((target / "sparkling" / "manifest.json").read_text())
    assert dry["account"] == document["account"] == manifest["account"]
    found = list(load_file(dense_checkpoint / "model.safetensors").values())
    for path in (*dense_checkpoint.glob("*.pt"), *dense_checkpoint.glob("*.pth")):
        found += arrays(torch.load(path, weights_only=False))
    lines = document["account"]["lines"]
    assert sum(line["tensors"] for line in lines) == len(found)
    assert sum(line["bytes_before"] for line in lines) == sum(item.nbytes for item in found)


def test_dry_run(dense_checkpoint: Path, tmp_path: Path) -> None:
    """The plan; nothing is written."""
    document = run("expand", dense_checkpoint, tmp_path / "no", "--axis", "ffn", "--factor", "2", "--dry-run")
    validate(document, "expand-plan")
    assert list(tmp_path.iterdir()) == []


def test_verify(widened: tuple[Path, Any], dense_checkpoint: Path) -> None:
    """A verification that found nothing wrong."""
    validate(run("verify", dense_checkpoint, widened[0]), "verify")


def test_schedule(widened: tuple[Path, Any]) -> None:
    """A selection of steps, and every step of a range."""
    validate(run("schedule", widened[0]), "schedule")
    document = run("schedule", widened[0], "--steps", "590:610")
    validate(document, "schedule")
    assert [point["step"] for point in document["curve"]] == list(range(590, 611))
    assert [point["new"][0] is None for point in document["curve"]] == [
        step < 600 for step in range(590, 611)
    ]


def test_inspect(widened: tuple[Path, Any], dense_checkpoint: Path) -> None:
    """Alone, without activations, and against another one."""
    short = ("--sequences", "2", "--length", "32")
    validate(run("inspect", dense_checkpoint, *short), "inspect")
    validate(run("inspect", dense_checkpoint, "--no-activations"), "inspect")
    validate(run("inspect", widened[0], "--against", dense_checkpoint, *short), "inspect")


def test_plan(tmp_path: Path) -> None:
    """From a config and a layout file."""
    layout = tmp_path / "paper.toml"
    layout.write_text(to_toml(PAPER_LAYOUT))
    config = ROOT / "docs" / "examples" / "paper-config.json"
    arguments = ("-a", "ffn", "-f", "2", "--expand-at", "100B", "--then", "hidden=2@150B")
    validate(run("plan", config, "--tokens", "200B", *arguments, "--layout", layout), "plan")


def test_layout(dense_checkpoint: Path) -> None:
    """The layout of a checkpoint."""
    validate(run("layout", dense_checkpoint), "layout")


def test_errors(tmp_path: Path) -> None:
    """A failing command prints the error document on stdout and leaves with its number."""
    done = subprocess.run(
        [sys.executable, "-m", "sparkling_cli", "schedule", str(tmp_path), "--json"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    document = json.loads(done.stdout)
    validate(document, "error")
    assert done.returncode == document["exit_code"] == 4
    assert done.stderr == ""


@pytest.mark.slow
def test_architectures() -> None:
    """One class is enough; an unknown field anywhere in it is an error."""
    document = run("architectures", "llama")
    validate(document, "architectures")
    row = document["architectures"][0]
    for changed in ({**row, "unknown": 1}, {**row, "axes": [{**row["axes"][0], "proved": "yes"}]}):
        with pytest.raises(jsonschema.ValidationError):
            validate({**document, "architectures": [changed]}, "architectures")


def test_the_schema_refuses_what_is_not_of_it(dense_checkpoint: Path, tmp_path: Path) -> None:
    """An unknown field or a wrong type is found, so that the checks above can fail."""
    document = run("expand", dense_checkpoint, tmp_path / "no", "--axis", "ffn", "--factor", "2", "--dry-run")
    for change in ({"unknown": 1}, {"tensors": "many"}, {"schema_version": 2}):
        with pytest.raises(jsonschema.ValidationError):
            validate({**document, **change}, "expand-plan")
