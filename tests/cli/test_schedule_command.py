"""``sparkling schedule`` and ``inspect --plot``: curves for people, as tables and pictures."""

from __future__ import annotations

from math import cos, pi
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from sparkling_cli import api
from sparkling_cli.cli.app import app
from sparkling_cli.errors import CheckpointError, OutputError, SpecError


@pytest.fixture(scope="module")
def widened(tmp_path_factory: pytest.TempPathFactory, dense_checkpoint: Path) -> Path:
    """A widened checkpoint: expansion at step 600 of 1200, cosine from 4e-3 with 36 steps of warmup."""
    target = tmp_path_factory.mktemp("schedule") / "wide"
    axes = [{"axis": "ffn", "factor": 2}]
    api.expand(dense_checkpoint, target, axes=axes, rewarmup={"steps": 100}, report="none")
    return target


def shown(*arguments: str | Path) -> str:
    """What the command prints for people."""
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def eta_old(step: int) -> float:
    """Eq. 25-26 of the bundled run."""
    return 4e-3 * (1 + cos(pi * (step - 36) / (1200 - 36))) / 2


def test_the_table_holds_the_equations_numbers(widened: Path) -> None:
    """Old by Eq. 26, new by Eq. 27-28, their ratio; worked out here."""
    rows = [line.split() for line in shown("schedule", widened, "--steps", "600:720").splitlines()]
    found = {int(r[0]): [float(x) for x in r[1:4]] for r in rows if len(r) == 4 and r[0].isdigit()}
    start = eta_old(600)
    assert set(range(600, 721)) <= set(found)
    for step in (600, 650, 700, 720):
        if step <= 700:
            new = start + 0.3 * start * (step - 600) / 100
        else:
            new = 1.3 * start * (1 + cos(pi * (step - 700) / 500)) / 2
        assert found[step][0] == pytest.approx(eta_old(step), rel=1e-4)
        assert found[step][1] == pytest.approx(new, rel=1e-4)
        assert found[step][2] == pytest.approx(new / eta_old(step), abs=6e-4)


def test_the_json_file_itself_can_be_given(widened: Path) -> None:
    """The directory and its rewarmup.json say the same."""
    assert shown("schedule", widened) == shown("schedule", widened / "sparkling" / "rewarmup.json")


@pytest.mark.parametrize("steps", ["7", "a:b", "700:600", "0:1201", "-5:3"])
def test_ranges_that_are_none_are_refused(steps: str, widened: Path) -> None:
    """The message says what the range may be."""
    with pytest.raises(SpecError, match="1200"):
        CliRunner().invoke(app, ["schedule", str(widened), f"--steps={steps}"], catch_exceptions=False)


def test_a_checkpoint_without_a_schedule_is_an_error(dense_checkpoint: Path) -> None:
    """Nothing is made up for a checkpoint that was never widened."""
    with pytest.raises(CheckpointError, match="re-warmup"):
        CliRunner().invoke(app, ["schedule", str(dense_checkpoint)], catch_exceptions=False)


def test_pictures_of_the_schedule(widened: Path, tmp_path: Path) -> None:
    """An SVG that parses; an unknown ending is refused and nothing written."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "schedule.svg"
    shown("schedule", widened, "--plot", picture)
    ElementTree.parse(picture)
    with pytest.raises(OutputError, match="gif"):
        CliRunner().invoke(
            app, ["schedule", str(widened), "--plot", str(tmp_path / "x.gif")], catch_exceptions=False
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["schedule.svg"]


def test_pictures_of_activations(widened: Path, dense_checkpoint: Path, tmp_path: Path) -> None:
    """One model alone, and two on the same tokens; without activations there is nothing to draw."""
    pytest.importorskip("matplotlib")
    short = ("--sequences", "2", "--length", "32", "--plot")
    for name, more in (("alone", ()), ("both", ("--against", str(dense_checkpoint)))):
        picture = tmp_path / f"{name}.svg"
        shown("inspect", widened, *more, *short, picture)
        text = picture.read_text()
        assert "residual stream" in text
        ElementTree.parse(picture)
    with pytest.raises(SpecError, match="nothing to draw"):
        CliRunner().invoke(
            app,
            ["inspect", str(widened), "--no-activations", "--plot", str(tmp_path / "x.png")],
            catch_exceptions=False,
        )
