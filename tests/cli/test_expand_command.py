"""The ``expand`` command: what it prints, what it refuses, and how it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from sparkling_cli.cli.app import app
from sparkling_cli.cli.console import run


class Result(NamedTuple):
    """How an invocation ended."""

    code: int
    out: str
    err: str


class Command:
    """Runs the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Result:
        """Run with these arguments."""
        self.monkeypatch.setattr(sys, "argv", ["sparkling", *map(str, arguments)])
        self.capsys.readouterr()
        code = run(app)
        out, err = self.capsys.readouterr()
        return Result(code, out, err)


@pytest.fixture
def sparkling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line."""
    monkeypatch.setenv("COLUMNS", "120")
    return Command(monkeypatch, capsys)


def test_dry_run_shows_the_plan_and_writes_nothing(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path
) -> None:
    """Sizes, scale and config change are on the screen; the destination does not exist."""
    target = tmp_path / "wide"
    done = sparkling("expand", dense_checkpoint, target, "--axis", "ffn", "--factor", 2, "--dry-run")
    assert done.code == 0, done.err
    for part in ("168", "336", "96x336", "0.5", "intermediate_size = 336", "Nothing was written"):
        assert part in done.out
    assert list(tmp_path.iterdir()) == []


def test_json_holds_the_same_facts_and_nothing_else(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path
) -> None:
    """One JSON document on stdout; activations before and after are in it."""
    done = sparkling("expand", dense_checkpoint, tmp_path / "w", "--axis", "ffn", "--factor", 2, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["axes"][0] == {"axis": "ffn", "before": 168, "after": 336, "original": 168}
    assert facts["activations"]["loss_after"] == pytest.approx(facts["activations"]["loss_before"], abs=1e-4)
    assert facts["verdict"]["level"] == "good"
    assert done.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--axis", "ffm", "--factor", "2"], 3, ["axes.ffm", "did you mean 'ffn'"]),
        (["--axis", "ffn", "--factor", "1"], 3, ["axes.0.factor", "greater than 1"]),
        (["--axis", "ffn", "--factor", "1.001"], 3, ["168.168", "nearest size is --to 169"]),
        (["--axis", "ffn", "--factor", "1.01"], 3, ["169.68", "--to 169", "--to 170"]),
        (["--axis", "head_dim", "--factor", "2"], 3, ["head_dim", "rotary"]),
        (["--axis", "heads", "--to", "7"], 3, ["7 query heads", "2 key/value heads"]),
        (["--axis", "ffn"], 3, ["--factor or --to"]),
        ([], 3, ["axes"]),
        (["--axis", "ffn", "--factor", "2", "--init", "kopy"], 3, ["init", "kopy", "copy-copy"]),
        (["--axis", "ffn", "--factor", "2", "--memory", "lots"], 3, ["--memory"]),
        (["--axis", "ffn", "--factor", "2", "--report", "some"], 3, ["report", "some"]),
        (["--axis", "ffn", "--factor", "2", "--layout", "none.toml"], 5, ["none.toml"]),
        (["--axis", "ffn", "--factor", "2", "--nope"], 2, ["--nope"]),
        (["--axis", "ffn", "--factor", "two"], 2, ["--factor", "number"]),
    ],
)
def test_refusals(
    sparkling: Command,
    dense_checkpoint: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    said: list[str],
) -> None:
    """Each has its exit code and names what is wrong; there is no traceback and no output."""
    done = sparkling("expand", dense_checkpoint, tmp_path / "wide", *arguments)
    assert done.code == code
    message = " ".join(done.err.split())
    for part in said:
        assert part in message
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_errors_as_json(sparkling: Command, tmp_path: Path) -> None:
    """With --json an error is a document too."""
    done = sparkling("expand", tmp_path / "missing", "--axis", "ffn", "--factor", 2, "--json")
    facts = json.loads(done.out)
    assert done.code == facts["exit_code"] == 4
    assert facts["schema"] == "sparkling/error"


def test_an_existing_destination_is_refused(
    sparkling: Command, dense_checkpoint: Path, tmp_path: Path
) -> None:
    """Nothing that exists is overwritten."""
    (tmp_path / "keep.txt").write_text("mine")
    done = sparkling("expand", dense_checkpoint, tmp_path, "--axis", "ffn", "--factor", 2)
    assert done.code == 7
    assert (tmp_path / "keep.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]


def test_a_spec_file_and_options(sparkling: Command, dense_checkpoint: Path, tmp_path: Path) -> None:
    """Options override the file."""
    spec = tmp_path / "spec.yaml"
    spec.write_text("axes: [{axis: ffn, to: 200}]\nseed: 4\n")
    wide = tmp_path / "wide"
    done = sparkling("expand", dense_checkpoint, wide, "--spec", spec, "--seed", 5, "--dry-run", "--json")
    facts = json.loads(done.out)
    assert facts["axes"] == {"ffn": {"before": 168, "after": 200}}
    assert facts["spec"]["seed"] == 5


def test_layout_prints_what_layout_accepts(sparkling: Command, moe_checkpoint: Path, tmp_path: Path) -> None:
    """The printed layout, passed back, gives the same plan."""
    printed = sparkling("layout", moe_checkpoint)
    assert printed.code == 0, printed.err
    file = tmp_path / "layout.toml"
    file.write_text(printed.out)
    arguments = [
        "expand",
        moe_checkpoint,
        tmp_path / "w",
        "--axis",
        "hidden",
        "--factor",
        2,
        "--dry-run",
        "--json",
    ]
    plain = json.loads(sparkling(*arguments).out)
    given = json.loads(sparkling(*arguments, "--layout", file).out)
    assert given["kinds"] == plain["kinds"]


def test_piped_output_has_no_escape_codes(dense_checkpoint: Path, tmp_path: Path) -> None:
    """A pipe gets plain text, and so does NO_COLOR."""
    command = [sys.executable, "-m", "sparkling_cli", "expand", str(dense_checkpoint), str(tmp_path / "w")]
    done = subprocess.run(
        [*command, "--axis", "ffn", "--factor", "2", "--dry-run"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
