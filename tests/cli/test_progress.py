"""What a long command says while it runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparkling_cli.report import progress
from tests.docs.blocks import ROOT


def test_a_log_has_a_line_at_each_stage_and_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line at once, then one per interval with what is done and left, whether it moves or not."""
    monkeypatch.setattr(progress, "EVERY", 0.2)
    with progress.log("writing", 8 << 20) as advance:
        advance(2 << 20)
        time.sleep(0.5)
    with progress.log("planning", None):
        time.sleep(0.3)
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "writing 8.0 MiB"
    assert re.fullmatch(r"writing 2.0 MiB of 8.0 MiB \(25%\), \d+ s gone, \d+ s left", lines[1])
    assert progress._state("writing", 9 << 20, 8 << 20, 40.0) == "writing 8.0 MiB done, 40 s gone, finishing"
    planning = lines[next(i for i, line in enumerate(lines) if line == "planning") :]
    assert re.fullmatch(r"planning, \d+ s gone", planning[1])


def test_one_process_of_a_job_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of torchrun is silent."""
    monkeypatch.setenv("RANK", "1")
    with progress.log("writing", 1) as advance:
        advance(1)
    assert capsys.readouterr().err == ""


def test_an_expansion_without_a_terminal_is_followed_by_its_log(
    dense_checkpoint: Path, tmp_path: Path
) -> None:
    """Every stage, on stderr; measuring has a total; nothing of it for machines or with --quiet."""

    def run(*more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "sparkling_cli", "expand", str(dense_checkpoint), *more, "-a", "ffn=2"],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return done.stderr

    stages = re.findall(r"^\d\d:\d\d:\d\d (.*)$", run(str(tmp_path / "a")), flags=re.M)
    assert [stage.split(" ")[0] for stage in stages] == ["planning", "writing", "building", "measuring"]
    assert all(re.search(r"[\d.]+ MiB$", stages[i]) for i in (1, 3))
    assert "writing" not in run(str(tmp_path / "b"), "--quiet", "--report", "none")
    assert run(str(tmp_path / "c"), "--json", "--report", "none") == ""
